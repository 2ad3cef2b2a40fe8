"""Checkpoints by rank: what some ranks have written, any other number reads, each its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import pool
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from rlhf.checkpoint.shards import stored, write_rows
from rlhf.ranks.ranks import Ranks
from transfer.agreement.dtensor import is_dtensor

SHAPES = {"rows": (7, 3), "one row": (1, 4), "vector": (5,), "half": (4, 2)}


def whole_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return drawn | {"half": drawn["half"].bfloat16(), "step": torch.tensor(3.0), "plain": torch.arange(6)}


def held(ranks: Ranks, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """As ranks hold them: rows of the first ones, the others whole."""
    mesh = init_device_mesh("cpu", (ranks.count,))
    return {n: distribute_tensor(t, mesh, [Shard(0)]) if n in SHAPES else t.clone() for n, t in tensors.items()}


def _write(ranks: Ranks, folder: Path) -> str:
    return write_rows(folder, "weights", held(ranks, whole_tensors()), ranks.number, ranks.count).name


def _read(ranks: Ranks, folder: Path) -> dict[str, Tensor]:
    zeros = held(ranks, {name: torch.zeros_like(tensor) for name, tensor in whole_tensors().items()})
    with stored(folder, "weights") as saved, torch.no_grad():
        assert saved.keys() == zeros.keys()
        for name, tensor in zeros.items():
            assert (saved[name].shape, saved[name].dtype) == (tensor.shape, tensor.dtype)
            saved[name].read_into(tensor)
    return {n: t.full_tensor() if is_dtensor(t) else t for n, t in zeros.items()}


@pytest.mark.parametrize("writers", [2, 3])
def test_rows_that_ranks_have_written_are_read_by_any_number_and_by_one_process(writers, tmp_path):
    with pool(writers) as ranks:
        names = ranks.call(_write, tmp_path)
    assert names == [f"weights-{n + 1:05d}-of-{writers:05d}.safetensors" for n in range(writers)]
    with safe_open(tmp_path / names[-1], framework="pt") as file:
        assert "one row" not in file.keys() and "plain" not in file.keys()  # noqa: SIM118
        assert json.loads(file.metadata()["shapes"])["rows"] == [7, 3]
    for readers in (2, 3):
        with pool(readers) as ranks:
            for read in ranks.call(_read, tmp_path):
                assert all(torch.equal(read[name], tensor) for name, tensor in whole_tensors().items())
    with stored(tmp_path, "weights") as saved:
        for name, tensor in whole_tensors().items():
            mine = torch.zeros_like(tensor)
            saved[name].read_into(mine)
            assert torch.equal(mine, tensor)


def test_a_name_has_not_the_files_of_a_longer_one(tmp_path):
    with pool(2) as ranks:
        ranks.call(_write, tmp_path)
    (tmp_path / "weights-00001-of-00002.safetensors").rename(tmp_path / "weights-optimizer-00001-of-00002.safetensors")
    with stored(tmp_path, "weights") as saved:
        assert "plain" not in saved
