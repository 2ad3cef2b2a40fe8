"""How a model computes rows, in ways with the same results: padded (forward.py), or packed, which GPUs like.

Padded rows share their prompts, or are whole where a model's cache cannot be shared (recurrent layers, for one).

Packed rows lie behind each other without padding (packing.py), attention goes by their lengths (packed_attention.py),
log-probs come straight from hidden states (output_layer.py), and decoder layers may be compiled (compiled_layers.py).
Which way a run takes is chosen in pass_choice.py.

Shapes: P prompts, B rows, T response tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.learning import forward, output_layer
from rlhf.learning.compiled_layers import compiled_layers
from rlhf.learning.forward import Batch
from rlhf.learning.microbatches import Sizes, fill, one_group, split
from rlhf.learning.packed_attention import attending
from rlhf.learning.packing import Tokens, packed, shares
from rlhf.models.recompute import recomputing
from rlhf.models.value import score_layer


class Passes(Protocol):
    """What a learner asks of a model."""

    single: bool  # whether the rows of a micro-batch are one forward pass, and so one backward pass

    def logprobs(self, model: PreTrainedModel, batch: Batch, temperature: float) -> Tensor:
        """log pi [B, T] of each response token under softmax(logits / temperature); at padding, any number."""

    def logprobs_and_entropy(
        self, model: PreTrainedModel, batch: Batch, temperature: float, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """The same, and the entropy [B, T] at each of them, in nats, with a gradient if asked for."""

    def values(self, critic: PreTrainedModel, batch: Batch) -> Tensor:
        """What a critic says before each response token [B, T]; at padding, any number."""

    def split(self, sizes: Sizes, rows: Sequence[int], budget: int) -> list[list[int]]:
        """The rows in micro-batches of at most `budget` tokens, or one row."""

    def in_lockstep(self) -> Passes:
        """The same way, with as many passes through a model for any rows."""


class Padded:
    """Rows as tensors, prompts padded on the left and responses on the right, a prompt computed once for its rows."""

    single = False
    pieces: forward.Pieces = staticmethod(forward.response_pieces)

    def in_lockstep(self) -> Passes:
        """A pass for the prompts and one for all responses."""
        same = copy.copy(self)
        same.pieces = partial(self.pieces, groups=one_group)  # type: ignore[call-arg]
        return same

    def logprobs(self, model: PreTrainedModel, batch: Batch, temperature: float) -> Tensor:
        """As Passes has it."""
        return forward.response_logprobs(model, batch, temperature, self.pieces)

    def logprobs_and_entropy(
        self, model: PreTrainedModel, batch: Batch, temperature: float, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """As Passes has it."""
        return forward.logprobs_and_entropy(model, batch, temperature, entropy_gradient, self.pieces)

    def values(self, critic: PreTrainedModel, batch: Batch) -> Tensor:
        """As Passes has it."""
        return forward.response_values(critic, batch, self.pieces)

    def split(self, sizes: Sizes, rows: Sequence[int], budget: int) -> list[list[int]]:
        """As Passes has it."""
        return split(sizes, rows, budget)


PADDED = Padded()


class Whole(Padded):
    """Rows as tensors, each whole and padded on the right, its prompt computed anew: for any causal model."""

    pieces = staticmethod(forward.whole_pieces)

    def split(self, sizes: Sizes, rows: Sequence[int], budget: int) -> list[list[int]]:
        """As Passes has it."""
        whole = [sizes.prompts[p] + n for p, n in zip(sizes.prompt_of_B, sizes.responses_B, strict=True)]
        return split(Sizes([0] * len(sizes.prompts), sizes.prompt_of_B, whole), rows, budget)


WHOLE = Whole()


class Packed:
    """Rows as one sequence of tokens; `window`: the fewest tokens that a layer of the policy sees."""

    single = True

    def __init__(self, compiled: bool, window: int | None = None) -> None:
        self.compiled = compiled
        self._window = window

    def in_lockstep(self) -> Passes:
        """It has one for any rows."""
        return self

    def logprobs(self, model: PreTrainedModel, batch: Batch, temperature: float) -> Tensor:
        """As Passes has it."""
        return self.logprobs_and_entropy(model, batch, temperature, entropy_gradient=False)[0]

    def logprobs_and_entropy(
        self, model: PreTrainedModel, batch: Batch, temperature: float, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """As Passes has it."""
        tokens = packed(batch, self._window)

        def computed() -> tuple[Tensor, Tensor]:
            layer, hidden_NH = output_layer.OutputLayer.of(model), self._hidden(model, tokens)
            return output_layer.logprobs_and_entropy(
                hidden_NH, layer, tokens.targets_N, temperature, entropy_gradient, self.compiled
            )

        of_tokens = _as_forward(model, computed)
        logprobs_BT, entropy_BT = (_placed(each_N, tokens, batch) for each_N in of_tokens)
        return logprobs_BT, entropy_BT

    def values(self, critic: PreTrainedModel, batch: Batch) -> Tensor:
        """As Passes has it."""
        tokens = packed(batch, self._window)
        values_N1: Tensor = _as_forward(critic, lambda: score_layer(critic)(self._hidden(critic, tokens)))
        return _placed(values_N1.squeeze(-1).float(), tokens, batch)

    def split(self, sizes: Sizes, rows: Sequence[int], budget: int) -> list[list[int]]:
        """As Passes has it; the rows of a prompt together."""
        return fill(sizes, rows, budget, shares(sizes, rows, self._window))

    def _hidden(self, model: PreTrainedModel, tokens: Tokens) -> Tensor:
        """The hidden states [N, H] that predict the tokens.

        They are looked up as embeddings are, because that adds up gradients in a fixed order.
        """
        with ExitStack() as stack:
            stack.enter_context(attending(model, tokens.segments))
            if self.compiled:
                stack.enter_context(compiled_layers(model))
            stack.enter_context(recomputing(model, within=partial(attending, model, tokens.segments)))
            output = model.base_model(
                input_ids=tokens.ids_T[None], position_ids=tokens.positions_T[None], use_cache=False
            )
        return torch.nn.functional.embedding(tokens.predicting_N, output.last_hidden_state[0])


def _as_forward(model: torch.nn.Module, computed: Callable[[], Any]) -> Any:
    """What `computed` makes of the model's parts, as if its forward did: FSDP gathers weights around that.

    On a GPU, FSDP of torch 2.11 moves the arguments there, and fails where there are none.
    """
    model.forward = lambda nothing: computed()
    try:
        return model(None)
    finally:
        del model.forward


def _placed(values_N: Tensor, tokens: Tokens, batch: Batch) -> Tensor:
    """The tokens' numbers as [B, T], 0 elsewhere."""
    flat = torch.zeros(batch.ids_BT.numel(), dtype=values_N.dtype, device=values_N.device)
    return flat.index_copy(0, tokens.places_n, values_N[: len(tokens.places_n)]).view(batch.ids_BT.shape)
