"""Pushes of a trainer whose weights are sharded over ranks, beside gathering them and beside the limits, in one run.

push           change, write, digest, messages: a whole update, as the trainer waits for it
write          of it, until every rank's rows are cast and wait in its slot
read           of it, in the worker: from all ranks' slots into its parameters
gather         full_tensor() of every parameter in the dtype that travels, then a broadcast: the usual way
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import torch

from transfer.agreement.manifest import Manifest
from transfer.bench.forked import Forked, ForkedWorker
from transfer.bench.lab import START_S, TIMEOUT_S, Unavailable
from transfer.bench.rank import Told, serve_rank
from transfer.bench.shapes import Model
from transfer.config import Verify
from transfer.trainer.senders.http import HttpSender
from transfer.worker.plain_worker import PlainSpec

WARM = 3  # pushes that are not counted: the loader's own, and one for each slot


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Who receives: workers that hold all, or one worker in so many parts; and whether digests are compared."""

    workers: int = 1
    parts: int = 1
    verify: Verify = Verify.digest

    @property
    def name(self) -> str:
        """As the table calls it."""
        to = f"{self.workers} worker{'s' * (self.workers > 1)}" if self.parts == 1 else f"{self.parts} parts of a model"
        return f"{to}, verify={self.verify.value}"


@dataclass(slots=True, kw_only=True)
class Timed:
    """Seconds of the pushes of a case, and of the memcpy beside each."""

    case: Case
    push: list[float] = field(default_factory=list)
    write: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    memcpy: list[float] = field(default_factory=list)
    right: bool = False
    plan: str = ""
    failed: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is asked for: a model, whose trainer has so many ranks, on "cpu" or "cuda"; how often, and where to work."""

    model: Model
    ranks: int
    workers: int  # that hold all, if `parts` is 1; else one, in so many
    parts: int
    device: str
    repeats: int
    folder: Path
    progress: Callable[..., None]


@dataclass(slots=True, kw_only=True)
class Measured:
    """All of one model."""

    setting: Setting
    rows: list[Timed]
    gather: list[float]
    limits: dict[str, float]


def measured(setting: Setting) -> Measured:
    """Time all ways to move a model from its ranks; Unavailable if they do not come up."""
    model, device = setting.model, setting.device
    manifest = Manifest.of({n: torch.empty(s, dtype=getattr(torch, d)) for n, (d, s) in model.tensors.items()})
    with ExitStack() as stack:
        setting.progress(f"{model.name}: starting {setting.ranks} ranks", always=True)
        trainer = stack.enter_context(closing(Trainer(manifest, setting)))
        memcpy = _memcpy(manifest.nbytes) if device == "cpu" else None
        rows = []
        for verify in (Verify.off, Verify.digest):
            case = Case(workers=setting.workers, parts=setting.parts, verify=verify)
            setting.progress(f"{model.name}: {case.name}", always=True)
            rows.append(_timed_case(case, trainer, manifest, setting, memcpy))
        setting.progress(f"{model.name}: gather and broadcast", always=True)
        gather = [max(trainer.call("gather")) for _ in range(1 + max(3, setting.repeats // 3))][1:]
        return Measured(setting=setting, rows=rows, gather=gather, limits=trainer.call("limits")[0])


class Trainer:
    """The ranks' processes, which do the same things at the same time."""

    def __init__(self, manifest: Manifest, setting: Setting) -> None:
        self._stack = ExitStack()
        lines = [Pipe() for _ in range(setting.ranks - 1)]  # between the first rank and each other
        self._ranks = []
        for rank in range(setting.ranks):
            told = Told(
                rank=rank,
                count=setting.ranks,
                folder=str(setting.folder),
                manifest=manifest.to_json(),
                on_gpu=setting.device != "cpu",
            )
            pipes = [lines[rank - 1][1]] if rank else [first for first, _ in lines]
            self._ranks.append(self._stack.enter_context(Forked(serve_rank, told, pipes)))
        for ends in lines:
            for end in ends:
                end.close()

    def call(self, command: str, **arguments: Any) -> list[Any]:
        """What each rank gives; Unavailable with the first's error if one raises, or says nothing."""
        for rank in self._ranks:
            rank.pipe.send((command, arguments))
        answers = []
        for number, rank in enumerate(self._ranks):
            try:
                answers.append(rank.pipe.recv() if rank.pipe.poll(START_S) else (False, f"rank {number} is silent"))
            except EOFError:
                answers.append((False, f"rank {number} has died"))
        if errors := [said for done, said in answers if not done]:
            raise Unavailable(errors[0])
        return [said for _, said in answers]

    def close(self) -> None:
        """End the processes."""
        self._stack.close()


def _timed_case(
    case: Case, trainer: Trainer, manifest: Manifest, setting: Setting, memcpy: Callable[[], float] | None
) -> Timed:
    timed = Timed(case=case)
    try:
        endpoint = trainer.call("make", verify=case.verify.value)[0]
        with _workers(case, endpoint, manifest, setting) as senders:
            trainer.call("open", urls=[sender.url for sender in senders], token=senders[0].token)
            for number in range(WARM + setting.repeats):
                said = trainer.call("push")[0]
                status = [sender.http.call("status", {}) for sender in senders]
                beside = memcpy() if memcpy is not None else 0.0
                if number >= WARM:
                    timed.push.append(said["push"])
                    timed.write.append(said["write"])
                    timed.read.append(max(each["flip_seconds"] for each in status))
                    timed.memcpy.append(beside)
            timed.plan = str(status[0]["plan"])
            expected = trainer.call("truth", size=case.parts)[0]
            timed.right = all(sender.http.call("completions", {})["digest"] == expected for sender in senders)
    except Unavailable as error:
        timed.failed = str(error)
    trainer.call("close")
    return timed


@dataclass(frozen=True, slots=True)
class Asked:
    """A worker, and how it is asked."""

    url: str
    token: str
    http: HttpSender


@contextmanager
def _workers(case: Case, endpoint: Mapping[str, Any], manifest: Manifest, setting: Setting) -> Iterator[list[Asked]]:
    token = secrets.token_urlsafe(32)
    gpus = 0 if setting.device == "cpu" else torch.cuda.device_count()
    places = [f"cuda:{index % gpus}" if gpus else "cpu" for index in range(max(case.workers, case.parts))]
    with ExitStack() as stack:
        started = []
        for index in range(case.workers):
            log = setting.folder / f"worker-{secrets.token_hex(4)}.log"
            spec = PlainSpec(manifest=manifest.to_json(), endpoint=dict(endpoint), device=places[index], token=token)
            parts = places if case.parts > 1 else []
            started.append(stack.enter_context(ForkedWorker(spec, log, parts)))
        told = []
        for index, process in enumerate(started):
            url = process.url()
            http = stack.enter_context(closing(HttpSender(url, token, f"worker {index}", TIMEOUT_S)))
            told.append(Asked(url, token, http))
        yield told


def _memcpy(nbytes: int) -> Callable[[], float]:
    source, target = (torch.full((nbytes,), value, dtype=torch.uint8) for value in (1, 2))

    def seconds() -> float:
        began = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - began

    return seconds
