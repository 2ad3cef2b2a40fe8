"""When a run's state is saved: between two steps, as often as configured, and when the run is asked to stop.

A state between two steps stays in memory, whole, until the next step's gradient step begins to change it: so long a
SIGTERM saves it at once. While it changes, signals wait for the step's end.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.checkpoint.shards import write_rows, write_tensors
from rlhf.checkpoint.state import (
    NotFiniteError,
    State,
    Trainee,
    check_finite,
    load_state,
    plain,
    random_state,
    read_lines,
    restore_random,
    seed_python,
    weights_of,
    write_lines,
)
from rlhf.checkpoint.store import FOLDER as FOLDER
from rlhf.checkpoint.store import Best, Store, flush, flushed, read_json
from rlhf.models.device import device_of
from rlhf.ranks.ranks import Ranks
from rlhf.shell.ending import EXPLAINED, unbroken

if TYPE_CHECKING:
    from rlhf.config import RunConfig
    from rlhf.monitor.metrics import Recorder
    from transfer import Transfer

SAMPLES, METRICS = "samples.jsonl", "metrics.jsonl"  # beside it
STATE, ROWS, CONFIG = "state.json", "rows.jsonl", "config.json"
TOLD: dict[str, tuple[type, ...]] = {  # of STATE
    **dict.fromkeys(("step", "version", "epoch", "samples"), (int,)),
    **dict.fromkeys(("attributes", "random", "notes"), (dict,)),
    "seconds": (int, float),
}
POLICY = "policy"  # a folder, or the name of what ranks have written
SAVE = "save"  # what other ranks are asked to do
SCORES = ("eval/gold", "eval/reward")  # the first that an evaluation has says which is best


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that a run goes on from."""

    path: Path
    told: Mapping[str, Any]  # its state.json

    @classmethod
    def of(cls, path: Path) -> Saved:
        """What is in a folder that verifies; ValueError if that is no run's."""
        told = read_json(path / STATE)
        wrong = [key for key, kind in TOLD.items() if not (isinstance(told, dict) and isinstance(told.get(key), kind))]
        if wrong or not isinstance(told["notes"].get("summary", {}), dict):
            raise ValueError(f"{STATE}: it has no {wrong[0] if wrong else 'summary'} as a run has it")
        saved = cls(path, told)
        if not all(isinstance(row, dict) and isinstance(row.get("step"), (int, float)) for row in saved.rows()):
            raise ValueError(f"{ROWS}: a row is none of a run's")
        return saved

    @classmethod
    def fault_in(cls, path: Path) -> str | None:
        """Why a folder that verifies is none to go on from; None if it is."""
        try:
            cls.of(path)
        except (OSError, ValueError) as error:
            return str(error)
        return None

    def rows(self) -> list[dict[str, float]]:
        """The metrics so far."""
        return read_lines(self.path / ROWS)

    def rewind(self, run: Path, metrics: bool) -> None:
        """Let a run's `samples.jsonl`, and its `metrics.jsonl` where there is to be one, end where this was saved."""
        samples = run / SAMPLES
        if samples.exists():
            os.truncate(samples, min(self.told["samples"], samples.stat().st_size))
        if metrics:
            write_lines(run / f".{METRICS}", self.rows())
            os.replace(run / f".{METRICS}", run / METRICS)


@dataclass(frozen=True, slots=True)
class Mark:
    """All of the state between two steps that is not in tensors."""

    step: int
    version: int
    values: Mapping[str, Any]
    random: Mapping[str, Any]
    rows: int
    samples: int  # bytes of samples.jsonl


@dataclass(slots=True)
class Keeper:
    """A context around the training of a run; `begin`, then `changing` and `reached` in each step."""

    store: Store
    config: RunConfig
    record: Recorder
    transfer: Transfer
    write_policy: Callable[[Path], None]  # into a checkpoint's folder
    began: float  # time.monotonic() when the run was started, or resumed
    saved: Saved | None = None  # where the run goes on
    extra: State = field(default_factory=State)  # what is to be kept beside the trainee's
    notes: dict[str, Any] = field(default_factory=dict)  # JSON that is to be kept, too
    ranks: Ranks = field(default_factory=Ranks)  # of a trainer whose models are sharded: each writes its own rows
    beside: Callable[[Path, int], None] = lambda folder, step: None  # writes what else there is after a step
    _trainee: Trainee | None = None
    _mark: Mark | None = None  # None: the state is changing, or there is none yet
    _kept: int | None = None  # the step of the newest checkpoint

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Save what there is, where a signal or an explained error ends the run."""
        explained = isinstance(error, (KeyboardInterrupt, SystemExit, *EXPLAINED))
        missing = self._mark is not None and self._mark.step != self._kept
        if explained and self.config.checkpoint.every and missing and self.ranks.listening:
            self._save(self._mark)

    def begin(self, trainee: Trainee, version: int) -> int:
        """Bring what is trained to where the run goes on, or save where it begins; how many steps are done."""
        self._trainee = trainee
        self.ranks.serve(SAVE, lambda folder: self._write_tensors(Path(folder)))
        if self.saved is None:
            seed_python(self.config.seed)  # now that whoever starts workers has drawn from them: Ray does
            self.reached(0, version)
            return 0
        told = self.saved.told
        state = self._state()
        if (self.saved.path / POLICY).is_dir():  # whose weights the policy has already
            state.modules.pop(POLICY, None)
        load_state(state, self.saved.path, told["attributes"], device_of(trainee.policy))
        restore_random(told["random"])
        self._kept = told["step"]
        self._note(told["step"], version)
        return told["step"]

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around what changes the state, up to `reached`: signals wait for its end."""
        with unbroken():
            self._mark = None
            yield

    def reached(self, step: int, version: int) -> None:
        """The state is that after `step`, whole, and `version` is live; save it, if that is due."""
        self._note(step, version)
        every = self.config.checkpoint.every
        if every and (step % every == 0 or step == self.config.steps):
            self._save(self._mark)
        self.ranks.rest()

    def judge(self, metrics: Mapping[str, float]) -> None:
        """The state's evaluation: if it is the best so far, keep the state."""
        self._judge(metrics)
        self.ranks.rest()

    def _judge(self, metrics: Mapping[str, float]) -> None:
        score = next((metrics[name] for name in SCORES if name in metrics), None)
        settings, mark = self.config.checkpoint, self._mark
        if not (settings.every and settings.keep_best) or score is None or not math.isfinite(score) or mark is None:
            return
        best = self.store.best()
        if best is not None and not score > best.score:
            return
        if mark.step in self.store.steps() or self._save(mark):
            self._try(mark.step, lambda: self.store.note_best(Best(mark.step, score)))
            self._rotate()

    def seconds(self) -> float:
        """How long the run has taken, what came before the checkpoint included."""
        return time.monotonic() - self.began + (self.saved.told["seconds"] if self.saved else 0.0)

    def _note(self, step: int, version: int) -> None:
        rows, samples = self.record.position()
        self._mark = Mark(step, version, self._state().values(), random_state(), rows, samples)

    def _state(self) -> State:
        assert self._trainee is not None, "begin() comes first"
        return self.extra | self._trainee.state()

    def _save(self, mark: Mark | None) -> bool:
        """Whether it could be saved; if not, the earlier ones stay, the run goes on, and an alarm says why."""
        assert mark is not None
        with unbroken(), self.record.time("checkpoint"):
            if not self._try(mark.step, lambda: self.store.save(mark.step, lambda folder: self._write(folder, mark))):
                return False
            self._kept = mark.step
            self._rotate()
            return True

    def _try(self, step: int, save: Callable[[], None]) -> bool:
        try:
            save()
        except (OSError, NotFiniteError) as error:
            self.record.alarm("checkpoint", f"step {step} is not saved ({error}); the checkpoints before it stay")
            return False
        return True

    def _rotate(self) -> None:
        """Keep the newest, and the best."""
        best = self.store.best() if self.config.checkpoint.keep_best else None
        kept = self.store.steps()[-self.config.checkpoint.keep :]
        self.store.keep_only([*kept, *([best.step] if best else [])])

    def _write(self, folder: Path, mark: Mark) -> dict[str, Any]:
        """Put a checkpoint into the folder; which files there are flushed and described already."""
        described: dict[str, Any] = {}
        for number, (ok, said) in enumerate(self.ranks.together(SAVE, str(folder))):
            if not ok:
                raise OSError(f"rank {number}: {said}" if self.ranks.count > 1 else said)
            described |= said
        samples = self.store.folder.parent / SAMPLES
        if samples.exists():
            flush(samples)
        told = {
            "step": mark.step,
            "version": mark.version,
            "epoch": self.transfer.epoch,
            "attributes": mark.values,
            "random": mark.random,
            "samples": mark.samples,
            "notes": self.notes,
            "seconds": self.seconds(),
        }
        self.beside(folder, mark.step)
        (folder / STATE).write_text(json.dumps(told) + "\n", encoding="utf-8")
        write_lines(folder / ROWS, self.record.rows[: mark.rows])
        (folder / CONFIG).write_text(json.dumps(plain(self.config), indent=1) + "\n", encoding="utf-8")
        return described

    def _write_tensors(self, folder: Path) -> tuple[bool, Any]:
        """Write what this rank has of all tensors: True and its files, described; False and why that cannot be."""
        assert self._trainee is not None
        files = dict(self._state().files())
        try:
            for name, tensors in {POLICY: weights_of(self._trainee.policy), **files}.items():
                check_finite(name, tensors)
            self._write_policy(folder)
            return True, self._write_files(folder, files)
        except (OSError, NotFiniteError) as error:
            return False, str(error)

    def _write_policy(self, folder: Path) -> None:
        try:
            self.write_policy(folder)
        except Exception as error:  # the Rust halves of safetensors and tokenizers have exceptions of their own
            raise OSError(f"the policy cannot be written: {error}") from error

    def _write_files(self, folder: Path, files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        if self.ranks.count == 1:
            for name, tensors in files.items():
                if tensors:
                    write_tensors(folder / f"{name}.safetensors", tensors)
            return {}
        if self.ranks.host:  # the first host's ranks have all rows, too
            return {}
        number, count = self.ranks.holder, self.ranks.holders
        paths = [write_rows(folder, name, held, number, count) for name, held in files.items() if held]
        return flushed(paths)
