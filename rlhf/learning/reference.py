"""The reference policy: fixed, or drawn after the policy, so that the KL penalty bounds a step, not the whole way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from rlhf.checkpoint.state import weights_of
from rlhf.config.algo import AlgoConfig
from rlhf.models.adapter import without_adapter


@contextmanager
def acting(reference: PreTrainedModel, policy: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The reference, to compute with: a model of its own, or the policy while its adapter is off."""
    if reference is not policy:
        yield reference
        return
    with without_adapter(policy):
        yield policy


@torch.no_grad()
def refresh(
    reference: torch.nn.Module, policy: torch.nn.Module, algo: AlgoConfig, step: int, averages: dict[str, torch.Tensor]
) -> None:
    """After training step `step` of 1 ..: a copy every `ref_every` steps, or a moving average with `ref_decay`.

    `averages` holds from step to step what is averaged, in fp32: bfloat16 would round small shares away.
    """
    if algo.ref_decay is not None:
        weight = 1 - algo.ref_decay
    elif algo.ref_every and step % algo.ref_every == 0:
        weight = 1.0
    else:
        return
    theirs = reference.state_dict(keep_vars=True)
    for name, mine in weights_of(policy).items():  # tied ones once: a second average would be one of the first
        if mine.is_floating_point() and weight < 1:
            average = averages.setdefault(name, theirs[name].detach().float())  # of fp32 weights: they themselves
            theirs[name].copy_(average.lerp_(mine.float(), weight))
        else:
            theirs[name].copy_(mine)
