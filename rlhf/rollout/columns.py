"""Samples as bytes: the answer of `/v1/completions` to a client that asks for `"encoding": "columns"`.

All numbers are little-endian, and nothing stands between the parts:

    bytes                 what
    8                     "rlhfcols"
    4    uint32           version of this format, 1
    4    uint32           H, bytes of the header, at most 4096
    H                     the header, a JSON object: {"rows": B, "tokens": N, "logprobs": M, "runs": R}
    4*B  int32            tokens of each row; their sum is N
    B    uint8            finish reason of each row: 0 stop, 1 length, 2 abort
    4*N  int32            token ids, row after row
    B    uint8            1 for each row that has log-probs, else 0; the tokens of those rows are M
    4*M  float32          log-probs, row after row
    4*B  int32            runs of each row: tokens one after the other that one version of the weights has sampled
    8*R  uint64           version of each run
    4*R  int32            tokens of each run, at least 1; those of a row's runs are the row's

Nothing follows. A reader knows beforehand how many rows and how many tokens a row it has asked for, and believes no
number beyond that: whatever the bytes, `decode` gives samples of this form or raises ValueError.
"""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf.rollout.sampling import ABORTED, Sample
from rlhf.types import FINISHED, IDS, LOGPROBS, TRUNCATED, VERSIONS
from transfer.agreement.wire import COLUMNS_TYPE, MAX_LOGPROB, Binary

MAGIC = b"rlhfcols"
VERSION = 1
HEAD = struct.Struct("<8sII")  # magic, version, bytes of the header
MAX_HEADER = 4096
REASONS = (FINISHED, TRUNCATED, ABORTED)
COUNTS = ("rows", "tokens", "logprobs", "runs")
COLUMNS = (  # name, dtype, and the count that is its length
    ("lengths", "<i4", "rows"),
    ("reasons", "u1", "rows"),
    ("ids", "<i4", "tokens"),
    ("measured", "u1", "rows"),
    ("logprobs", "<f4", "logprobs"),
    ("runs_of", "<i4", "rows"),
    ("versions", "<u8", "runs"),
    ("run_tokens", "<i4", "runs"),
)

Column = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Expected:
    """What an answer may be: this many rows, each of at most `max_tokens`, of ids below `vocabulary` where known."""

    rows: int
    max_tokens: int
    vocabulary: int | None = None


def encode(samples: Sequence[Sample]) -> Binary:
    """The samples as bytes of this form."""
    measured = [sample for sample in samples if sample.logprobs is not None]
    runs = [_runs(np.asarray(sample.versions, np.uint64)) for sample in samples]
    columns: dict[str, Any] = {
        "lengths": [len(sample.ids) for sample in samples],
        "reasons": [REASONS.index(sample.finish_reason) for sample in samples],
        "ids": _joined([sample.ids for sample in samples]),
        "measured": [sample.logprobs is not None for sample in samples],
        "logprobs": _joined([sample.logprobs for sample in measured]),
        "runs_of": [len(versions) for versions, _ in runs],
        "versions": _joined([versions for versions, _ in runs]),
        "run_tokens": _joined([tokens for _, tokens in runs]),
    }
    counts = {count: len(columns[name]) for name, _, count in COLUMNS}
    header = json.dumps(counts).encode()
    parts = [np.asarray(columns[name], dtype).tobytes() for name, dtype, _ in COLUMNS]
    return Binary(b"".join([HEAD.pack(MAGIC, VERSION, len(header)), header, *parts]), COLUMNS_TYPE)


def decode(raw: bytes, expected: Expected) -> list[Sample]:
    """The samples of an answer to a request that may be answered so; ValueError says what is wrong with other bytes."""
    if not isinstance(raw, bytes | bytearray):
        raise ValueError(f"{type(raw).__name__} is not bytes")
    counts, start = _counts(raw, expected)
    columns: dict[str, Column] = {}
    for name, dtype, count in COLUMNS:
        columns[name] = np.frombuffer(raw, dtype, counts[count], start)
        start += columns[name].nbytes
    _check_rows(columns, counts, expected)
    _check_tokens(columns, expected)
    _check_runs(columns, counts)
    return _samples(columns)


def _joined(parts: Sequence[Any]) -> Column:
    return np.concatenate(parts) if parts else np.empty(0)


def _runs(versions: Column) -> tuple[Column, Column]:
    """Versions of tokens as the version and the tokens of each run."""
    starts = np.flatnonzero(np.diff(versions, prepend=versions[:1] - 1))
    return versions[starts], np.diff(starts, append=len(versions))


def _counts(raw: bytes, expected: Expected) -> tuple[dict[str, int], int]:
    """The header's counts, which the bytes have room for, and where the columns begin."""
    if len(raw) < HEAD.size:
        raise ValueError(f"{len(raw)} bytes are no columns")
    magic, version, size = HEAD.unpack_from(raw)
    if (magic, version) != (MAGIC, VERSION):
        raise ValueError(f"the bytes begin with {magic!r} and version {version}, not with {MAGIC!r} and {VERSION}")
    if size > min(MAX_HEADER, len(raw) - HEAD.size):
        raise ValueError(f"a header of {size} bytes is too long")
    counts = _header(raw[HEAD.size : HEAD.size + size])
    if counts["rows"] != expected.rows or not counts["tokens"] <= expected.rows * expected.max_tokens:
        raise ValueError(
            f"{counts['rows']} rows of {counts['tokens']} tokens where {expected.rows} of up to {expected.max_tokens} "
            "each were asked for"
        )
    if counts["logprobs"] > counts["tokens"] or counts["runs"] > counts["tokens"]:
        raise ValueError("there are more log-probs or runs than tokens")
    start = HEAD.size + size
    end = start + sum(np.dtype(dtype).itemsize * counts[count] for _, dtype, count in COLUMNS)
    if len(raw) != end:
        raise ValueError(f"there are {len(raw)} bytes where the header speaks of {end}")
    return counts, start


def _header(raw: bytes) -> dict[str, int]:
    try:
        counts = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError("the header is not JSON") from None
    if not isinstance(counts, dict) or counts.keys() != set(COUNTS):
        raise ValueError(f"the header must have {', '.join(COUNTS)}")
    if not all(type(count) is int and 0 <= count < 2**31 for count in counts.values()):
        raise ValueError("a count of the header is not from 0 to 2**31 - 1")
    return counts


def _check_rows(columns: dict[str, Column], counts: dict[str, int], expected: Expected) -> None:
    lengths, measured = columns["lengths"].astype(np.int64), columns["measured"]
    if lengths.min(initial=0) < 0 or lengths.max(initial=0) > expected.max_tokens:
        raise ValueError(f"a row's length is not from 0 to {expected.max_tokens}")
    if columns["reasons"].max(initial=0) >= len(REASONS):
        raise ValueError("a finish reason is not known")
    if measured.max(initial=0) > 1:
        raise ValueError("whether a row has log-probs must be 0 or 1")
    if lengths.sum() != counts["tokens"] or lengths[measured == 1].sum() != counts["logprobs"]:
        raise ValueError("the rows' lengths do not add up to the tokens, or to the log-probs")


def _check_tokens(columns: dict[str, Column], expected: Expected) -> None:
    ids = columns["ids"]
    if ids.min(initial=0) < 0 or (expected.vocabulary is not None and ids.max(initial=0) >= expected.vocabulary):
        raise ValueError("a token id is negative, or not of the vocabulary")
    if not np.isfinite(columns["logprobs"]).all():
        raise ValueError("a log-prob is not finite")
    if columns["logprobs"].max(initial=0.0) > MAX_LOGPROB:
        raise ValueError(f"a log-prob is {columns['logprobs'].max():.4g}, and none is above 0")


def _check_runs(columns: dict[str, Column], counts: dict[str, int]) -> None:
    runs_of, tokens = columns["runs_of"].astype(np.int64), columns["run_tokens"].astype(np.int64)
    if runs_of.min(initial=0) < 0 or runs_of.sum() != counts["runs"]:
        raise ValueError("the rows' runs do not add up")
    if tokens.min(initial=1) < 1:
        raise ValueError("a run has no tokens")
    rows = np.repeat(np.arange(counts["rows"]), runs_of)
    of_rows = np.zeros(counts["rows"], np.int64)
    np.add.at(of_rows, rows, tokens)
    if not np.array_equal(of_rows, columns["lengths"]):
        raise ValueError("the runs of a row do not add up to its length")


def _samples(columns: dict[str, Column]) -> list[Sample]:
    lengths, measured = columns["lengths"], columns["measured"] == 1
    ids = _cut(array(IDS, columns["ids"].astype(np.int32).tobytes()), lengths)
    logprobs = _cut(array(LOGPROBS, columns["logprobs"].astype(np.float32).tobytes()), lengths * measured)
    each = np.repeat(columns["versions"].astype(np.uint64), columns["run_tokens"])
    versions = _cut(array(VERSIONS, each.tobytes()), lengths)
    reasons = [REASONS[reason] for reason in columns["reasons"].tolist()]
    return [
        Sample(ids[row], logprobs[row] if measured[row] else None, versions[row], reason)
        for row, reason in enumerate(reasons)
    ]


def _cut(values: array[Any], lengths: Column) -> list[array[Any]]:
    """The column in parts of these lengths."""
    bounds = [0, *np.cumsum(lengths, dtype=np.int64).tolist()]
    return [values[start:stop] for start, stop in pairwise(bounds)]
