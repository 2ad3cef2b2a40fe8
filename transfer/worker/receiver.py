"""A worker's half of the weight transfer: one method per verb, dict in, dict out, Refused for what it will not do.

What a message means is decided by protocol.py; this file does the work: agree, stage, and replace the module's weights
while nobody generates. The verbs come one at a time; `status` and `weight_info` answer at any time.

    init_weight_transfer_engine  {"init_info": {"epoch", "trainer", "manifest", "timeout_s", "where"[, "verify"]
                                  [, "in_flight"]}[, "boot"]}
    start_weight_update          {"epoch", "version"[, "digest"][, "boot"][, "where"[, "finish"]]}
    update_weights               {"update_info": {"epoch", "version", "where"}}
    finish_weight_update         {"epoch", "weight_version"}         the version as a string, vLLM's field
    abort_weight_update          {"epoch", "version"}
    withdraw_weights             {"epoch", "version"}        the memory of that version and older is about to change

A `start` with `where` is an `update`, too, and with `finish` true all three.

Agreed once: `verify` (off, digest, full) says what is compared with the digest that `start` brings, `in_flight` (wait,
abort, keep) what becomes of completions that run when `finish` comes. `boot`, from `status`, names one start of this
worker: what was meant for another is refused, as a worker that was started again does not know what it has seen.

The same verbs without an epoch are vLLM's one-shot form (oneshot.py) until a trainer has taken an epoch.
"""

from __future__ import annotations

import enum
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch

from transfer.agreement import protocol, wire
from transfer.agreement.journal import Journal
from transfer.agreement.manifest import Manifest
from transfer.backends.base import Intake, Staged
from transfer.config import InFlight, Verify
from transfer.engine.chunks import Chunks
from transfer.memory.mark import WENT_ON
from transfer.memory.sums import SUMS
from transfer.worker import lease
from transfer.worker.gate import Gate

TIMEOUT_S = 60.0  # deadline of one message, until a trainer names its own
MAX_TIMEOUT_S = 3600.0
QUICK_BYTES = {"cpu": 2**25, "cuda": 2**36}  # of weights that are copied or read within about 50 ms

Noted = protocol.Start | protocol.Update | protocol.Finish | protocol.Withdraw


class Place(Protocol):
    """Where weights land: a module in this process, or one that is reached by other means."""

    manifest: Manifest  # of the weights that it holds
    parameters: set[str]  # the names of those that every one-shot update must bring
    device: torch.device

    @property
    def plan(self) -> str: ...
    def wants_block(self, slots: Sequence[Staged]) -> bool: ...
    def prepare(self, slots: Sequence[Staged], owner: torch.device, copied: bool, empty: bool) -> None: ...
    def digest(self, staged: Staged, like: str) -> str: ...
    def live_digest(self, like: str) -> str: ...
    def copy(self, staged: Staged, unchecked: bool, with_digest: bool) -> str | None: ...
    def view(self, staged: Staged) -> None: ...
    def forget(self) -> None: ...
    def close(self) -> None: ...


class Turns:
    """Asked before each token of a completion; `versions` are those that it was told, each once.

    `steady`: there will be one, since new weights wait for the completion's end.
    """

    def __init__(self, turn: Callable[[], int | None], steady: bool) -> None:
        self._turn = turn
        self.steady = steady
        self.versions: list[int] = []

    def __call__(self) -> int | None:
        """The version of the weights that the next token is sampled with; None if the completion is to end here."""
        version = self._turn()
        if version is not None and version not in self.versions[-1:]:
            self.versions.append(version)
        return version


class Receiver:
    """Takes updates from `intake` to where weights land, a module's tensors for one (landing.py)."""

    def __init__(self, intake: Intake, landing: Place, journal: Journal) -> None:
        self._landing = landing
        self._manifest = landing.manifest
        self._device = landing.device
        self._intake = intake
        self._chunks = Chunks(self._manifest, self._device, landing.parameters)
        self._staged: Staged = {}
        self._state = protocol.State()
        self._boot = secrets.token_hex(4)
        self._timeout_s = TIMEOUT_S
        self._verify = Verify.off
        self._in_flight = InFlight.wait
        self._journal = journal
        self._verbs = threading.Lock()  # one verb at a time
        self._gate = Gate()  # generation shares it, finish and withdraw have it alone

    @property
    def version(self) -> int | None:
        """The version that completions are sampled with; None if nothing may be served."""
        return self._state.serves

    def prompt(self, verb: str) -> bool:
        """Whether a verb of an update would be done at once: nobody to wait for, and bytes that are quickly moved."""
        if verb == "status":
            return True
        mapped = bool(self._intake.slots) and self._manifest.nbytes <= QUICK_BYTES.get(self._device.type, 0)
        return mapped and not self._verbs.locked() and self._gate.idle

    @property
    def phase(self) -> protocol.Phase:
        """Where this worker stands."""
        return protocol.expired(self._state, lease.now()).phase

    @contextmanager
    def serving(self) -> Iterator[Turns]:
        """Hold the live weights as they are, but for `Turns`; Refused 503 if there are none to serve."""
        with self._gate.shared(self._timeout_s):
            self._serves()
            in_flight = self._in_flight  # as it was agreed when the completion began
            turns = Turns(partial(self._turn, in_flight), in_flight is InFlight.wait)
            began = time.monotonic()
            try:
                yield turns
            finally:
                self._journal.write("serve", versions=turns.versions, digest=self._state.digest, began=began)

    def _turn(self, in_flight: InFlight) -> int | None:
        """The version that the next token is sampled with, after a flip that waits; None: end the completion."""
        if self._gate.wanted and in_flight is InFlight.abort:
            return None
        if self._gate.wanted and in_flight is InFlight.keep:
            self._gate.give_way(self._timeout_s)
        return self._serves()

    def _serves(self) -> int:
        version = self._state.serves
        if version is None:
            raise wire.Refused(503, f"no weights to serve: this worker is {self._state.phase.value}")
        return version

    def lose_weights(self) -> None:
        """The weights are gone, and only an update brings any back: serve nothing until then."""
        with self._alone(), self._gate.exclusive(self._timeout_s):
            if self._state.version is not None:
                message = protocol.Withdraw(self._state.epoch, self._state.version)
                self._state, _ = self._step(message)
                self._journal.write("withdraw", epoch=message.epoch, version=message.version, result="lost")
            self._forget()

    def close(self) -> None:
        """Serve nothing any more and give up what the backend holds."""
        with self._alone(), self._gate.exclusive(self._timeout_s):
            self._state = protocol.State(epoch=self._state.epoch)
            self._staged = {}
            self._landing.close()
            self._intake.close()
            self._journal.close()

    # --- the verbs ----------------------------------------------------------------------------------------------------

    def status(self, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Where this worker stands, how many completions it is busy with, and the manifest that it wants."""
        state = protocol.expired(self._state, lease.now())
        return {
            "phase": state.phase.value,
            "boot": self._boot,
            "epoch": state.epoch,
            "trainer": state.trainer,
            "version": state.serves,
            "newest": state.version,
            "target": state.target,
            "digest": state.digest,
            "manifest": self._manifest.digest,
            "dtype": self._manifest.floating_dtype(),
            "serving": self._gate.sharing,
            "plan": self._landing.plan if self._intake.in_place else "the tensors are put in the place of the old ones",
        }

    def _standing(self) -> dict[str, Any]:
        """The short answer to a message of an update."""
        return {"phase": self._state.phase.value}

    def weight_info(self, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """vLLM's answer: the live version as a string."""
        version = self.version
        return {"weight_version": None if version is None else str(version)}

    def init_weight_transfer_engine(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Agree with a trainer on the manifest and map what the backend shares; 422 lists the differences."""
        body = _only(body, {"init_info": _is_dict, "boot": wire.is_str}, optional={"boot"})
        self._check_boot(body)
        info = body["init_info"]
        if "epoch" not in info:
            wire.only(info, {"packed": lambda value: value is False}, "init_info")
            return self.status()
        _only(info, INIT_INFO, "init_info", optional={"verify", "in_flight"})
        with self._alone():
            state, decision = self._step(protocol.Init(info["epoch"], info["trainer"]))
            if isinstance(decision, protocol.Repeat):
                return self._standing()
            with _reasons("agreeing on the weights"):
                self._agree(info)
            self._state, self._timeout_s = state, float(info["timeout_s"])
            self._verify = Verify(info.get("verify", "off"))
            self._in_flight = InFlight(info.get("in_flight", "wait"))
            self._forget()
            self._journal.write("init", epoch=state.epoch)
            return self._standing()

    def start_weight_update(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Begin an update; without an epoch, vLLM's form, to the next version."""
        with self._alone():
            if "epoch" not in body:
                wire.only(dict(body), {"is_checkpoint_format": lambda value: value is True})
                return self._start(protocol.Start(0, self._next()))
            _only(body, START, optional={"digest", "boot", "where", "finish"})
            self._check_boot(body)
            return self._start_and_on(body["epoch"], body["version"], body)

    def update_weights(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Stage the bytes; an error leaves the live weights as they were. One-shot, with no start: the whole update."""
        info = _only(body, {"update_info": _is_dict})["update_info"]
        with self._alone():
            if "epoch" in info:
                _only(info, {"epoch": _is_epoch, "version": wire.is_int, "where": _is_dict}, "update_info")
                message = protocol.Update(info["epoch"], info["version"])
                return self._update(message, lambda: self._intake.stage(message.version, info["where"]))
            alone = protocol.expired(self._state, lease.now()).target is None
            version = self._next()
            if alone:
                self._start(protocol.Start(0, version))
            self._update(protocol.Update(0, version), lambda: self._chunks.stage(info))
            return self._finish_chunks(version) if alone else self._standing()  # with a start, finish is a message, too

    def finish_weight_update(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Make the staged version the live one, weights and label at once, while nobody generates."""
        with self._alone():
            if "epoch" not in body:
                wire.only(dict(body), {"weight_version": _is_version})
                return self._finish_chunks(self._labelled(body.get("weight_version")))
            _only(body, {"epoch": _is_epoch, "weight_version": _is_version})
            return self._finish(protocol.Finish(body["epoch"], int(body["weight_version"])))

    def abort_weight_update(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Drop what was staged; 409 if that version is live already."""
        _only(body, {"epoch": wire.is_int, "version": wire.is_int})
        with self._alone():
            self._state, decision = self._step(protocol.Abort(**body))
            if isinstance(decision, protocol.Do):
                self._forget()
            self._journal.write("abort", **body)
            return self._standing()

    def withdraw_weights(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Serve nothing until a newer version is finished; answered once no completion reads the weights any more."""
        _only(body, {"epoch": _is_epoch, "version": wire.is_int})
        with self._alone():
            message = protocol.Withdraw(**body)
            state, decision = self._step(message)
            if isinstance(decision, protocol.Do):
                with _reasons(f"withdrawing version {message.version}"), self._gate.exclusive(self._timeout_s / 2):
                    _synchronize(self._device)  # nothing that was launched reads them, either
                    self._state = state
                if state.target is None:
                    self._forget()
            self._state = state
            self._noted("withdraw", message, decision)
            return self._standing()

    def _check_boot(self, body: Mapping[str, Any]) -> None:
        """Refused 412 for a message that was meant for another start of this worker, which may have known more."""
        if body.get("boot", self._boot) != self._boot:
            raise wire.Refused(412, "this message was meant for another start of this worker: ask for its status")

    # --- the work -----------------------------------------------------------------------------------------------------

    def _agree(self, info: Mapping[str, Any]) -> None:
        differences = self._manifest.differences(Manifest.from_json(info["manifest"]))
        if differences:
            raise ValueError(f"the trainer's weights do not fit this worker's model: {'; '.join(differences)}")
        self._intake.prepare(self._manifest, info["where"], self._device)
        try:
            self._prepare_landing(float(info["timeout_s"]) / 2)
        except BaseException:
            self._intake.close()  # nobody's: the earlier trainer's slots are not mapped any more
            raise

    def _prepare_landing(self, timeout_s: float) -> None:
        slots, copied, empty = self._intake.slots, self._intake.in_place, self._state.serves is None
        alone: AbstractContextManager[None] = nullcontext()
        if copied and self._landing.wants_block(slots):
            alone = self._gate.exclusive(timeout_s)
        with alone:
            self._landing.prepare(slots, self._intake.owner, copied, empty)

    def _start(self, message: protocol.Start) -> dict[str, Any]:
        self._state, decision = self._step(message)
        if isinstance(decision, protocol.Do):
            self._forget()
        self._noted("start", message, decision)
        return self._standing()

    def _start_and_on(self, epoch: int, version: int, body: Mapping[str, Any]) -> dict[str, Any]:
        """Start, and whatever else the message is."""
        if "finish" in body and "where" not in body:
            raise wire.Refused(422, "body.finish needs body.where: weights that were not staged cannot be finished")
        self._start(protocol.Start(epoch, version, body.get("digest")))
        if "where" in body:
            self._update(protocol.Update(epoch, version), lambda: self._intake.stage(version, body["where"]))
        if body.get("finish"):
            self._finish(protocol.Finish(epoch, version))
        return self._standing()

    def _update(self, message: protocol.Update, stage: Callable[[], Staged]) -> dict[str, Any]:
        state, decision = self._step(message)
        if isinstance(decision, protocol.Do):
            with self._or_failed(f"staging version {message.version}"):
                staged = stage()
                if not self._intake.slots:  # something may have been queued
                    _synchronize(self._device)
                if self._intake.settled:
                    self._compare(state, lambda like: self._landing.digest(staged, like), "staged")
            self._state, self._staged = state, staged
        self._noted("update", message, decision)
        return self._standing()

    def _finish(self, message: protocol.Finish, check: Callable[[], None] | None = None) -> dict[str, Any]:
        self._state, decision = self._step(message)
        if isinstance(decision, protocol.Do):
            with self._or_failed(f"finishing version {message.version}"):
                if check is not None:
                    check()
                with self._gate.exclusive(self._timeout_s / 2):  # well before the trainer gives up waiting
                    self._replace_weights()
            self._forget()
        self._noted("finish", message, decision)
        return self._standing()

    def _replace_weights(self) -> None:
        """Weights and label change together; what is not verified afterwards is not served."""
        self._state = protocol.reported(self._state, protocol.Event.WRITING)
        digest = self._write_weights()
        self._check_still()
        if digest is not None and self._verify is not Verify.full:
            self._check_digest(self._state, digest, "copied")
        elif self._verify is Verify.full or not self._intake.settled:
            self._compare(self._state, self._live_digest, "live")
        self._state = protocol.reported(self._state, protocol.Event.FLIPPED)

    def _check_still(self) -> None:
        """What was copied out of the trainer's own memory is whole only if the trainer still held still at the end."""
        if self._intake.settled or not self._intake.in_place:
            return
        target = self._state.target
        if protocol.expired(self._state, lease.now()).target is None:
            raise ValueError("the lease of the update has ended before its weights were copied")
        if target is None or not self._intake.still(target):
            raise ValueError(f"version {target}: {WENT_ON}")

    def _live_digest(self, like: str) -> str:
        """Of the module's tensors; unless all is to be looked at, of the slot that has just become them."""
        if self._intake.in_place or self._verify is Verify.full:
            return self._landing.live_digest(like)
        return self._landing.digest(self._staged, like)

    def _compare(self, state: protocol.State, digest: Callable[[str], str], which: str) -> None:
        if self._verify is not Verify.off and state.target_digest is not None:
            self._check_digest(state, digest(state.target_digest), which)

    def _check_digest(self, state: protocol.State, found: str, which: str) -> None:
        expected = state.target_digest
        if self._verify is not Verify.off and expected is not None and found != expected:
            raise ValueError(f"the {which} weights have the digest {found}, and the trainer's have {expected}")

    def _noted(self, op: str, message: Noted, decision: protocol.Decision) -> None:
        result = "done" if isinstance(decision, protocol.Do) else "repeat"
        digest = self._state.digest if op in ("finish", "withdraw") else self._state.target_digest
        self._journal.write(op, epoch=message.epoch, version=message.version, digest=digest, result=result)

    def _finish_chunks(self, version: int) -> dict[str, Any]:
        return self._finish(protocol.Finish(0, version), self._chunks.check_complete)

    def _write_weights(self) -> str | None:
        """The digest of what was written, if that cost nothing."""
        if self._intake.in_place:
            wanted = self._verify is not Verify.off and (self._state.target_digest or "").startswith(SUMS)
            return self._landing.copy(self._staged, self._intake.unchecked, wanted)
        self._landing.view(self._staged)
        return None

    # --- the state ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._verbs.acquire(timeout=self._timeout_s):
            raise wire.Refused(503, f"another weight-update message has kept this worker for {self._timeout_s:g} s")
        try:
            yield
        finally:
            self._verbs.release()

    def _step(self, message: protocol.Message) -> tuple[protocol.State, protocol.Decision]:
        state, decision = protocol.step(self._state, message, lease.now(), 2 * self._timeout_s)
        if isinstance(decision, protocol.Refuse):
            raise wire.Refused(409, decision.reason)
        return state, decision

    @contextmanager
    def _or_failed(self, doing: str) -> Iterator[None]:
        """Whatever goes wrong inside ends the update under way."""
        try:
            with _reasons(doing):
                yield
        except wire.Refused as refusal:
            self._journal.write("failed", epoch=self._state.epoch, version=self._state.target, result=refusal.reason)
            self._state = protocol.reported(self._state, protocol.Event.FAILED)
            self._forget()
            raise

    def _forget(self) -> None:
        self._staged = {}
        self._landing.forget()
        self._chunks.clear()

    def _next(self) -> int:
        """The version of a one-shot update: the one under way, or the one after the newest."""
        state = protocol.expired(self._state, lease.now())
        if state.target is not None:
            return state.target
        return 0 if state.version is None else state.version + 1

    def _labelled(self, label: str | None) -> int:
        """The one-shot update under way, renamed if its trainer numbers the versions itself."""
        if label is None:
            return self._next()
        self._state, _ = self._step(protocol.Rename(0, int(label)))
        return int(label)


@contextmanager
def _reasons(doing: str) -> Iterator[None]:
    """Any error becomes a Refused that says what was being done."""
    try:
        yield
    except wire.Refused as error:
        raise wire.Refused(error.status, f"{doing}: {error.reason}") from error
    except Exception as error:
        status = 422 if isinstance(error, ValueError | OSError) else 500  # OSError: there is no such file or memory
        raise wire.Refused(status, f"{doing}: {str(error) or type(error).__name__}") from error


def _only(
    body: Mapping[str, Any],
    known: Mapping[str, Callable[[Any], bool]],
    where: str = "body",
    optional: frozenset[str] | set[str] = frozenset(),
) -> dict[str, Any]:
    """The body, with exactly these keys; Refused 422 names the one that is unknown, wrong or missing."""
    body = dict(body)
    wire.only(body, dict(known), where)
    for key in known:
        if key not in body and key not in optional:
            raise wire.Refused(422, f"{where}.{key} is missing")
    return body


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_timeout(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_TIMEOUT_S


def _is_one_of(kind: type[enum.Enum]) -> Callable[[Any], bool]:
    return tuple(member.value for member in kind).__contains__


def _is_epoch(value: Any) -> bool:
    return wire.is_int(value) and value > 0  # 0 is one-shot's


def _is_version(value: Any) -> bool:
    return isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 18


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


START: dict[str, Callable[[Any], bool]] = {  # of a session
    "epoch": _is_epoch,
    "version": wire.is_int,
    "digest": wire.is_str,
    "boot": wire.is_str,
    "where": _is_dict,
    "finish": wire.is_bool,
}
INIT_INFO: dict[str, Callable[[Any], bool]] = {  # of a session
    "epoch": _is_epoch,
    "trainer": wire.is_str,
    "manifest": _is_dict,
    "timeout_s": _is_timeout,
    "where": _is_dict,
    "verify": _is_one_of(Verify),
    "in_flight": _is_one_of(InFlight),
}
