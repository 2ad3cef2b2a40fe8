"""What a run has left in its folder, for the program that has run it; nothing is read before it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.reports.run_folder import json_lines
from rlhf.reports.summary import read_summary

SHOWN = {  # numbers of a summary, with what they are called
    "reward": "reward",
    "gold": "gold reward (held-out)",
    "greedy_accuracy": "greedy accuracy",
    "pair_accuracy": "accuracy on held-out pairs",
}


class Result:
    """A run that has ended; `Result(folder)` is that of any run's folder, also one of the command line."""

    def __init__(self, folder: str | Path, policy: Any = None) -> None:
        self.folder = Path(folder)
        self.policy = policy  # the object that the program gave, trained; None: it gave none
        self._metrics: list[dict[str, float]] | None = None
        self._summary: dict[str, Any] | None = None

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The numbers of each step, with `step` (docs/algorithms.md says what they are)."""
        if self._metrics is None:
            self._metrics = json_lines(self.folder / "metrics.jsonl")
        return self._metrics

    @property
    def summary(self) -> dict[str, Any]:
        """The numbers of the table that a run ends with."""
        if self._summary is None:
            self._summary = read_summary(self.folder)
        return self._summary

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Prompts and answers of the run, with reward and gold reward."""
        return json_lines(self.folder / "samples.jsonl")

    @property
    def policy_folder(self) -> Path:
        """Where the policy is, for `from_pretrained`."""
        return self.folder / "policy"

    def __repr__(self) -> str:
        summary = self.summary
        lines = [f"run {summary.get('status', 'unfinished')}, {summary.get('steps', 0):g} steps: {self.folder}"]
        for name, told in SHOWN.items():
            if f"{name}_end" in summary:
                lines.append(f"  {told:<27}{summary[f'{name}_start']:8.3f} -> {summary[f'{name}_end']:.3f}")
        if "kl_end" in summary:
            lines.append(f"  {'KL, nats a token':<27}{'':8} -> {summary['kl_end']:.4f}")
        alarms = [name.partition("/")[2] for name in summary if name.startswith("alarm/")]
        return "\n".join([*lines, *([f"  alarms: {', '.join(alarms)}"] if alarms else [])])
