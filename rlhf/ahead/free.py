"""A queue of groups: workers draw while the trainer learns, and each group is learned from when its turn comes.

    worker 0     draws groups of the prompts that have a slot ...         slots.py says which
    worker 1     ...
    trainer      takes P whole groups, learns, pushes, and gives their slots back

A request to a worker, and the reward of what it answers, is a thread of its own, which then asks for the next. The
trainer's thread brings back workers that have died, as only the one that started them may: between two steps, or while
it waits for groups. Weights are pushed while requests run; `rollout.in_flight` says whether those end first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

from rlhf.ahead import kept
from rlhf.ahead.shares import Shares, Unit
from rlhf.ahead.slots import Slot, Slots
from rlhf.ahead.stream import Stream
from rlhf.ahead.together import Together
from rlhf.config import RunConfig
from rlhf.episodes.requests import MOST_REQUESTS
from rlhf.gather import Gather, Scored, groups_of, joined
from rlhf.monitor.metrics import Recorder
from rlhf.shell.ending import RunError
from rlhf.types import Prompt, RewardReport, Rollouts
from transfer import Sender
from transfer.agreement.wire import RemoteError
from transfer.config import InFlight

LOOK_S = 1.0  # until whoever waits looks again: signals get through
SLOW_REQUESTS = 8  # of rows that may wait for environments


class Seeded(Protocol):
    """What samples at one worker."""

    def sample_seeded(
        self, prompts: Sequence[Prompt], seeds: list[int], n: int, temperature: float, firsts: Sequence[int] | None
    ) -> Rollouts:
        """Draw n answers a prompt, each prompt with a seed of its own, from its sample number `firsts` on; None: 0."""


class Workers(Protocol):
    """Who is asked; others at another time."""

    @property
    def senders(self) -> Sequence[Sender]: ...
    def recover(self, sender: Sender) -> bool: ...
    def recoveries(self, sender: Sender) -> int: ...


@dataclass(frozen=True, slots=True)
class Load:
    """How many requests a worker has at once, and how many prompts each of them has; at most."""

    requests: int
    prompts: int

    @classmethod
    def of(cls, config: RunConfig, workers: int) -> Load:
        """Small requests where rows come and go in the worker's batch, else one with the worker's share of a step.

        Some, where rows may wait for environments, while others are drawn.
        """
        size = config.prompts_per_step
        requests = MOST_REQUESTS if config.rollout.continuous else SLOW_REQUESTS if config.task.waits else 1
        return cls(requests, -(-size // (requests * workers)))


@dataclass(slots=True)
class Desk:
    """What the trainer knows of one worker."""

    requests: int = 0  # that run
    last: int = 0  # when it was asked last, by the number of the request
    lost: RemoteError | None = None  # why a request has failed, until the worker is brought back
    recoveries: int = 0  # of the worker, when that request began
    pushes: int = 0  # that there had been by then


@dataclass(frozen=True, slots=True)
class Request:
    """Prompts that a worker is asked for."""

    sender: Sender
    desk: Desk
    units: Sequence[Unit]
    recoveries: int  # of the worker, when it was asked
    pushes: int


@dataclass(slots=True)
class Since:
    """What has come since the last step took its groups."""

    began: float = field(default_factory=time.monotonic)
    tokens: int = 0
    kept: int = 0  # prompts
    left_out: int = 0  # prompts
    rewards: list[float | None] = field(default_factory=list)  # of those that are left out
    reports: list[RewardReport] = field(default_factory=list)  # of requests of which all are


class Free:
    """`gather` for the steps one after the other, from a queue; to be closed. In the first rank alone."""

    def __init__(
        self,
        gather: Gather,
        record: Recorder,
        workers: Workers,
        sampler_of: Callable[[Sender], Seeded],
        stream: Stream,
        slots: Slots,
    ) -> None:
        self._gather, self._record = gather, record
        self._workers, self._sampler_of = workers, sampler_of
        self._stream, self._slots = stream, slots
        self._rewarded = Together(gather.rewarded)
        spread = len(workers.senders) if gather.config.rollout.ahead.spread else 1
        self._shares = Shares.of(gather.config.samples_per_prompt, spread)
        self._changed = threading.Condition()  # guards all below, and the slots
        self._desks: dict[Sender, Desk] = {}
        self._pushes = self._requests = 0
        self._error: BaseException | None = None
        self._ended = False
        self._holds_back = False  # requests, until new weights are there
        self._since = Since()

    def __call__(self, train: Sequence[Prompt], rows: Sequence[int], step: int) -> Scored:
        """The groups that are next, once they are whole, and a reward for each of their samples."""
        with self._record.time("sample"):
            taken, since = self._taken(step)
        reports = [*since.reports, *(slot.report for slot in taken if slot.report is not None)]
        for report in reports:
            self._record.rewarded(report)
        rollouts, rewards = joined([slot.group for slot in taken if slot.group is not None])
        self._check_rewards([*since.rewards, *rewards], reports)
        return rollouts, rewards

    def settle(self) -> None:
        """Before new weights come: mend what has failed, and wait for what runs, if they are to wait for that."""
        with self._changed:
            self._mend()
            self._holds_back = self._gather.config.rollout.in_flight is InFlight.wait
            while self._holds_back and any(desk.requests for desk in self._desks.values()):
                self._changed.wait(LOOK_S)
                self._mend()

    def release(self) -> None:
        """The step's weights are live: its slots go to the prompts that come next."""
        with self._changed:
            self._pushes += 1
            self._holds_back = False
            self._slots.release()
            self._feed()

    def write(self, folder: Path, step: int) -> None:
        """Into a checkpoint after `step`: where the stream is, and the groups that are not learned from yet."""
        with self._changed:
            said = kept.told_slots(self._slots, self._stream.prompts)
        kept.written(folder, said)

    def close(self) -> None:
        """Draw no more; whoever waits for a worker that is about to end finds that."""
        with self._changed:
            self._ended = True

    # --- the trainer's thread, with `_changed` ------------------------------------------------------------------------

    def _taken(self, step: int) -> tuple[Sequence[Slot], Since]:
        with self._changed:
            self._slots.admit()
            while True:
                self._mend()
                self._feed()
                if (taken := self._slots.take()) is not None:
                    break
                self._check_left_out(step)
                self._changed.wait(LOOK_S)
            now, since = time.monotonic(), self._since
            self._since = Since(now)
            self._record.sampled, self._record.sampling_s = since.tokens, now - since.began
            self._record.ahead = {
                "rollout/queue": float(self._slots.whole),
                "rollout/running": float(self._slots.running),
            }
            return taken, since

    def _check_rewards(self, rewards: Sequence[float | None], reports: Sequence[RewardReport]) -> None:
        self._gather.usable(rewards, next((each for each in reports if each.error), None))

    def _check_left_out(self, step: int) -> None:
        """Too many are as many as a step may leave out, for each that was kept meanwhile: the queue may be long."""
        batches, since = self._gather.config.rl.dynamic_sampling, self._since
        size = max(self._slots.size, since.kept)
        if batches and since.left_out > batches * size:
            self._check_rewards(since.rewards, since.reports)
            raise RunError(
                f"step {step}: of {since.left_out} prompts all samples have one reward, and a step leaves out "
                f"{batches} x {size} at most: the task is too easy or too hard for the policy by now; raise "
                f"algo.dynamic_sampling ({batches}) or samples_per_prompt, or set algo.dynamic_sampling=0"
            )

    def _mend(self) -> None:
        """Bring workers back that have died; whatever else has failed is raised."""
        if self._error is not None:
            raise self._error
        for sender, desk in list(self._desks.items()):
            if desk.lost is None:
                continue
            if sender not in self._workers.senders:  # it has left, and others take its prompts
                del self._desks[sender]
                continue
            if self._workers.recoveries(sender) == desk.recoveries:  # else an evaluation has brought it back
                self._changed.release()  # others go on meanwhile
                try:
                    back = self._workers.recover(sender)
                finally:
                    self._changed.acquire()
                if not back and desk.pushes == self._pushes:  # else the push has
                    raise desk.lost
            desk.lost = None

    # --- any thread, with `_changed` ----------------------------------------------------------------------------------

    def _feed(self) -> None:
        """Ask workers for the prompts that wait, the least busy first."""
        if self._rests:
            return
        senders = self._workers.senders
        load = Load.of(self._gather.config, len(senders))
        desks = {sender: self._desks.setdefault(sender, Desk()) for sender in senders}
        there = [sender for sender, desk in desks.items() if desk.lost is None]
        while there and not self._rests:
            units = list(islice(self._shares.waiting(self._slots.waiting()), load.prompts))
            if not units:
                return
            sender = min(there, key=lambda each: (desks[each].requests, desks[each].last))
            desk = desks[sender]
            if desk.requests == load.requests:
                return
            self._shares.ask(units)
            self._requests += 1
            desk.requests, desk.last = desk.requests + 1, self._requests
            request = Request(sender, desk, units, self._workers.recoveries(sender), self._pushes)
            self._start(request)

    @property
    def _rests(self) -> bool:
        return self._ended or self._holds_back or self._error is not None

    def _start(self, request: Request) -> None:
        try:
            threading.Thread(target=self._draw, args=(request,), name="ahead", daemon=True).start()
        except RuntimeError as error:
            request.desk.requests -= 1
            why = f"{request.sender.name}: no thread for a further request ({error}): raise ulimit -u, or lower"
            self._failed(request, RunError(f"{why} rollout.ahead.lag or prompts_per_step"))

    def _failed(self, request: Request, error: BaseException) -> None:
        self._shares.give_back(request.units)
        desk = request.desk
        if not isinstance(error, RemoteError):
            self._error = self._error or error
        elif desk.lost is None and request.recoveries == self._workers.recoveries(request.sender):
            desk.lost, desk.recoveries, desk.pushes = error, request.recoveries, request.pushes

    def _drawn(self, slots: Sequence[Slot], scored: Scored, report: RewardReport | None) -> None:
        since, kept = self._since, list[Slot]()
        for slot, group in zip(slots, groups_of(scored), strict=True):
            slot.shares = {}
            slot.group = group
            if self._gather.config.rl.dynamic_sampling and not group.has_signal:
                self._slots.leave_out(slot)
                since.left_out += 1
                since.rewards += group.rewards
            else:
                kept.append(slot)
        since.kept += len(kept)
        if kept:
            kept[0].report = report
        elif report is not None:
            since.reports.append(report)
        self._slots.admit()

    # --- a request's thread -------------------------------------------------------------------------------------------

    def _draw(self, request: Request) -> None:
        sampling = True
        try:
            rollouts = self._sampled(request)
            with self._changed:
                request.desk.requests -= 1
                sampling = False
                self._since.tokens += rollouts.tokens
                whole = self._shares.came(request.units, groups_of((rollouts, [None] * len(rollouts.texts))))
                self._feed()
                self._changed.notify_all()
            if whole:
                rollouts, _ = joined([group for _, group in whole])
                rewards, report = self._rewarded(rollouts)
                with self._changed:
                    self._drawn([slot for slot, _ in whole], (rollouts, list(rewards)), report)
        except BaseException as error:  # the trainer's thread raises it, or brings the worker back
            with self._changed:
                request.desk.requests -= sampling
                self._failed(request, error)
        with self._changed:
            self._feed()
            self._changed.notify_all()

    def _sampled(self, request: Request) -> Rollouts:
        config = self._gather.config
        with self._changed:
            asked = [self._stream[slot.index] for slot, _ in request.units]
        sampler = self._sampler_of(request.sender)
        prompts, seeds = [prompt for prompt, _ in asked], [seed for _, seed in asked]
        firsts = [first for _, first in request.units]
        return sampler.sample_seeded(prompts, seeds, self._shares.rows, config.rollout.temperature, firsts)
