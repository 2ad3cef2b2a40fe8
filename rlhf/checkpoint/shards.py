"""Tensors of a checkpoint as files: whole, or by the ranks that have them, and read by any number of ranks in slices.

    <name>.safetensors                    all of a name's tensors
    <name>-00002-of-00003.safetensors     the second rank's rows (dim 0) of those that are sharded; the first rank's
                                          file has what is not sharded, too

A rank's file says in its metadata, `shapes`, which of its tensors are rows, and of what: a JSON object of whole shapes.
Nothing is pickled, which torch's distributed checkpoints do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transfer.agreement.dtensor import holder_of, is_dtensor, local_part
from transfer.agreement.shards import rows_of

SHAPES = "shapes"
SUFFIX = ".safetensors"
DTYPES = {  # safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file; OSError if it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    held = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(held, path, dict(metadata) if metadata else None)
    except SafetensorError as error:  # a full disk, say: its Rust half raises no OSError
        raise OSError(str(error)) from error


def write_rows(folder: Path, name: str, tensors: Mapping[str, Tensor], number: int, count: int) -> Path:
    """This rank's file, of `count`: its rows of DTensors, and, of the first rank, what is not sharded."""
    path = folder / f"{name}-{number + 1:05d}-of-{count:05d}{SUFFIX}"
    held = {key: local_part(tensor) for key, tensor in tensors.items() if is_dtensor(tensor) or number == 0}
    shapes = {key: list(tensor.shape) for key, tensor in tensors.items() if is_dtensor(tensor)}
    there = {key: tensor for key, tensor in held.items() if not tensor.shape or len(tensor)}  # of some it has no row
    write_tensors(path, there, {SHAPES: json.dumps(shapes)})
    return path


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a checkpoint, of which rows are read when they are asked for."""

    shape: torch.Size
    dtype: torch.dtype
    pieces: list[tuple[int, Any]]  # first row, and a slice of a file; in order
    of_ranks: bool = False  # that have shards, in fp32 whatever a model computes in

    def rows(self, first: int, end: int) -> Tensor:
        """Rows `first` to `end` - 1; of a tensor without dim 0, all of it."""
        if not self.shape:
            return self.pieces[0][1][...]
        found = []
        for start, piece in self.pieces:
            low, high = max(first, start), min(end, start + piece.get_shape()[0])
            if low < high:
                found.append(piece[low - start : high - start])
        return torch.cat(found) if len(found) != 1 else found[0]

    def read_into(self, held: Tensor) -> None:
        """Copy what this rank has of the tensor into it."""
        mine = local_part(held)
        if not is_dtensor(held):
            mine.data.copy_(self.rows(0, self.shape[0] if self.shape else 0))
        elif len(mine):
            number, count = holder_of(held)
            first = rows_of(self.shape[0], count, number)[0]
            mine.copy_(self.rows(first, first + len(mine)))


@contextmanager
def stored(folder: Path, name: str) -> Iterator[dict[str, Stored]]:
    """All tensors of a name, however many ranks have written them; none where there is no such file."""
    from safetensors import safe_open

    with ExitStack() as stack:
        found: dict[str, Stored] = {}
        for path in _paths(folder, name):
            file = stack.enter_context(safe_open(path, framework="pt"))
            shapes = json.loads((file.metadata() or {}).get(SHAPES, "{}"))
            for key in file.keys():  # noqa: SIM118 - no dict
                piece = file.get_slice(key)
                shape = torch.Size(shapes.get(key, piece.get_shape()))
                known = found.setdefault(key, Stored(shape, DTYPES[piece.get_dtype()], [], key in shapes))
                first = sum(each.get_shape()[0] for _, each in known.pieces)
                known.pieces.append((first, piece))
        yield found


def _paths(folder: Path, name: str) -> list[Path]:
    whole = folder / f"{name}{SUFFIX}"
    if whole.exists():
        return [whole]
    of_rank = re.compile(re.escape(name) + r"-\d{5}-of-\d{5}" + re.escape(SUFFIX))
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if of_rank.fullmatch(path.name))
