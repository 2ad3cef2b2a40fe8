"""What a run measures: timers, means, samples. Where the numbers go is in loggers.py."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.config import RunConfig, VerifierRewardConfig
from rlhf.config.rollout import MOST_LAG
from rlhf.monitor.alarms import OF_EVALUATIONS, OF_STEPS, Watch
from rlhf.monitor.flops import Meter, Row
from rlhf.monitor.lanes import Lanes
from rlhf.monitor.loggers import Logger
from rlhf.monitor.profiler import Profiler
from rlhf.monitor.progress import Stage
from rlhf.reports.lanes import TRAINER
from rlhf.shell.ending import RunError
from rlhf.types import TRUNCATED, RewardReport, Rollouts, Task, Told, gold_scores
from transfer import Transfer
from transfer.agreement.journal import Journal

NO_STEP = ("evaluate", "checkpoint")  # phases whose seconds are part of no step
SAMPLES_PER_STEP = 4  # rows of each step that samples.jsonl keeps
SHOWN = {
    "train/reward": "reward",
    "train/gold": "gold",
    "train/kl": "kl",
    "train/accuracy": "accuracy",
    "eval/greedy_accuracy": "greedy",
}


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are there; None of nothing."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def of_episodes(episodes: Sequence[Told]) -> dict[str, float]:
    """What is counted of a step's episodes: calls of tools, ..., and those that have failed, by class."""
    found: dict[str, float] = {}
    for told in episodes:
        failed = {f"environment/{told.failed}": 1.0} if told.failed else {}
        for name, count in (told.counts | failed).items():
            found[name] = found.get(name, 0.0) + count
    return found


def zero_std(rewards_B: Sequence[float | None], samples_per_prompt: int) -> float | None:
    """The share of prompts whose samples all have one reward; None where a prompt has one sample."""
    if samples_per_prompt < 2:
        return None
    groups = [rewards_B[start : start + samples_per_prompt] for start in range(0, len(rewards_B), samples_per_prompt)]
    return mean([float(len(set(group) - {None}) < 2) for group in groups])


@dataclasses.dataclass(frozen=True, slots=True)
class Outlets:
    """Where a run's numbers go."""

    loggers: Sequence[Logger]
    folder: Path
    bar: Stage
    journal: Journal
    lanes: Lanes = dataclasses.field(default_factory=lambda: Lanes(None))


class Recorder:
    """Collects one step after the other and hands it on; `rows` keeps them all for the report."""

    def __init__(self, outlets: Outlets, transfer: Transfer, config: RunConfig, meter: Meter | None = None) -> None:
        self.outlets = outlets
        self.transfer = transfer
        self.steps, self.evaluations = Watch(OF_STEPS, config), Watch(OF_EVALUATIONS, config)
        self.stop = config.alarms.stop
        self.verified = isinstance(config.reward, VerifierRewardConfig)  # the gold score is what is trained on
        self.rows: list[dict[str, float]] = []
        self.seconds: dict[str, float] = {}
        self.meter = meter  # None: nobody knows what learning computes, or how much the device could
        self.sampled = 0  # tokens of the step, with those of groups that are not learned from
        self.sampling_s: float | None = None  # that drawing them took, if it was not waited for
        self.most_lag = config.rollout.ahead.most_lag(config.prompts_per_step)  # versions that tokens may be behind
        self.ahead: dict[str, float] = {}  # how full the queue is that the step's samples were in
        self.latest: dict[str, float] = {}
        self.lag: dict[str, float] = {}
        self.workers: dict[str, float] = {}  # how many there are, once that has changed
        self.reports: list[RewardReport] = []
        self.warned = False
        self.keeps_samples = True
        self.profiler = Profiler(config.profile.steps, outlets.folder, outlets.bar.bars.say)
        self.raised: dict[str, float] = {}  # alarms of the next row that its metrics do not tell

    def position(self) -> tuple[int, int]:
        """How much there is: rows of metrics, and bytes of `samples.jsonl`."""
        samples = self.outlets.folder / "samples.jsonl"
        return len(self.rows), samples.stat().st_size if samples.exists() else 0

    def restore(self, rows: Sequence[dict[str, float]]) -> None:
        """Go on after these rows of an earlier process; loggers have them already."""
        self.rows = list(rows)
        for row in rows:
            measured = {name: value for name, value in row.items() if not name.startswith("alarm/")}
            (self.steps if "seconds/step" in row else self.evaluations)(measured)
            self.latest |= row

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Add the seconds spent inside to the step's `seconds/<phase>`."""
        if phase not in NO_STEP:
            self.profiler.begin(int(self.rows[-1]["step"]) + 1 if self.rows else 1)
        start = time.monotonic()
        try:
            with self.outlets.bar.bars.pulse.within(phase):
                yield
        finally:
            ended = time.monotonic()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + ended - start
            self.outlets.lanes.note(TRAINER, phase, start, ended)

    def rewarded(self, report: RewardReport) -> None:
        """One of the step's calls of the reward is done; its first exception is said."""
        self.reports.append(dataclasses.replace(report, means=dict(report.means), counts=dict(report.counts)))
        if report.errors and not self.warned:
            self.warned = True
            self.outlets.bar.bars.say(
                f"warning: {report.errors} sample(s) are left out, as are others to come (train/reward_errors): "
                f"{report.error}"
            )

    def _rewarded(self) -> dict[str, float | None]:
        """Means of the reward's parts, and samples by what befell their rewards, over all calls of the step."""
        reports, self.reports = self.reports, []
        names = sorted({name for report in reports for name in report.means})
        means = {f"train/reward/{name}": mean([report.means.get(name) for report in reports]) for name in names}
        errors = [{"errors": report.errors} for report in reports if report.errors is not None]
        befallen: dict[str, float] = {}
        for counts in [*errors, *(report.counts for report in reports)]:
            for name, count in counts.items():
                befallen[f"train/reward_{name}"] = befallen.get(f"train/reward_{name}", 0.0) + count
        return means | befallen

    def took(self, rollouts: Rollouts, version: int) -> None:
        """These samples are about to be learned from; RunError if an older version than the live one sampled any."""
        lags = rollouts.lags(version)
        if not len(lags):
            why = next((f": {told.failed}: {told.why}" for told in rollouts.episodes if told.failed), "")
            raise RunError(f"no environment of the step has come to a first answer{why}")
        if lags.max() > self.most_lag:
            raise RunError(
                f"version {version} is live, and version {rollouts.version} has sampled what is learned from"
                + (f": more than {self.most_lag} versions before (rollout.ahead)" if self.most_lag else "")
            )
        self.lag = {"rollout/lag": int(lags.sum()) / len(lags), "rollout/lag_max": float(lags.max())}
        ages = range(min(self.most_lag, MOST_LAG) + 1) if self.most_lag else ()
        self.lag |= {f"rollout/lag_{age}": float((lags == age).mean()) for age in ages}  # shares of the tokens
        self.outlets.journal.write("consume", version=version, oldest=rollouts.version, seeds=rollouts.seeds)

    def step(
        self, step: int, rollouts: Rollouts, rewards_B: Sequence[float | None], learned: Mapping[str, float], task: Task
    ) -> None:
        """One training step is done."""
        gold_B = list(rewards_B)
        if not self.verified:
            gold_B = gold_scores(task, rollouts)
        rows = len(rollouts.texts)
        metrics: dict[str, float | None] = {
            "train/reward": mean(rewards_B),
            "train/gold": mean(gold_B),
            "train/excluded": float(sum(reward is None for reward in rewards_B)),
            "train/tokens_per_row": rollouts.tokens / rows,
            "train/truncated": sum(c.finish_reason == TRUNCATED for c in rollouts.completions) / rows,
            "train/zero_std": zero_std(rewards_B, rollouts.samples_per_prompt),
            "train/turns": mean([(len(said) + 1) / 2 for said in rollouts.conversations]),
            **of_episodes(rollouts.episodes),
            "rollout/version": float(rollouts.version),
            **self.lag,
            **self.workers,
            **self.ahead,
            **self._rewarded(),
            **{f"train/{name}": value for name, value in learned.items()},
            **{f"transfer/{name}": value for name, value in self.transfer.last.numbers().items()},
            "train/mfu": None if self.meter is None else self.meter.of_step(rollouts, self.seconds["learn"]),
            **self._pace(rollouts.tokens),
        }
        if self.keeps_samples:
            try:
                self._samples(step, rollouts, rewards_B, gold_B)
            except OSError as error:
                self.keeps_samples = False
                self.outlets.bar.bars.say(f"warning: samples.jsonl ends here, and the run goes on: {error}")
        self._log(step, {name: value for name, value in metrics.items() if value is not None}, self.steps)
        self.outlets.bar.advance({SHOWN[name]: self.latest[name] for name in SHOWN if name in self.latest})

    def _pace(self, tokens: float) -> dict[str, float]:
        """Where the step's time went, how many tokens it took a second, and how idle the GPU was; a new step begins."""
        seconds, sampled, sampling_s = self.seconds, self.sampled, self.sampling_s
        self.seconds, self.sampled, self.sampling_s = {}, 0, None
        metrics = {f"seconds/{phase}": value for phase, value in seconds.items()}
        metrics["seconds/step"] = sum(value for phase, value in seconds.items() if phase not in NO_STEP)
        metrics["tokens_per_second"] = tokens / metrics["seconds/step"]
        if sampling_s is not None:
            metrics["rollout/sampling_s"] = sampling_s
        if sampled:
            metrics["tokens_per_second/sampled"] = sampled / (seconds["sample"] if sampling_s is None else sampling_s)
        metrics["tokens_per_second/learned"] = tokens / seconds["learn"]
        return metrics | self._idle(seconds)

    def _idle(self, phases: Iterable[str]) -> dict[str, float]:
        return {f"gpu_idle/{phase}": idle for phase, idle in self.outlets.bar.bars.pulse.idle(phases).items()}

    def learned(self, step: int, learned: Mapping[str, float], rows: Sequence[Row]) -> None:
        """One step that samples nothing is done; `learned` says, beside others, how many tokens of `rows` it saw."""
        metrics = {f"train/{name}": value for name, value in learned.items()}
        if self.meter is not None:
            metrics["train/mfu"] = self.meter.mfu(rows, self.seconds["learn"])
        metrics |= self._pace(learned["tokens"])
        self._log(step, metrics, self.steps)
        self.outlets.bar.advance({SHOWN[name]: self.latest[name] for name in SHOWN if name in self.latest})

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """One evaluation is done; its seconds are part of no step."""
        seconds = self.seconds.pop("evaluate", 0.0)
        idle = self._idle(["evaluate"])
        self._log(step, {**metrics, "seconds/evaluate": seconds, **idle}, self.evaluations)

    def alarm(self, name: str, line: str) -> None:
        """Something has gone wrong beside the metrics; RunError where alarms end the run."""
        self.raised[f"alarm/{name}"] = 1.0
        self._say([f"alarm {name}: {line}"])

    def _log(self, step: int, metrics: dict[str, float], watch: Watch) -> None:
        """Hand the metrics on, with an `alarm/<name>` of 1.0 for each that fires; RunError where alarms end the run."""
        if watch is self.steps:
            self.profiler.end(step)
            self.outlets.lanes.write(step)
        said = watch({"step": step, **metrics})
        metrics = metrics | self.raised | {f"alarm/{name}": 1.0 for name in watch.firing}
        self.raised = {}
        self.latest |= metrics
        self.rows.append({"step": step, **metrics})
        for logger in self.outlets.loggers:
            logger.log(step, metrics)
        self._say([f"alarm {name}, step {step}: {line}" for name, line in said.items()])

    def _say(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.outlets.bar.bars.say(line)
        if lines and self.stop:
            raise RunError(f"{lines[0]} (alarms.stop=true ends the run)")

    def _samples(
        self, step: int, rollouts: Rollouts, rewards_B: Sequence[float | None], gold_B: Sequence[float | None]
    ) -> None:
        stride = max(1, len(rollouts.texts) // SAMPLES_PER_STEP)
        with open(self.outlets.folder / "samples.jsonl", "a", encoding="utf-8") as file:
            for b in range(0, len(rollouts.texts), stride):
                completion = rollouts.completions[b]
                row: dict[str, Any] = {
                    "step": step,
                    "prompt": rollouts.prompts_B[b].text,
                    "answer": rollouts.texts[b],
                    "reward": rewards_B[b],
                    "gold": gold_B[b],
                    "finish_reason": completion.finish_reason,
                    "version": completion.versions[0],
                }
                if rollouts.conversations:
                    row["conversation"] = rollouts.conversations[b]
                file.write(json.dumps(row) + "\n")
