"""What is asked of an engine, what it answers, and the random numbers in between; no torch.

A sampled token depends on (seed of the prompt, index of the sample, position) and the model's logits, never on which
other rows share the batch or the worker: each draw is one output of a counter-based generator, so none has a state.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rlhf.config.cut import WHOLE, Cut
from rlhf.types import IDS, LOGPROBS, VERSIONS, column

ABORTED = "abort"  # finish reason of a row that new weights or a pause cut short; vLLM's word

MEASURED_EVERY = 16  # rows, of which one is measured,
MEASURED_LEAST = 32  # unless that gives fewer

Keys = npt.NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: the step of splitmix64 (Steele et al., OOPSLA 2014)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw `n` rows a prompt, each up to `max_tokens` or any of `stop_ids`; temperature 0 is greedy.

    Greedy or not, log-probs are those of the distribution at its temperature, of what `cut` leaves of it.
    """

    n: int
    max_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    with_logprobs: frozenset[int] | None = None  # rows whose log-probs are wanted; None: all
    steady: bool = False  # whether the weights stay as they are until the rows have ended
    uncut: bool = False  # whether rows go on where the weights do not stay
    cut: Cut = WHOLE  # of no greedy one

    def wants_logprobs(self, row: int) -> bool:
        """Whether anybody wants the log-probs of this row."""
        return self.with_logprobs is None or row in self.with_logprobs


@dataclass(slots=True)
class Sample:
    """One row as sampled: `ids` with the stop token, if any; of each its log-probability and its weights' version.

    Columns that grow in place; `logprobs` is None of a row whose log-probs nobody wants. Other sequences of numbers
    become columns.
    """

    ids: array[int]
    logprobs: array[float] | None
    versions: array[int]
    finish_reason: str

    def __post_init__(self) -> None:
        self.ids = column(IDS, self.ids)
        self.logprobs = None if self.logprobs is None else column(LOGPROBS, self.logprobs)
        self.versions = column(VERSIONS, self.versions)

    @classmethod
    def empty(cls, with_logprobs: bool = True) -> Sample:
        """A row of no tokens, as one that was cut short before its first."""
        return cls(array(IDS), array(LOGPROBS) if with_logprobs else None, array(VERSIONS), ABORTED)

    def grow(self, ids: Sequence[int], logprobs: Iterable[float], version: int) -> None:
        """Add tokens that one version of the weights sampled; `logprobs` are ignored where the row has none."""
        self.ids.extend(ids)
        if self.logprobs is not None:
            self.logprobs.extend(logprobs)
        self.versions.extend(array(VERSIONS, (version,)) * len(ids))


def measured_rows(rows: int) -> range:
    """Rows whose log-probs are enough to see whether workers and trainer agree; the same whoever samples them."""
    return range(0, rows, max(1, min(MEASURED_EVERY, rows // MEASURED_LEAST)))


def seed_of(seed: int, index: int) -> int:
    """The seed, 63 bits, of prompt `index` of a batch that was given `seed`."""
    return int(_keys([seed], [index])[0] >> np.uint64(1))


def streams(seeds: Sequence[int], n: int) -> Keys:
    """The key of each of n samples a seed, [len(seeds) * n]."""
    return _keys([seed for seed in seeds for _ in range(n)], list(range(n)) * len(seeds))


def uniforms(keys: Keys, position: int) -> npt.NDArray[np.float64]:
    """One number in [0, 1) a key, with 53 random bits, for the token at `position`."""
    with np.errstate(over="ignore"):
        return (_mix(keys + np.uint64(position + 1) * GOLDEN) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _keys(seeds: Sequence[int], indices: Sequence[int]) -> Keys:
    with np.errstate(over="ignore"):
        mixed = _mix(np.array(seeds, np.uint64) + GOLDEN)
        return _mix(mixed + np.array(indices, np.uint64) * GOLDEN)


def _mix(keys: Keys) -> Keys:
    """The output function of splitmix64: every input bit reaches every output bit."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))
