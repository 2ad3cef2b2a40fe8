"""Tasks whose prompts are drawn from a seed and whose right answer is computed."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from string import ascii_lowercase
from typing import Any, TypeVar

from rlhf.config import ArithmeticTaskConfig, ReverseTaskConfig, SequenceTaskConfig
from rlhf.tasks.raw import Gold, RawTask, Row

T = TypeVar("T")
OPERATORS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def sequence_task(config: SequenceTaskConfig, seed: int) -> RawTask:
    """Sort or reverse a string of letters: `dbca=` -> `abcd` or `acbd`; lengths are drawn evenly where they can be."""
    alphabet = ascii_lowercase[: config.letters]
    lengths = range(config.min_length, config.max_length + 1)
    rng = random.Random(seed)
    questions = _distinct(
        rng,
        wanted=config.prompts + config.held_out,
        size=sum(config.letters**length for length in lengths),
        every=("".join(letters) for length in lengths for letters in product(alphabet, repeat=length)),
        draw=lambda: "".join(rng.choices(alphabet, k=rng.choice(lengths))),
    )
    space = "task.letters, task.min_length and task.max_length"
    answer = (
        (lambda text: text[::-1]) if isinstance(config, ReverseTaskConfig) else (lambda text: "".join(sorted(text)))
    )
    rate = config.demonstration_errors
    rows = [
        Row(f"{text}=", {"answer": answer(text)}, demonstration=_erring(answer(text), alphabet, rate, rng))
        for text in questions
    ]
    return split(rows, config.held_out, space, share_right)


def arithmetic_task(config: ArithmeticTaskConfig, seed: int) -> RawTask:
    """Calculate: `12+7=` -> `19`."""
    signs = list(dict.fromkeys(config.operators))
    numbers = range(config.max_number + 1)
    rng = random.Random(seed)
    questions = _distinct(
        rng,
        wanted=config.prompts + config.held_out,
        size=len(numbers) ** 2 * len(signs),
        every=product(numbers, signs, numbers),
        draw=lambda: (rng.choice(numbers), rng.choice(signs), rng.choice(numbers)),
    )
    answers = [str(OPERATORS[sign](a, b)) for a, sign, b in questions]
    rows = [
        Row(f"{a}{sign}{b}=", {"answer": answer}, demonstration=answer)
        for (a, sign, b), answer in zip(questions, answers, strict=True)
    ]
    return split(rows, config.held_out, "task.max_number and task.operators", exact)


def share_right(columns: Mapping[str, Any], answer: str) -> float:
    """The share of positions at which `answer` is right, of the longer of the two lengths: 1.0 is exactly right."""
    right, answer = columns["answer"], answer.strip()
    return sum(a == b for a, b in zip(right, answer, strict=False)) / max(len(right), len(answer))


def exact(columns: Mapping[str, Any], answer: str) -> float:
    """1.0 for exactly the right answer, else 0.0."""
    return float(answer.strip() == columns["answer"])


def _distinct(rng: random.Random, *, wanted: int, size: int, every: Iterable[T], draw: Callable[[], T]) -> list[T]:
    """`wanted` different items in random order, or all if there are only `size`."""
    if size <= 4 * wanted:  # drawing would mostly repeat itself
        items = list(every)
        rng.shuffle(items)
        return items[:wanted]
    chosen: dict[T, None] = {}
    while len(chosen) < wanted:
        chosen[draw()] = None
    items = list(chosen)
    rng.shuffle(items)  # rare short strings come early: without this they would all be on one side of the split
    return items


def _erring(answer: str, alphabet: str, rate: float, rng: random.Random) -> str:
    """What somebody shows who mistakes each letter with probability `rate`."""
    return "".join(rng.choice(alphabet) if rng.random() < rate else letter for letter in answer)


def split(rows: list[Row], held_out: int, space: str, gold: Gold) -> RawTask:
    """The first `held_out` rows, and the others to train on; ValueError names the keys of `space` if none are left."""
    if len(rows) <= held_out:
        raise ValueError(
            f"task.held_out must leave prompts to train on: there are only {len(rows)} different prompts "
            f"(got {held_out}); lower it, or raise {space}"
        )
    return RawTask(train=rows[held_out:], held_out=rows[:held_out], gold=gold)
