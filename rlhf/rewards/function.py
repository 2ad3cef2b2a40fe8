"""The user's function, whose exceptions cost samples, not the run."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from rlhf.config.model import AUTO
from rlhf.rewards import awaiting
from rlhf.rewards.calling import Form
from rlhf.rewards.columns import names
from rlhf.rewards.failures import RAISED, TIMED_OUT, as_rewards, lost, refuse_no_numbers
from rlhf.rewards.in_time import in_time
from rlhf.rewards.own_function import OwnFunction, imported
from rlhf.rewards.samples import Rewards, Samples
from rlhf.shell.apart import LateError, RaisedError
from rlhf.shell.ending import RunError
from rlhf.types import Prompt, RewardReport
from transfer.agreement.shown import one_line

LONGEST_ERROR = 300  # characters of an exception that are shown, on one line
TIMEOUT_S = 300.0

Told = list[tuple[float | None, bool]]  # of each sample its reward, and whether the function itself has said None


class FunctionReward:
    """The user's function of prompts, completions and columns, each a list with one value a sample (calling.py).

    Where it raises, it is called again sample by sample; those that raise again have no reward and are counted in
    `report`, as are NaN, infinity and what is no number. Where it takes longer than `timeout_s`, its samples have no
    reward. An `async def` runs beside other parts of a sum; with `process` the function is called in a process of its
    own, which is killed at the deadline. ValueError if it returns another number of rewards. It is imported by
    its name, if it is not given.
    """

    def __init__(
        self,
        name: str,
        timeout_s: float = TIMEOUT_S,
        messages: Any = AUTO,
        process: bool = False,
        function: Callable[..., Any] | None = None,
    ) -> None:
        self.name = name
        self.timeout_s = timeout_s
        self.function = imported(name) if function is None else function
        self.apart = OwnFunction(name) if process else None
        self.messages = messages
        self.form = Form.of(self.function, messages)
        self.report = RewardReport()
        self.abstained: list[bool] = []  # of the last call: samples of which the function itself has said None

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Rewards:
        return self.begin(Samples(prompts, answers))()

    def begin(self, samples: Samples) -> Callable[[], Rewards]:
        """Start on these samples, if the function is asynchronous; what is returned gives their rewards."""
        self.report = RewardReport(errors=0)
        return partial(self._ended, samples, self._started(samples))

    def close(self) -> None:
        """End the process of its own, if there is one; the next call starts another."""
        if self.apart is not None:
            self.apart.close()

    def check(self, prompts: Sequence[Prompt], answer: str = "") -> None:
        """ValueError if the function does not take what it will be given, or returns no reward for one sample.

        Exceptions of that trial cost samples, as later ones do, and are not told yet.
        """
        self.check_columns(names(prompts))
        trial = Samples(prompts[:1], [answer], [list(prompts[0].ids)])
        self.begin(trial)()
        refuse_no_numbers(self.report)
        if self.report.errors and "signal only works in main thread" in self.report.error:
            raise ValueError(f"{self.report.error}: set reward.process=true, where it has a main thread of its own")
        if self.report.errors and self.messages == AUTO and prompts[0].messages:
            self._try_otherwise(trial, self.report.error)

    def check_columns(self, there: Sequence[str]) -> None:
        """ValueError if the function does not take a task's columns."""
        try:
            self.form.check(self.function, there)
        except TypeError as error:
            raise ValueError(
                f"reward.function={self.name} is called as {self.form.shown}, and the task's columns "
                f"are {', '.join(there) or 'none'}: {error}; change its arguments, or rename the column in the file"
            ) from None

    def _try_otherwise(self, trial: Samples, error: str) -> None:
        """ValueError if the function raises on what it is given of conversations, and not on their other form."""
        ours, self.form = self.form, replace(self.form, messages=not self.form.messages)
        try:
            self.begin(trial)()
            if not self.report.errors:
                kinds = ("texts", "messages") if self.form.messages else ("messages", "texts")
                raise ValueError(
                    f"{error}: it was given {kinds[0]}, and takes {kinds[1]}: set "
                    f"reward.messages={str(self.form.messages).lower()}"
                )
        finally:
            self.form = ours

    def _started(self, samples: Samples) -> Callable[[], Any]:
        """What gives the function's answer: where it is asynchronous, it begins now, else when it is asked for."""
        given, named = self.form.arguments(samples)
        if self.apart is not None:
            return partial(self.apart, given, named, self.timeout_s)
        if inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(type(self.function).__call__):
            return awaiting.begun(self.function(*given, **named), self.timeout_s)
        return partial(self._called, given, named)

    def _called(self, given: Sequence[Any], named: dict[str, Any]) -> Any:
        answer = in_time(partial(self.function, *given, **named), self.timeout_s)
        return awaiting.begun(answer, self.timeout_s)() if inspect.isawaitable(answer) else answer

    def _ended(self, samples: Samples, answer: Callable[[], Any]) -> Rewards:
        told = self._rewarded(samples, answer)
        self.abstained = [said_none for _, said_none in told]
        return [reward for reward, _ in told]

    def _rewarded(self, samples: Samples, answer: Callable[[], Any]) -> Told:
        try:
            given = answer()
        except LateError:
            what = f"has not answered within reward.timeout_s={self.timeout_s:g} seconds: raise it"
            return self._lost(samples, TIMED_OUT, what)
        except RunError:
            raise  # too many calls hang
        except Exception as error:
            if len(samples) > 1:
                alone = [(sample, self._started(sample)) for sample in samples.each()]
                return [told for sample, asked in alone for told in self._rewarded(sample, asked)]
            return self._lost(samples, RAISED, f"raised {_told(error)}")
        if given is None:  # of all of them, as of a function that is for other rows
            return [(None, True)] * len(samples)
        rewards = as_rewards(f"reward.function={self.name}", given, len(samples), self.report)
        return [(reward, value is None) for reward, value in zip(rewards, given, strict=True)]

    def _lost(self, samples: Samples, what: str, error: str) -> Told:
        lost(self.report, what, len(samples), f"reward.function={self.name} {error}")
        return [(None, False)] * len(samples)


def _told(error: Exception) -> str:
    """An exception, and where it was raised."""
    if isinstance(error, RaisedError):
        return one_line(str(error), LONGEST_ERROR)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {one_line(str(error), LONGEST_ERROR)} ({place.filename}:{place.lineno})"
