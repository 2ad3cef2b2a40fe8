"""Which rows are computed together: at most so many tokens at a time, prompts once.

Padded (`split`), a micro-batch is a tensor of its prompts, padded to the longest, and one of its rows' responses,
padded to the longest: rows of like lengths go together. Packed (`fill`), it is one sequence: the rows of a prompt go
together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

ROW_STEP = 32  # few batch shapes, as kernels are prepared for each


@dataclass(frozen=True, slots=True)
class Sizes:
    """Tokens of each prompt and each row's response, and the prompt of each row."""

    prompts: Sequence[int]
    prompt_of_B: Sequence[int]
    responses_B: Sequence[int]

    def tokens(self, part: Sequence[int]) -> int:
        """Of a micro-batch of these rows, padding included."""
        prompts = {self.prompt_of_B[row] for row in part}
        widest = max(1, max(self.responses_B[row] for row in part))
        return _tokens(len(prompts), max(self.prompts[p] for p in prompts), len(part), widest)


def split(sizes: Sizes, rows: Sequence[int], budget: int) -> list[list[int]]:
    """The rows in parts, each of at most `budget` tokens, or one row; all rows as they are where they fit in one part.

    Of three orders the one with the least tokens in all: as they are; by length, all the rows of a prompt together; by
    length alone, where several parts may compute one prompt.
    """
    parts = _cut(sizes, rows, budget)
    if len(parts) <= 1:
        return parts
    longest = [0] * len(sizes.prompts)
    for row in rows:
        prompt = sizes.prompt_of_B[row]
        longest[prompt] = max(longest[prompt], sizes.responses_B[row])

    def by_prompt(row: int) -> tuple[int, ...]:
        prompt = sizes.prompt_of_B[row]
        return longest[prompt], sizes.prompts[prompt], prompt, sizes.responses_B[row]

    def by_length(row: int) -> tuple[int, ...]:
        return sizes.responses_B[row], sizes.prompts[sizes.prompt_of_B[row]], sizes.prompt_of_B[row]

    orders = (sorted(rows, key=by_prompt), sorted(rows, key=by_length))
    plans = [parts, *(_cut(sizes, order, budget) for order in orders)]
    return min(plans, key=lambda plan: sum(map(sizes.tokens, plan)))


def balanced(cut: Callable[[int], list[list[int]]], budget: int, ranks: int) -> list[list[int]]:
    """The parts that `cut` makes of the smallest budget up to this one with which each rank has as many, if any."""
    parts = cut(budget)
    if len(parts) % ranks == 0:
        return parts
    wanted = -(-len(parts) // ranks) * ranks
    low, high = 0, budget  # parts of `high` tokens are few enough
    while high - low > max(1, budget // 64):
        middle = (low + high) // 2
        found = cut(middle)
        if len(found) <= wanted:
            parts, high = found if len(found) == wanted else parts, middle
        else:
            low = middle
    return parts


def _cut(sizes: Sizes, rows: Iterable[int], budget: int) -> list[list[int]]:
    """The rows in this order, a new part where the next row does not fit any more."""
    parts: list[list[int]] = []
    prompts: set[int] = set()
    longest = widest = 0
    for row in rows:
        prompt = sizes.prompt_of_B[row]
        grown = prompts | {prompt}
        longest, widest = max(longest, sizes.prompts[prompt]), max(widest, 1, sizes.responses_B[row])
        if parts and _tokens(len(grown), longest, len(parts[-1]) + 1, widest) <= budget:
            parts[-1].append(row)
            prompts = grown
        else:
            parts.append([row])
            prompts, longest, widest = {prompt}, sizes.prompts[prompt], max(1, sizes.responses_B[row])
    return parts


def _tokens(prompts: int, longest: int, rows: int, widest: int) -> int:
    return prompts * longest + rows * widest


def fill(sizes: Sizes, rows: Sequence[int], budget: int, shared: bool) -> list[list[int]]:
    """The rows in as few parts as are easily found, each of at most `budget` tokens without padding, or one row.

    `shared`: a part's prompts count once, not once a row. A prompt's rows stay together where they fit in one part.
    Largest first, each into the first part that has room (first-fit decreasing).
    """
    units = [unit for group in _by_prompt(sizes, rows) for unit in _units(sizes, group, budget, shared)]
    cost = [_packed_tokens(sizes, unit, shared) for unit in units]
    parts: list[list[int]] = []
    left: list[int] = []
    for index in sorted(range(len(units)), key=lambda index: -cost[index]):
        place = next((place for place, room in enumerate(left) if room >= cost[index]), None)
        if place is None:
            place = len(parts)
            parts.append([])
            left.append(budget)
        parts[place] += units[index]
        left[place] -= cost[index]
    return [sorted(part) for part in parts]


def _by_prompt(sizes: Sizes, rows: Iterable[int]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(sizes.prompt_of_B[row], []).append(row)
    return list(groups.values())


def _units(sizes: Sizes, group: Sequence[int], budget: int, shared: bool) -> list[list[int]]:
    """A prompt's rows in one piece, or in pieces that fit."""
    units: list[list[int]] = []
    for row in group:
        if units and _packed_tokens(sizes, [*units[-1], row], shared) <= budget:
            units[-1].append(row)
        else:
            units.append([row])
    return units


def _packed_tokens(sizes: Sizes, rows: Sequence[int], shared: bool) -> int:
    """Of these rows of one prompt; what predicts nothing is left out."""
    prompt = sizes.prompts[sizes.prompt_of_B[rows[0]]]
    return prompt * (1 if shared else len(rows)) + sum(max(0, sizes.responses_B[row] - 1) for row in rows)


def length_groups(lengths: Sequence[int]) -> list[tuple[list[int], int]]:
    """The rows in one group, or the shorter and the longer ones in two, each with its longest length.

    Two where that leaves out at least 64 tokens of padding and an eighth of all; the first a multiple of ROW_STEP rows.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    longest = lengths[order[-1]]
    saved = {cut: cut * (longest - lengths[order[cut - 1]]) for cut in range(ROW_STEP, len(order), ROW_STEP)}
    cut = max(saved, key=saved.__getitem__, default=0)
    if saved.get(cut, 0) < max(64, len(order) * longest // 8):
        cut = 0
    groups = [group for group in (order[:cut], order[cut:]) if group]
    return [(group, lengths[group[-1]]) for group in groups if lengths[group[-1]] > 1]  # one token: the prompt's pass


def one_group(lengths: Sequence[int]) -> list[tuple[list[int], int]]:
    """All rows in one group, also where the prompt's pass has said all: for ranks that need as many passes."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [(order, max(2, lengths[order[-1]]))]
