"""The work of an update: agree, stage, replace the weights while nobody generates, and take back what failed.

What a message means is decided by protocol.py, through Standing; what is done to the bytes is the backend's (`Intake`)
and the place's where they land. Every method wants its caller to hold `Standing.alone`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from transfer.agreement import protocol, wire
from transfer.agreement.manifest import Manifest
from transfer.backends.base import Intake, Staged
from transfer.engine.chunks import Chunks
from transfer.worker.gate import Gate
from transfer.worker.place import Place
from transfer.worker.standing import Standing, Terms
from transfer.worker.verification import Verification


class Updates:
    """Takes updates from `intake` to `place`, one at a time; `chunks` are those of one-shot messages."""

    def __init__(self, intake: Intake, place: Place, standing: Standing, gate: Gate) -> None:
        self.chunks = Chunks(place.manifest, place.device, place.parameters)
        self.flip_seconds = 0.0  # in which the last update let nothing be served
        self._intake = intake
        self._place = place
        self._standing = standing
        self._gate = gate
        self._verification = Verification(intake, place, standing)
        self._staged: Staged = {}

    def agree(self, info: Mapping[str, Any]) -> None:
        """Let the trainer of an `init_info` take over, on its terms, and map what its backend shares."""
        standing = self._standing
        state, decision = standing.step(protocol.Init(info["epoch"], info["trainer"]))
        if isinstance(decision, protocol.Repeat):
            return
        with _reasons("agreeing on the weights"):
            self._agree(info)
        standing.state, standing.terms = state, Terms.of(info)
        self._forget()
        standing.journal.write("init", epoch=state.epoch)

    def start(self, message: protocol.Start) -> None:
        """Begin an update."""
        self._standing.state, decision = self._standing.step(message)
        if isinstance(decision, protocol.Do):
            self._forget()
        self._standing.noted("start", message, decision)

    def stage(self, message: protocol.Update, where: Mapping[str, Any]) -> None:
        """Stage what the backend finds there."""
        self.stage_by(message, lambda: self._intake.stage(message.version, where))

    def stage_by(self, message: protocol.Update, stage: Callable[[], Staged]) -> None:
        """Stage what `stage` returns; an error ends the update, and leaves the live weights as they were."""
        state, decision = self._standing.step(message)
        if isinstance(decision, protocol.Do):
            with self._or_failed(f"staging version {message.version}"):
                staged = stage()
                if not self._intake.slots:  # something may have been queued
                    _synchronize(self._place.device)
                self._verification.check_staged(staged)
            self._standing.state, self._staged = state, staged
        self._standing.noted("update", message, decision)

    def finish(self, message: protocol.Finish, check: Callable[[], None] | None = None) -> None:
        """Make the staged version the live one, if `check` finds nothing wrong with it."""
        self._standing.state, decision = self._standing.step(message)
        if isinstance(decision, protocol.Do):
            with self._or_failed(f"finishing version {message.version}"):
                if check is not None:
                    check()
                with self._gate.exclusive(self._standing.terms.timeout_s / 2):  # before the trainer gives up waiting
                    self._replace_weights()
            self._forget()
        self._standing.noted("finish", message, decision)

    def abort(self, message: protocol.Abort) -> None:
        """Drop what was staged."""
        self._standing.state, decision = self._standing.step(message)
        if isinstance(decision, protocol.Do):
            self._forget()
        self._standing.journal.write("abort", epoch=message.epoch, version=message.version)

    def withdraw(self, message: protocol.Withdraw) -> None:
        """Serve nothing until a newer version is finished, once no completion reads the weights any more."""
        standing = self._standing
        state, decision = standing.step(message)
        if isinstance(decision, protocol.Do):
            doing = f"withdrawing version {message.version}"
            with _reasons(doing), self._gate.exclusive(standing.terms.timeout_s / 2):
                _synchronize(self._place.device)  # nothing that was launched reads them, either
                standing.state = state
            if state.target is None:
                self._forget()
        standing.state = state
        standing.noted("withdraw", message, decision)

    def lose(self) -> None:
        """The weights are gone, and only an update brings any back: serve nothing until then."""
        standing = self._standing
        with self._gate.exclusive(standing.terms.timeout_s):
            if standing.state.version is not None:
                message = protocol.Withdraw(standing.state.epoch, standing.state.version)
                standing.state, _ = standing.step(message)
                standing.journal.write("withdraw", epoch=message.epoch, version=message.version, result="lost")
            self._forget()

    def close(self) -> None:
        """Serve nothing any more and give up what the backend holds."""
        with self._gate.exclusive(self._standing.terms.timeout_s):
            self._standing.state = protocol.State(epoch=self._standing.state.epoch)
            self._staged = {}
            self._place.close()
            self._intake.close()
            self._standing.journal.close()

    def _agree(self, info: Mapping[str, Any]) -> None:
        manifest = self._place.manifest
        differences = manifest.differences(Manifest.from_json(info["manifest"]))
        if differences:
            raise ValueError(f"the trainer's weights do not fit this worker's model: {'; '.join(differences)}")
        self._intake.prepare(manifest, info["where"], self._place.device)
        try:
            self._prepare_place(float(info["timeout_s"]) / 2)
        except BaseException:
            self._intake.close()  # nobody's: the earlier trainer's slots are not mapped any more
            raise

    def _prepare_place(self, timeout_s: float) -> None:
        slots, copied, empty = self._intake.slots, self._intake.in_place, self._standing.state.serves is None
        alone: AbstractContextManager[None] = nullcontext()
        if copied and self._place.wants_block(slots):
            alone = self._gate.exclusive(timeout_s)
        with alone:
            self._place.prepare(slots, self._intake.owner, copied, empty)

    def _replace_weights(self) -> None:
        """Weights and label change together; what is not verified afterwards is not served."""
        began = time.perf_counter()
        self._standing.reported(protocol.Event.WRITING)
        digest = self._write_weights()
        self._verification.check_written(self._staged, digest)
        self._standing.reported(protocol.Event.FLIPPED)
        self.flip_seconds = time.perf_counter() - began

    def _write_weights(self) -> str | None:
        """The digest of what was written, if that cost nothing."""
        if self._intake.in_place:
            return self._place.copy(self._staged, self._intake.unchecked, self._verification.while_copied)
        self._place.view(self._staged)
        return None

    @contextmanager
    def _or_failed(self, doing: str) -> Iterator[None]:
        """Whatever goes wrong inside ends the update under way."""
        standing = self._standing
        try:
            with _reasons(doing):
                yield
        except wire.Refused as refusal:
            state = standing.state
            standing.journal.write("failed", epoch=state.epoch, version=state.target, result=refusal.reason)
            standing.reported(protocol.Event.FAILED)
            self._forget()
            raise

    def _forget(self) -> None:
        self._staged = {}
        self._place.forget()
        self.chunks.clear()


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


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
