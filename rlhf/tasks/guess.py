"""Guess a letter in a few turns: the policy says one, and is told whether the secret comes before it or after it.

bh? | e EOS | < | c EOS | > | d EOS          a letter from b to h; d is right
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from string import ascii_lowercase
from typing import Any

from rlhf.config import GuessTaskConfig
from rlhf.tasks.procedural import exact, split
from rlhf.tasks.raw import RawTask, Replies, Row

BEFORE, AFTER = "<", ">"


def guess_task(config: GuessTaskConfig, seed: int) -> RawTask:
    """Every range of letters with every secret in it; a demonstration says one of them, whichever.

    No range is both held out and trained on: who has seen a range with all secrets but one could rule that one out.
    """
    alphabet = ascii_lowercase[: config.letters]
    rng = random.Random(seed)
    widths = range(config.min_range, config.max_range + 1)
    ranges = [alphabet[start : start + width] for width in widths for start in range(config.letters - width + 1)]
    rng.shuffle(ranges)
    rows = [
        Row(f"{letters[0]}{letters[-1]}?", {"answer": secret}, demonstration=rng.choice(letters))
        for letters in ranges
        for secret in letters
    ]
    asked = {row.question for row in rows[: config.held_out]}
    rows = rows[: config.held_out] + [row for row in rows[config.held_out :] if row.question not in asked]
    raw = split(rows, config.held_out, "task.letters, task.min_range and task.max_range", exact)
    rng.shuffle(raw.train)
    return RawTask(raw.train, raw.held_out, raw.gold, Replies(config.turns, hint, BEFORE, BEFORE + AFTER))


def hint(columns: Mapping[str, Any], answers: Sequence[str]) -> str | None:
    """Where the secret is from the last letter that was said; None if that was it, or no letter."""
    said, secret = answers[-1].strip(), columns["answer"]
    if said == secret or len(said) != 1 or said not in ascii_lowercase:
        return None
    return BEFORE if secret < said else AFTER
