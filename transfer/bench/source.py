"""The trainer's weights, which can be changed and known again, and the limit: how fast their bytes can be copied."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping

import torch

from transfer.agreement.manifest import DTYPES, Manifest
from transfer.bench.shapes import Model
from transfer.memory.digest import digest_of

BLOCK = 2**20  # random values that all tensors are filled from, each from another place on
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
LOW_BITS = {torch.bool: 1, torch.float8_e5m2: 3, torch.float8_e4m3fn: 7}  # of the mantissa; all others have 7 bits
STATES = 128

Weights = dict[str, torch.Tensor]


class Source:
    """A model's tensors, each in memory of its own; floats are at least 1 and below 2, and stay there."""

    def __init__(self, model: Model, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(0)
        block = torch.rand(BLOCK + len(model.tensors), generator=generator)
        dtypes = {dtype for dtype, _ in model.tensors.values()}
        values = {dtype: _values(block, DTYPES[dtype]).to(device) for dtype in dtypes}
        self.weights: Weights = {}
        for index, (name, (dtype, shape)) in enumerate(model.tensors.items()):
            self.weights[name] = _filled(values[dtype][index : index + BLOCK], shape)
        self.manifest = Manifest.of(self.weights)
        self._state = 0

    def copy(self) -> Source:
        """The same weights in other memory."""
        return self._with({name: tensor.clone() for name, tensor in self.weights.items()})

    def alias(self) -> Source:
        """The same memory under other tensors, whose `data` may then be replaced."""
        return self._with({name: tensor.detach() for name, tensor in self.weights.items()})

    def renew(self) -> None:
        """Put every tensor into new memory, with the same values."""
        for tensor in self.weights.values():
            tensor.data = tensor.clone()

    def _with(self, weights: Weights) -> Source:
        other = object.__new__(Source)
        other.weights, other.manifest, other._state = weights, self.manifest, self._state
        return other

    def change(self) -> None:
        """Give every value other low bits, in place."""
        before, self._state = self._state, (self._state + 1) % STATES
        for tensor in self.weights.values():
            mask = (before ^ self._state) & LOW_BITS.get(tensor.dtype, STATES - 1)
            tensor.view(INTEGERS[tensor.dtype.itemsize]).bitwise_xor_(mask)

    def digest(self) -> str:
        """Of the bytes as they are now, in the manifest's order."""
        return digest_of(self.weights[entry.name] for entry in self.manifest.entries)


class Limit:
    """memcpy of a model's bytes into memory that has been touched before."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        tensors = list(weights.values())
        self._nbytes = sum(tensor.nbytes for tensor in tensors)
        self._source = torch.ones(self._nbytes, dtype=torch.uint8)
        self._target = torch.ones(self._nbytes, dtype=torch.uint8)
        self._pieces: list[tuple[int, int, int]] = []  # target, source, bytes
        place = self._target.data_ptr()
        for tensor in tensors:
            self._pieces.append((place, tensor.data_ptr(), tensor.nbytes))
            place += tensor.nbytes

    def flat(self) -> float:
        """Seconds of one copy of all bytes."""
        target, source = self._target.data_ptr(), self._source.data_ptr()
        began = time.perf_counter()
        ctypes.memmove(target, source, self._nbytes)
        return time.perf_counter() - began

    def by_tensor(self) -> float:
        """Seconds of a copy a tensor."""
        began = time.perf_counter()
        for target, source, nbytes in self._pieces:
            ctypes.memmove(target, source, nbytes)
        return time.perf_counter() - began


def _values(uniform: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values of a dtype from numbers in [0, 1)."""
    if dtype.is_floating_point:
        return (1 + 0.99 * uniform).to(torch.bfloat16 if dtype.itemsize > 1 else dtype).to(dtype)
    return (uniform * (2 if dtype is torch.bool else STATES)).to(torch.uint8).to(dtype)


def _filled(values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor that repeats these values."""
    tensor = torch.empty(shape, dtype=values.dtype, device=values.device)
    for piece in tensor.view(-1).split(len(values)):
        piece.copy_(values[: len(piece)])
    return tensor
