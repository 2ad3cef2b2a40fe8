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
from rlhf.rewards.failures import as_rewards
from rlhf.rewards.samples import Rewards, Samples
from rlhf.shell.own_modules import import_own, looked_in
from rlhf.types import Prompt, RewardReport
from transfer.agreement.shown import one_line

LONGEST_ERROR = 300  # characters of an exception that are shown, on one line
TIMEOUT_S = 60.0


class FunctionReward:
    """The user's function of prompts, completions and columns, each a list with one value a sample (calling.py).

    Where it raises, it is called again sample by sample; those that raise again have no reward and are counted in
    `report`, as are NaN and infinity. An `async def` runs beside other parts of a sum; where it takes longer than
    `timeout_s`, its samples have no reward. ValueError if what it returns is no list of rewards.
    """

    def __init__(self, name: str, timeout_s: float = TIMEOUT_S, messages: Any = AUTO) -> None:
        self.name = name
        self.timeout_s = timeout_s
        self.function = _import(name)
        self.messages = messages
        self.form = Form.of(self.function, messages)
        self.report = RewardReport()

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Rewards:
        return self.begin(Samples(prompts, answers))()

    def begin(self, samples: Samples) -> Callable[[], Rewards]:
        """Start on these samples, if the function is asynchronous; what is returned gives their rewards."""
        self.report = RewardReport(errors=0)
        return partial(self._rewarded, samples, self._started(samples))

    def check(self, prompts: Sequence[Prompt], answer: str = "") -> None:
        """ValueError if the function does not take what it will be given, or returns no reward for one sample.

        Exceptions of that trial cost samples, as later ones do, and are not told yet.
        """
        self.check_columns(names(prompts))
        trial = Samples(prompts[:1], [answer], [list(prompts[0].ids)])
        self.begin(trial)()
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
        if inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(type(self.function).__call__):
            return awaiting.begun(self.function(*given, **named), self.timeout_s)
        return partial(self._called, given, named)

    def _called(self, given: Sequence[Any], named: dict[str, Any]) -> Any:
        answer = self.function(*given, **named)
        return awaiting.begun(answer, self.timeout_s)() if inspect.isawaitable(answer) else answer

    def _rewarded(self, samples: Samples, answer: Callable[[], Any]) -> Rewards:
        try:
            given = answer()
        except awaiting.LateError:
            self._count(len(samples), f"has not answered within reward.timeout_s={self.timeout_s:g} seconds: raise it")
            return [None] * len(samples)
        except Exception as error:
            if len(samples) > 1:
                alone = [(sample, self._started(sample)) for sample in samples.each()]
                return [reward for sample, asked in alone for reward in self._rewarded(sample, asked)]
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = one_line(str(error), LONGEST_ERROR)
            self._count(1, f"raised {type(error).__name__}: {text} ({place.filename}:{place.lineno})")
            return [None]
        return as_rewards(f"reward.function={self.name}", given, len(samples), self.report)

    def _count(self, samples: int, what: str) -> None:
        self.report.errors = (self.report.errors or 0) + samples
        self.report.error = f"reward.function={self.name} {what}"


def _import(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(import_own(module), attribute)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(
            f"reward.function={name} cannot be imported, {looked_in()}: {type(error).__name__}: {error}"
        ) from error
    if not callable(function):
        raise ValueError(f"reward.function={name} must name a function (got {type(function).__name__})")
    return function
