"""A worker's half of the weight transfer: one method per verb, dict in, dict out, Refused for what it will not do.

The verbs come one at a time; `status` and `weight_info` answer at any time.

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

The same verbs without an epoch are vLLM's one-shot form (one_shot.py) until a trainer has taken an epoch. What a
message may hold is in bodies.py, where the worker stands in standing.py, the work in update.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from transfer.agreement import protocol, wire
from transfer.agreement.journal import Journal
from transfer.backends.base import Intake
from transfer.worker import bodies
from transfer.worker.gate import Gate
from transfer.worker.one_shot import OneShot
from transfer.worker.place import Place
from transfer.worker.serving import Serving, Turns
from transfer.worker.standing import Standing
from transfer.worker.update import Updates

QUICK_BYTES = {"cpu": 2**25, "cuda": 2**36}  # of weights that are copied or read within about 50 ms


class Receiver:
    """Takes updates from `intake` to where weights land, a module's tensors for one (landing.py)."""

    def __init__(self, intake: Intake, landing: Place, journal: Journal) -> None:
        self._intake = intake
        self._landing = landing
        self._gate = Gate()  # completions share it, whoever replaces or withdraws weights has it alone
        self._standing = Standing(journal)
        self._serving = Serving(self._standing, self._gate)
        self._updates = Updates(intake, landing, self._standing, self._gate)
        self._one_shot = OneShot(self._updates, self._standing)

    @property
    def version(self) -> int | None:
        """The version that completions are sampled with; None if nothing may be served."""
        return self._standing.state.serves

    @property
    def phase(self) -> protocol.Phase:
        """Where this worker stands."""
        return self._standing.now().phase

    def prompt(self, verb: str) -> bool:
        """Whether a verb of an update would be done at once: nobody to wait for, and bytes that are quickly moved."""
        if verb == "status":
            return True
        quick = self._landing.manifest.nbytes <= QUICK_BYTES.get(self._landing.device.type, 0)
        return bool(self._intake.slots) and quick and not self._standing.busy and self._gate.idle

    def serving(self) -> AbstractContextManager[Turns]:
        """Hold the live weights as they are, but for `Turns`; Refused 503 if there are none to serve."""
        return self._serving.turns()

    def lose_weights(self) -> None:
        """The weights are gone, and only an update brings any back: serve nothing until then."""
        with self._standing.alone():
            self._updates.lose()

    def close(self) -> None:
        """Serve nothing any more and give up what the backend holds."""
        with self._standing.alone():
            self._updates.close()

    # --- the verbs ----------------------------------------------------------------------------------------------------

    def status(self, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Where this worker stands, how many completions it is busy with, and the manifest that it wants."""
        state, manifest = self._standing.now(), self._landing.manifest
        return {
            "phase": state.phase.value,
            "boot": self._standing.boot,
            "epoch": state.epoch,
            "trainer": state.trainer,
            "version": state.serves,
            "newest": state.version,
            "target": state.target,
            "digest": state.digest,
            "manifest": manifest.digest,
            "dtype": manifest.floating_dtype(),
            "serving": self._gate.sharing,
            "plan": self._landing.plan if self._intake.in_place else "the tensors are put in the place of the old ones",
        }

    def weight_info(self, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """vLLM's answer: the live version as a string."""
        version = self.version
        return {"weight_version": None if version is None else str(version)}

    def init_weight_transfer_engine(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Agree with a trainer on the manifest and map what the backend shares; 422 lists the differences."""
        body = bodies.INIT.read(body)
        self._check_boot(body)
        if "epoch" not in body["init_info"]:
            bodies.ONE_SHOT_INIT_INFO.read(body["init_info"])
            return self.status()
        info = bodies.INIT_INFO.read(body["init_info"])
        with self._standing.alone():
            self._updates.agree(info)
            return self._answer()

    def start_weight_update(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Begin an update, stage its bytes with `where`, and make them live with `finish`; without an epoch, vLLM's."""
        if "epoch" not in body:
            bodies.ONE_SHOT_START.read(body)
            with self._standing.alone():
                self._one_shot.start()
                return self._answer()
        body = bodies.read_start(body)
        self._check_boot(body)
        epoch, version = body["epoch"], body["version"]
        with self._standing.alone():
            self._updates.start(protocol.Start(epoch, version, body.get("digest")))
            if "where" in body:
                self._updates.stage(protocol.Update(epoch, version), body["where"])
            if body.get("finish"):
                self._updates.finish(protocol.Finish(epoch, version))
            return self._answer()

    def update_weights(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Stage the bytes; an error leaves the live weights as they were. One-shot, with no start: the whole update."""
        info = bodies.UPDATE.read(body)["update_info"]
        if "epoch" not in info:
            with self._standing.alone():
                self._one_shot.update(info)
                return self._answer()
        info = bodies.UPDATE_INFO.read(info)
        with self._standing.alone():
            self._updates.stage(protocol.Update(info["epoch"], info["version"]), info["where"])
            return self._answer()

    def finish_weight_update(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Make the staged version the live one, weights and label at once, while nobody generates."""
        if "epoch" not in body:
            label = bodies.ONE_SHOT_FINISH.read(body).get("weight_version")
            with self._standing.alone():
                self._one_shot.finish(label)
                return self._answer()
        body = bodies.FINISH.read(body)
        with self._standing.alone():
            self._updates.finish(protocol.Finish(body["epoch"], int(body["weight_version"])))
            return self._answer()

    def abort_weight_update(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Drop what was staged; 409 if that version is live already."""
        message = protocol.Abort(**bodies.ABORT.read(body))
        with self._standing.alone():
            self._updates.abort(message)
            return self._answer()

    def withdraw_weights(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Serve nothing until a newer version is finished; answered once no completion reads the weights any more."""
        message = protocol.Withdraw(**bodies.WITHDRAW.read(body))
        with self._standing.alone():
            self._updates.withdraw(message)
            return self._answer()

    def _answer(self) -> dict[str, Any]:
        """The short one to a message of an update."""
        return {"phase": self._standing.state.phase.value}

    def _check_boot(self, body: Mapping[str, Any]) -> None:
        """Refused 412 for a message that was meant for another start of this worker, which may have known more."""
        if body.get("boot", self._standing.boot) != self._standing.boot:
            raise wire.Refused(412, "this message was meant for another start of this worker: ask for its status")
