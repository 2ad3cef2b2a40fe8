"""Alarms: what the metrics of a step or an evaluation say has gone wrong, in one line with what to change.

An alarm is a function of the metrics so far (the newest last) and of the run's dials: no state, no I/O, no torch.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlhf.config.algo import AlgoConfig

if TYPE_CHECKING:
    from rlhf.config import RunConfig

Rows = Sequence[Mapping[str, float]]
JUMP_WINDOW = 20  # steps whose median a jump of the KL is measured by
JUMP_FLOOR = 0.05  # nats a token; below, no KL is a jump: it starts at 0, and grows fast at first
NEAR_LIMIT = 0.75  # share of rollout.max_new_tokens from which rows are near it
QUIET = 10  # rows of metrics in which an alarm must not fire, before it speaks again
LASTING = 5  # steps in a row, before what may happen once is an alarm
EVALUATIONS = 6  # after gold's best, before they tell a trend: two in each third


# --- steps ------------------------------------------------------------------------------------------------------------


def no_signal(rows: Rows, run: RunConfig) -> str | None:
    """Most prompts' samples have equal rewards, which an algorithm that compares them learns nothing from."""
    most, share = run.alarms.no_signal, rows[-1].get("train/zero_std")
    compares = isinstance(run.algo, AlgoConfig) and run.algo.group_based
    if most is None or share is None or not compares or not share > most:
        return None
    return (
        f"train/zero_std is {share:.3g}, the share of prompts whose samples all have one reward (healthy: at most "
        f"{most:g}); raise samples_per_prompt or rollout.temperature, or set algo.dynamic_sampling"
    )


def gradient(rows: Rows, run: RunConfig) -> str | None:
    """The policy's gradient is zero, or an update was skipped because its loss or a gradient was not finite."""
    least, row = run.alarms.gradient, rows[-1]
    if least is None:
        return None
    norm, skipped = row.get("train/grad_norm", math.inf), row.get("train/skipped_updates", 0.0)
    if skipped > 0:
        return (
            f"train/skipped_updates is {skipped:.3g}, the share of the step's updates whose loss or gradient was not "
            f"finite (healthy: 0); lower optim.lr, or look at the rewards"
        )
    if not norm <= least:
        return None
    return (
        f"train/grad_norm is {norm:.3g} (healthy: more than {least:g}), so that nothing is learned; look at the "
        f"rewards, or raise samples_per_prompt or rollout.temperature"
    )


def nan(rows: Rows, run: RunConfig) -> str | None:
    """Metrics are NaN or infinite, or rewards were, whose samples are left out."""
    most = run.alarms.nan
    lost = rows[-1].get("train/reward_not_finite", rows[-1].get("eval/reward_not_finite", 0.0))
    if most is not None and lost > most:
        return (
            f"{lost:.0f} rewards are NaN or infinite, and their samples left out (healthy: finite numbers, or None); "
            "look at what the reward computes"
        )
    broken = [name for name, value in rows[-1].items() if not math.isfinite(value)]
    if most is None or len(broken) <= most:
        return None
    names = ", ".join(f"{name} is {rows[-1][name]}" for name in broken[:3])
    more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    return f"{names}{more} (healthy: finite numbers); lower optim.lr, or look at the rewards"


def kl(rows: Rows, run: RunConfig) -> str | None:
    """The policy runs away from the reference: a KL above the bound, or far above that of the steps before."""
    value = rows[-1].get("train/kl")
    if value is None:
        return None
    do = "raise algo.kl_coef or lower optim.lr"
    most, jump = run.alarms.kl, run.alarms.kl_jump
    if most is not None and value > most:
        return f"train/kl is {value:.3g} nats a token (healthy: at most {most:g}); {do}"
    before = [row["train/kl"] for row in rows[-1 - JUMP_WINDOW : -1] if "train/kl" in row]
    if jump is None or len(before) < JUMP_WINDOW or value <= JUMP_FLOOR or not value > jump * statistics.median(before):
        return None
    return (
        f"train/kl is {value:.3g} nats a token, and its median of the {JUMP_WINDOW} steps before "
        f"{statistics.median(before):.3g} (healthy: at most {jump:g} times that); {do}"
    )


def entropy(rows: Rows, run: RunConfig) -> str | None:
    """The policy has become nearly deterministic, so that samples of a prompt hardly differ."""
    least, value, start = run.alarms.entropy, rows[-1].get("train/entropy"), _first(rows, "train/entropy")
    if least is None or value is None or start is None or not value < least * start:
        return None
    return (
        f"train/entropy is {value:.3g} nats a token, and was {start:.3g} at first (healthy: at least {least:.0%} of "
        f"that); raise algo.entropy_coef or algo.kl_coef, or lower optim.lr"
    )


def truncated(rows: Rows, run: RunConfig) -> str | None:
    """The length limit cuts most rows."""
    most, share = run.alarms.truncated, rows[-1].get("train/truncated")
    if most is None or share is None or not share > most:
        return None
    return (
        f"train/truncated is {share:.3g}, the share of rows that the length limit has cut (healthy: at most {most:g}); "
        f"raise rollout.max_new_tokens ({run.rollout.max_new_tokens}), or set algo.overlong_buffer"
    )


def length(rows: Rows, run: RunConfig) -> str | None:
    """Rows have become several times as long, and near the limit."""
    most, value, start = run.alarms.length, rows[-1].get("train/tokens_per_row"), _first(rows, "train/tokens_per_row")
    limit = run.row_tokens
    if most is None or value is None or start is None or value < NEAR_LIMIT * limit or not value > most * start:
        return None
    return (
        f"train/tokens_per_row is {value:.3g}, and was {start:.3g} at first (healthy: at most {most:g} times that, or "
        f"far from rollout.max_new_tokens, {limit}); set algo.overlong_buffer, or raise algo.kl_coef"
    )


def mismatch(rows: Rows, run: RunConfig) -> str | None:
    """Workers and trainer give the samples' tokens different log-probs, though their weights are the same."""
    most, value = run.rollout.mismatch_alarm, rows[-1].get("train/mismatch")
    if most is None or value is None or not value > most or rows[-1].get("rollout/lag", 0.0) > 0:
        return None
    return (
        f"log-probs of workers and trainer differ by {value:.3g} nats a token (healthy: at most "
        f"rollout.mismatch_alarm={most:g}); set rollout.dtype=null, or algo.correction"
    )


def ess(rows: Rows, run: RunConfig) -> str | None:
    """Few of the samples count: the policy has left what sampled them, step after step.

    Half is where particle filters sample anew (Doucet and Johansen, 2009); one token of a large weight is no trend.
    """
    least, values = run.alarms.ess, _lately(rows, "train/ess")
    if least is None or len(values) < LASTING or not max(values) < least:
        return None
    ahead = run.rollout.ahead.lag
    do = f"lower rollout.ahead.lag ({ahead}) or optim.lr" if ahead else "set rollout.dtype=null, or algo.correction"
    return (
        f"train/ess is {values[-1]:.3g}, the share of the samples that counts by their weights, and has been below "
        f"{least:g} for {LASTING} steps (healthy: at least {least:g}); {do}"
    )


def lag(rows: Rows, run: RunConfig) -> str | None:
    """What is learned from is older than is wanted, step after step."""
    most, values = run.alarms.lag, _lately(rows, "rollout/lag")
    if most is None or len(values) < LASTING or not min(values) > most:
        return None
    return (
        f"rollout/lag is {values[-1]:.3g} versions, and has been above {most:g} for {LASTING} steps (healthy: at most "
        f"alarms.lag={most:g}); lower rollout.ahead.lag ({run.rollout.ahead.lag})"
    )


# --- evaluations ------------------------------------------------------------------------------------------------------


def overoptimisation(rows: Rows, run: RunConfig) -> str | None:
    """The reward that is trained on rises while the gold reward falls (arXiv:2210.10760).

    Both by more than `alarms.overoptimisation` standard errors, from the first to the last third of the evaluations
    after gold's best; that one itself is the highest by luck, too.
    """
    errors, names = run.alarms.overoptimisation, ("eval/reward", "eval/gold")
    there = [row for row in rows if all(name in row for name in names)]
    if errors is None or not there:
        return None
    best = max(range(len(there)), key=lambda index: there[index]["eval/gold"])
    window = there[best + 1 :]
    if len(window) < EVALUATIONS:
        return None
    (rise, rise_error), (fall, fall_error) = (_change([row[name] for row in window]) for name in names)
    if not (rise > errors * rise_error and -fall > errors * fall_error):
        return None
    return (
        f"eval/reward has risen by {rise:.3g} and eval/gold fallen by {-fall:.3g} since gold's best, "
        f"{there[best]['eval/gold']:.3g} at step {there[best]['step']:g} (healthy: both rise, or neither by more than "
        f"{errors:g} standard errors); raise algo.kl_coef, lower steps, or give the reward model more pairs "
        f"(reward.prompts)"
    )


def _change(values: Sequence[float]) -> tuple[float, float]:
    """Mean of the last third less that of the first, and its standard error from neighbours' differences."""
    third = len(values) // 3
    variance = statistics.fmean((after - before) ** 2 for before, after in itertools.pairwise(values)) / 2
    return statistics.fmean(values[-third:]) - statistics.fmean(values[:third]), math.sqrt(2 * variance / third)


def _lately(rows: Rows, name: str) -> list[float]:
    """The metric in those of the last steps that have measured it."""
    return [row[name] for row in rows[-LASTING:] if name in row]


def _first(rows: Rows, name: str) -> float | None:
    return next((row[name] for row in rows if name in row), None)


# --- a run's alarms ---------------------------------------------------------------------------------------------------

Alarm = Callable[[Rows, "RunConfig"], str | None]
OF_STEPS: dict[str, Alarm] = {
    alarm.__name__: alarm for alarm in (no_signal, gradient, nan, kl, entropy, truncated, length, mismatch, ess, lag)
}
OF_EVALUATIONS: dict[str, Alarm] = {alarm.__name__: alarm for alarm in (nan, overoptimisation)}


@dataclass(slots=True)
class Watch:
    """Alarms over a history: call it with each new row of metrics."""

    alarms: Mapping[str, Alarm]
    run: RunConfig
    rows: list[Mapping[str, float]] = field(default_factory=list)
    firing: dict[str, str] = field(default_factory=dict)  # by name, what each says of the newest row
    fired: dict[str, int] = field(default_factory=dict)  # by name, how many rows there were when it fired last

    def __call__(self, row: Mapping[str, float]) -> dict[str, str]:
        """What those alarms say that fire, and did not for the `QUIET` rows before."""
        self.rows.append(row)
        now = len(self.rows)
        said = {name: alarm(self.rows, self.run) for name, alarm in self.alarms.items()}
        self.firing = {name: line for name, line in said.items() if line is not None}
        new = {name: line for name, line in self.firing.items() if now - self.fired.get(name, -QUIET) > QUIET}
        self.fired |= dict.fromkeys(self.firing, now)
        return new
