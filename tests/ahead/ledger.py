"""Which prompts a run has learned from, by its journal."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf.ahead.stream import Stream


def learned_from(folder: Path) -> list[int]:
    """The seeds of the prompts, in order; those of steps that a kill has undone count once, as they were done again."""
    lines = (folder / "journal/trainer.jsonl").read_text().splitlines()
    said = [json.loads(line) for line in lines if '"consume"' in line and line.endswith("}")]
    by_version = {each["version"]: each["seeds"] for each in said if each["op"] == "consume"}
    assert sorted(by_version) == list(range(min(by_version), max(by_version) + 1)), "a step has no entry"
    return [seed for version in sorted(by_version) for seed in by_version[version]]


def expected(size: int, seed: int, count: int) -> list[int]:
    """The seeds of the first prompts of a stream, `size` a step."""
    prompts = Stream(range(10_000), size, seed)
    return [prompts[index][1] for index in range(count)]
