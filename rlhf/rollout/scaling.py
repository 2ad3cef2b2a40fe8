"""More workers, or fewer, while a run goes on: asked for by `rlhf scale`, done between two steps.

    begun       processes start, and come up while steps go on; a worker that runs already is there at once
    joined      one that is up agrees on the weights and gets the newest version; then it is asked for samples
    waiting     where the bytes of that version are gone, it is asked after the next push, which brings it one
    leaving     it is asked for nothing any more; once it samples nothing the transfer goes on without it, and it ends

Whatever becomes of a newcomer, the workers that are there go on. Samples depend on no worker, so no number changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import RunConfig, VllmRolloutConfig
from rlhf.config.scale_rules import check_joining, check_number
from rlhf.ranks.outside import Gathers, Scored
from rlhf.rollout.begun import Begun
from rlhf.rollout.launch import Workers
from rlhf.shell import scale_files
from rlhf.shell.scale_files import Answer, Request
from rlhf.types import Prompt
from transfer.agreement.shown import one_line
from transfer.agreement.wire import RemoteError

if TYPE_CHECKING:
    from transfer import Sender, Transfer

STATUS_S = 2.0  # how long a worker may take to say whether it samples, or has weights
GOING, DONE, FAILED = "going", "done", "failed"


@dataclass(slots=True)
class Change:
    """A request that the run is at."""

    request: Request
    was: int  # workers
    starting: list[tuple[Begun, float]] = field(default_factory=list)  # each with its deadline
    waiting: list[Begun] = field(default_factory=list)
    leaving: list[Begun] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    ends: float = 0.0  # when those that leave have sampled long enough
    said: str = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to be done."""
        return not (self.starting or self.waiting or self.leaving)


@dataclass(frozen=True, slots=True)
class Hooks:
    """What else there is to do, when workers come and go."""

    say: Callable[[str], None]  # a line on the run's screen
    changed: Callable[[int], None]  # there are so many now
    try_out: Callable[[Sender, Sender], None] = lambda new, old: None  # an error: they do not sample alike


class Scaling:
    """Changes a run's workers as it is asked to; in the first rank, in the thread that has started them.

    `senders` is the one list of those that are asked for samples.
    """

    def __init__(self, folder: Path, config: RunConfig, workers: Workers, transfer: Transfer, hooks: Hooks) -> None:
        self._folder, self._config = folder, config
        self._workers, self._transfer, self._hooks = workers, transfer, hooks
        self._senders = workers.senders()
        self._change: Change | None = None
        self._counted = len(self._senders)

    def look(self) -> None:
        """Between two steps, in the thread that brings workers back: begin what is asked for, and go on with it."""
        if self._change is None and scale_files.waiting(self._folder):
            self._take_request()
        if self._change is not None:
            self._go_on(self._change)

    def close(self) -> None:
        """Whoever has asked hears that the run has ended."""
        for _ in range(2):  # the one that the run is at, and one that waits
            if self._change is None and scale_files.waiting(self._folder):
                self._take_request(ending=True)
            if self._change is not None:
                self._answer(self._change, FAILED, "the run has ended meanwhile")

    # --- what is asked for ------------------------------------------------------------------------------------------

    def _take_request(self, ending: bool = False) -> None:
        try:
            request = scale_files.taken(self._folder)
        except FileNotFoundError:  # it was taken back
            return
        except (OSError, ValueError, TypeError) as error:
            self._hooks.say(f"warning: {self._folder / scale_files.REQUEST} is no request: {one_line(str(error))}")
            return
        self._change = change = Change(request, len(self._senders))
        if ending:
            return
        try:
            self._begin(change)
        except Exception as error:  # whatever it is: the run goes on with the workers that it has
            for begun, _ in change.starting:
                self._workers.end(begun)
            self._answer(change, FAILED, f"{_line(error)}; nothing is changed")

    def _begin(self, change: Change) -> None:
        request = change.request
        if request.workers is None:
            check_joining(self._config, request.urls)
            for url in request.urls:
                change.starting.append((self._workers.begin_at(url, request.token), self._workers.deadline()))
            return
        check_number(self._config, request.workers, change.was)
        for _ in range(request.workers - change.was):
            change.starting.append((self._workers.begin(), self._workers.deadline()))
        change.leaving = self._workers.asked()[request.workers :]
        change.ends = time.monotonic() + self._config.rollout.timeout_s
        del self._senders[request.workers :]

    # --- one look at it ---------------------------------------------------------------------------------------------

    def _go_on(self, change: Change) -> None:
        for begun in list(change.waiting):
            if _status(begun).get("version") is not None:  # a push has brought it one
                change.waiting.remove(begun)
                self._ask_from_now_on(begun, change)
        for begun, deadline in list(change.starting):
            if begun.is_up() or self._holds_steps or time.monotonic() > deadline:
                change.starting.remove((begun, deadline))
                self._let_in(begun, deadline, change)
        for begun in list(change.leaving):
            if time.monotonic() > change.ends or not _status(begun).get("serving"):
                change.leaving.remove(begun)
                self._let_go(begun)
        self._tell(change)

    @property
    def _holds_steps(self) -> bool:
        """Whether the next step waits for newcomers: they take a GPU's memory that the trainer uses meanwhile."""
        return isinstance(self._config.rollout, VllmRolloutConfig) and self._config.rollout.sleep_level > 0

    def _let_in(self, begun: Begun, deadline: float, change: Change) -> None:
        try:
            sender = self._workers.connect(begun, deadline)
            serves = self._transfer.join(sender)
        except Exception as error:  # a newcomer's; the others have not heard of it
            change.failures.append(_line(error))
            self._workers.end(begun)
            return
        if serves:
            self._ask_from_now_on(begun, change)
        else:
            change.waiting.append(begun)

    def _ask_from_now_on(self, begun: Begun, change: Change) -> None:
        assert begun.sender is not None
        try:
            self._hooks.try_out(begun.sender, self._senders[0])
        except Exception as error:
            change.failures.append(_line(error))
            self._let_go(begun)
            return
        self._senders.append(begun.sender)

    def _let_go(self, begun: Begun) -> None:
        assert begun.sender is not None
        self._transfer.leave(begun.sender)
        self._workers.end(begun)

    # --- what is said -----------------------------------------------------------------------------------------------

    def _tell(self, change: Change) -> None:
        now = len(self._senders)
        if now != self._counted:
            self._counted = now
            self._hooks.changed(now)
        if not change.is_over:
            counts = {
                "coming up": len(change.starting),
                "waiting for the next version": len(change.waiting),
                "leaving once they have sampled": len(change.leaving),
            }
            said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
            if said != change.said:
                change.said = said
                self._write(Answer(change.request.id, GOING, f"{_workers(now)} now, {said}"))
            return
        line = f"{_workers(now)} now, " + (f"{change.was} before" if now != change.was else "as before")
        self._answer(change, FAILED if change.failures else DONE, "; ".join([line, *change.failures]))

    def _answer(self, change: Change, state: str, line: str) -> None:
        self._change = None
        self._hooks.say(f"rlhf scale: {line}")
        self._write(Answer(change.request.id, state, line))

    def _write(self, said: Answer) -> None:
        try:
            scale_files.answer(self._folder, said)
        except OSError as error:  # a full disk, say: what is said is worth less than what is done
            self._hooks.say(f"warning: rlhf scale is not answered: {error}")


class Scaled:
    """A `Gathers` before which a run's workers change, if that was asked for."""

    def __init__(self, gather: Gathers, scaling: Scaling) -> None:
        self._gather, self._scaling = gather, scaling

    def __call__(self, train: Sequence[Prompt], rows: Sequence[int], step: int) -> Scored:
        """The samples of the step and their rewards."""
        self._scaling.look()
        return self._gather(train, rows, step)

    def settle(self) -> None:
        """As the other does."""
        self._gather.settle()

    def release(self) -> None:
        """As the other does."""
        self._gather.release()

    def write(self, folder: Path, step: int) -> None:
        """As the other does."""
        self._gather.write(folder, step)


def _status(begun: Begun) -> Mapping[str, Any]:
    """What a worker says of itself; nothing if it does not answer."""
    assert begun.sender is not None
    try:
        return begun.sender.call("status", {}, STATUS_S)
    except RemoteError:
        return {}


def _workers(count: int) -> str:
    return f"{count} worker{'' if count == 1 else 's'}"


def _line(error: Exception) -> str:
    """The first line of what an error says, without the end of a log that would follow."""
    text = str(error).strip() or type(error).__name__
    return one_line(text.partition("\n")[0].removesuffix(" ends:").replace("start_timeout_s; ", "start_timeout_s: "))
