"""The samples that a run has kept, by reward with gold beside it: in red those that a learned reward is gamed by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.etree.ElementTree import Element

from rlhf.reports.page import element, table
from rlhf.reports.run_folder import RunFolder

CHARACTERS = 600  # of a prompt or an answer


def samples_part(run: RunFolder, most: int) -> list[Element]:
    """Those of all steps by reward, the best first; in red where reward and gold are furthest apart."""
    samples = run.samples()
    there = sorted((s for s in samples if s.get("reward") is not None), key=lambda s: (-s["reward"], s["step"]))
    if not there:
        return []
    kept = there if len(there) <= most else [*there[: most // 2], *there[-(most - most // 2) :]]
    said = f"{len(kept)} of {len(there)}" if len(kept) < len(there) else f"All {len(there)}"
    words = f"{said} samples that the run has kept, by reward"
    words += ": the best and the worst." if len(kept) < len(there) else "."
    apart = _apart(kept)
    if apart:
        words += " In red: a good reward, as rewards of this run go, for what the gold reward calls poor."
    rows = [
        {
            "reward": _short(sample["reward"]),
            "gold": _short(sample.get("gold")),
            "step": str(sample["step"]),
            "prompt": _cut(str(sample.get("prompt", ""))),
            "answer": _cut(_conversation(sample)),
            "ended by": str(sample.get("finish_reason", "")),
        }
        for sample in kept
    ]
    marked = dict.fromkeys(apart, "differs")
    text = ("prompt", "answer", "ended by")
    return [element("h2", "Samples"), element("p", words), table(rows, text, marked, tall=True)]


def _apart(samples: Sequence[dict[str, Any]]) -> list[int]:
    """Which of these have a reward in the upper third of all, and gold in the lower third of its range."""
    golds = [sample["gold"] for sample in samples if sample.get("gold") is not None]
    if not golds or all(sample["reward"] == sample.get("gold") for sample in samples):
        return []
    bound = min(golds) + (max(golds) - min(golds)) / 3
    upper = len(samples) // 3
    return [i for i, s in enumerate(samples) if i < upper and s.get("gold") is not None and s["gold"] < bound]


def _conversation(sample: dict[str, Any]) -> str:
    said = sample.get("conversation")
    return "\n— ".join(map(str, said)) if isinstance(said, list) and said else str(sample.get("answer", ""))


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}… ({len(text)} characters)"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""
