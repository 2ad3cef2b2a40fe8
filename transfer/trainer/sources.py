"""Weights of trainers that are no plain module: gathered from shards."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from transfer.agreement.dtensor import full


@torch.no_grad()
def full_weights(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state_dict, `module.state_dict(keep_vars=True)`, with every DTensor gathered to a whole tensor of this rank.

    Gathering is collective (DTensor.full_tensor): every rank of the mesh has to call this at the same time, and one of
    them pushes. Two names of one tensor stay tied; a plain tensor is itself.
    """
    whole: dict[int, torch.Tensor] = {}
    for tensor in state.values():
        if id(tensor) not in whole:
            whole[id(tensor)] = full(tensor)
    return {name: whole[id(tensor)] for name, tensor in state.items()}
