"""What a trainer and its clients would send a worker next, and what a stranger would make of it."""

from __future__ import annotations

import base64
import json
import pickle
from dataclasses import dataclass
from typing import Any

from extremes import extreme
from mutations import Mutator

from transfer.agreement import wire
from transfer.worker.openapi import OPENAPI, OPERATIONS

VERBS = [*wire.ROUTES, "openapi"]
SESSION = ["init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"]
OFTEN = [verb for verb in VERBS for _ in range(4 if verb in wire.ROUTES and wire.ROUTES[verb][0] == "POST" else 1)]
WORK = 600  # rows * tokens of a completion; more is a client's right, but takes too long here
HUGE = wire.MAX_CONTROL_BYTES


@dataclass(frozen=True)
class Sent:
    """One request; `valid`: as a trainer would send it now."""

    verb: str
    query: bytes
    body: bytes
    valid: bool

    @property
    def route(self) -> tuple[str, str]:
        return OPENAPI if self.verb == "openapi" else wire.ROUTES[self.verb]

    def __str__(self) -> str:
        return f"{self.route[0]} {self.route[1]}?{self.query[:300]!r} {self.body[:3000]!r}"


class Traffic:
    """Draws requests that fit the state of a worker, of which most are then bent.

    `material`: manifest, init (the `where` of a session), handles, names, dtype_names, shapes, vocabulary.
    """

    def __init__(self, seed: int, material: dict[str, Any]) -> None:
        self.mutator = Mutator(seed)
        self.random = self.mutator.random
        self.material = material
        self.in_parts = 0.25  # of the one-shot updates
        self.at_once = 0.5  # of a session's starts: they are an update, too, or all of it

    def next(self, status: dict[str, Any], where: dict[str, Any], digest: str | None, one_shot: bool) -> Sent:
        """A request to a worker in this state, whose next version waits at `where`."""
        while True:
            verb = self._verb(status, one_shot)
            bent = self.random.random() < (0.8 if verb in SESSION else 0.9)
            other_form = self.random.random() < 0.1
            message = self.valid(verb, status, where, digest, one_shot is not other_form)
            straight = Sent(verb, b"", json.dumps(message).encode(), not other_form)
            sent = self._bent(verb, message) if bent else straight
            if len(sent.body) < HUGE + 1000 and (verb != "completions" or affordable(sent.body)):
                return sent

    def _verb(self, status: dict[str, Any], one_shot: bool) -> str:
        draw = self.random.random()
        if draw < 0.06:
            return self.random.choice(["resume", "wake_up"])  # else nothing would ever be sampled
        if draw < 0.09 and status["epoch"]:
            return "withdraw_weights"
        if draw < 0.45:
            return self.random.choice(OFTEN)
        if draw < 0.55 or one_shot:
            return self.random.choice(SESSION[1:] if one_shot else SESSION)
        if status["epoch"] == 0:
            return SESSION[0]
        if status["target"] is None:
            return SESSION[1]
        return self.random.choice(SESSION[2:])

    def valid(
        self, verb: str, status: dict[str, Any], where: dict[str, Any], digest: str | None, one_shot: bool
    ) -> dict[str, Any]:
        """What a trainer or a client would send now."""
        newest = -1 if status["newest"] is None else status["newest"]
        version = newest + 1 if status["target"] is None else status["target"]
        if one_shot and verb in SESSION:
            return self._one_shot(verb, version)
        named = {"epoch": status["epoch"], "version": version}
        match verb:
            case "init_weight_transfer_engine":
                late = self.random.random() < 0.2
                trainer = "too late" if late else self.random.choice(["this", "that"])
                return self._init(max(1, status["epoch"] + (not late)), trainer)
            case "start_weight_update":
                at_once = self.random.random() < self.at_once
                more = {"where": where} | ({"finish": True} if self.random.random() < 0.5 else {}) if at_once else {}
                return named | ({} if digest is None else {"digest": digest}) | more
            case "update_weights":
                return {"update_info": {**named, "where": where}}
            case "finish_weight_update":
                return {"epoch": status["epoch"], "weight_version": str(version)}
            case "abort_weight_update":
                return named
            case "withdraw_weights":
                return {"epoch": max(1, status["epoch"]), "version": max(0, newest)}
        return self._asked(verb)

    def _init(self, epoch: int, trainer: str) -> dict[str, Any]:
        pick = self.random.choice
        info = {
            "epoch": epoch,
            "trainer": trainer,
            "manifest": self.material["manifest"],
            "timeout_s": 20.0,
            "where": self.material["init"],
        }
        agreed = {"verify": pick(["off", "digest", "full"]), "in_flight": pick(["wait", "abort", "keep"])}
        return {"init_info": {**info, **agreed}}

    def _one_shot(self, verb: str, version: int) -> dict[str, Any]:
        match verb:
            case "init_weight_transfer_engine":
                return {"init_info": self.random.choice([{}, {"packed": False}])}
            case "start_weight_update":
                return self.random.choice([{}, {"is_checkpoint_format": True}])
            case "update_weights":
                return {"update_info": self._handles()}
        return self.random.choice([{}, {"weight_version": str(version)}])

    def _handles(self) -> dict[str, Any]:
        """All tensors, or now and then some of them."""
        chosen = [self.random.random() < 0.7 or self.random.random() < 0.7 for _ in self.material["names"]]
        part = self.random.random() < self.in_parts
        told = {
            key: [each for each, take in zip(self.material[key], chosen, strict=True) if take or not part]
            for key in ("names", "dtype_names", "shapes", "handles")
        }
        handles = told.pop("handles")
        if self.random.random() < 0.2:
            return {**told, "ipc_handles": handles}
        return {**told, "ipc_handles_pickled": base64.b64encode(pickle.dumps(_tuples(handles), 4)).decode()}

    def _asked(self, verb: str) -> dict[str, Any]:
        pick = self.random.choice
        match verb:
            case "completions":
                return self._completion()
            case "pause":
                return {"mode": pick(["abort", "wait", "keep"]), "clear_cache": pick([True, False])}
            case "sleep":
                return {"level": pick([1, "1"])}
            case "wake_up":
                return {"tags": pick(["weights", ["weights", "kv_cache"]])}
        return {}

    def _completion(self) -> dict[str, Any]:
        token = lambda: self.random.randrange(self.material["vocabulary"])  # noqa: E731
        prompts = [[token() for _ in range(self.random.randint(1, 4))] for _ in range(self.random.randint(1, 2))]
        body: dict[str, Any] = {"prompt": prompts, "max_tokens": self.random.randint(1, 2)}
        extra = {"model": "m", "n": 1, "temperature": 0.5, "seed": 5, "stop_token_ids": [1], "logprobs": 0}
        extra |= {"top_p": 0.9, "top_k": 3, "min_p": 0.1}
        return body | {key: value for key, value in extra.items() if self.random.random() < 0.4}

    def _bent(self, verb: str, message: dict[str, Any]) -> Sent:
        query = b""
        if self.random.random() < 0.1 and verb in OPERATIONS:
            query = self.mutator.query(list(OPERATIONS[verb].query))
        if self.random.random() < 0.0005:
            filler = self.random.choice([b" ", b"[", b"0,", b'"a",'])
            return Sent(verb, query, b'{"a":' + filler * (HUGE // len(filler)), False)
        info = message.get("update_info", {})
        if info.get("names") and self.random.random() < 0.15:
            asks = {"update_info": extreme(self.random, info, self.material["handles"])}
            return Sent(verb, query, json.dumps(asks).encode(), False)
        if "ipc_handles_pickled" in info and self.random.random() < 0.75:
            info["ipc_handles_pickled"] = self.mutator.handles(_tuples(self.material["handles"]))
            return Sent(verb, query, json.dumps(message).encode(), False)
        if "ipc_handles" in info and self.random.random() < 0.75:
            info["ipc_handles"] = [{**handle} for handle in info["ipc_handles"]]
            message["update_info"] = self.mutator.bent(info)
        return Sent(verb, query, self.mutator.body(_jsonable(message)), False)


def affordable(body: bytes) -> bool:
    """Whether a completion, should it be valid, is little work."""
    try:
        message = json.loads(body)
        prompt, n, tokens = message["prompt"], message.get("n", 1), message.get("max_tokens", 16)
        rows = len(prompt) if isinstance(prompt[0], list) else 1
    except Exception:  # then it is refused
        return True
    work = rows * n * tokens if isinstance(n, int) and isinstance(tokens, int) else 0
    return work <= WORK or work > 65536 * 64


def _tuples(handles: list[Any]) -> list[Any]:
    return [{uuid: tuple(fields) for uuid, fields in handle.items()} for handle in handles]


def _jsonable(value: Any) -> Any:
    return json.loads(json.dumps(value, default=lambda other: other.decode("latin-1")))
