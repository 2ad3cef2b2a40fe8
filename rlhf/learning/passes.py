"""How a model computes rows, in one of two ways with the same results: padded (forward.py), or packed, which GPUs like.

Packed rows lie behind each other without padding (packing.py), attention goes by their lengths (packed_attention.py),
log-probs come straight from hidden states (output_layer.py), and decoder layers may be compiled (compiled_layers.py).
Before a run trusts it, a model has to give the log-probs of the padded way (`choose_passes`).

Shapes: P prompts, B rows, T response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.config.model import AUTO, ModelConfig
from rlhf.learning import forward, output_layer
from rlhf.learning.compiled_layers import compiled_layers, decoder_layers
from rlhf.learning.forward import Batch
from rlhf.learning.microbatches import Sizes, fill, split
from rlhf.learning.packed_attention import Unsupported, attending, window_of
from rlhf.learning.packing import Tokens, packed, shares
from rlhf.learning.recompute import recomputing
from rlhf.models import score_layer

TOLERANCE = {torch.float32: 1e-3}  # of log-probs in a trial, as a share of their spread;
HALF_TOLERANCE = 0.1  # in bfloat16 and float16, whose own error is about a tenth of it


class Passes(Protocol):
    """What a learner asks of a model."""

    def logprobs(self, model: PreTrainedModel, batch: Batch, temperature: float) -> Tensor:
        """log pi [B, T] of each response token under softmax(logits / temperature); 0 at padding."""

    def logprobs_and_entropy(
        self, model: PreTrainedModel, batch: Batch, temperature: float, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """The same, and the entropy [B, T] at each of them, in nats, with a gradient if asked for."""

    def values(self, critic: PreTrainedModel, batch: Batch) -> Tensor:
        """What a critic says before each response token [B, T]; 0 at padding."""

    def split(self, sizes: Sizes, rows: Sequence[int], budget: int) -> list[list[int]]:
        """The rows in micro-batches of at most `budget` tokens, or one row."""


class Padded:
    """Rows as tensors, prompts padded on the left and responses on the right: for any model, device and dtype."""

    def logprobs(self, model: PreTrainedModel, batch: Batch, temperature: float) -> Tensor:
        """As Passes has it."""
        return forward.response_logprobs(model, batch, temperature)

    def logprobs_and_entropy(
        self, model: PreTrainedModel, batch: Batch, temperature: float, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """As Passes has it."""
        return forward.logprobs_and_entropy(model, batch, temperature, entropy_gradient)

    def values(self, critic: PreTrainedModel, batch: Batch) -> Tensor:
        """As Passes has it."""
        return forward.response_values(critic, batch)

    def split(self, sizes: Sizes, rows: Sequence[int], budget: int) -> list[list[int]]:
        """As Passes has it."""
        return split(sizes, rows, budget)


PADDED = Padded()


class Packed:
    """Rows as one sequence of tokens; `window`: the fewest tokens that a layer of the policy sees."""

    def __init__(self, compiled: bool, window: int | None = None) -> None:
        self.compiled = compiled
        self._window = window

    def logprobs(self, model: PreTrainedModel, batch: Batch, temperature: float) -> Tensor:
        """As Passes has it."""
        return self.logprobs_and_entropy(model, batch, temperature, entropy_gradient=False)[0]

    def logprobs_and_entropy(
        self, model: PreTrainedModel, batch: Batch, temperature: float, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """As Passes has it."""
        tokens = packed(batch, self._window)
        layer, hidden_NH = output_layer.OutputLayer.of(model), self._hidden(model, tokens)
        of_tokens = output_layer.logprobs_and_entropy(
            hidden_NH, layer, tokens.targets_N, temperature, entropy_gradient, self.compiled
        )
        logprobs_BT, entropy_BT = (_placed(each_N, tokens, batch) for each_N in of_tokens)
        return logprobs_BT, entropy_BT

    def values(self, critic: PreTrainedModel, batch: Batch) -> Tensor:
        """As Passes has it."""
        tokens = packed(batch, self._window)
        return _placed(score_layer(critic)(self._hidden(critic, tokens)).squeeze(-1).float(), tokens, batch)

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


def _placed(values_N: Tensor, tokens: Tokens, batch: Batch) -> Tensor:
    """The tokens' numbers as [B, T], 0 elsewhere."""
    flat = torch.zeros(batch.ids_BT.numel(), dtype=values_N.dtype, device=values_N.device)
    return flat.index_copy(0, tokens.places_n, values_N[: len(tokens.places_n)]).view(batch.ids_BT.shape)


# --- the choice -------------------------------------------------------------------------------------------------------


def choose_passes(policy: PreTrainedModel, config: ModelConfig, say: Callable[[str], None]) -> Passes:
    """The way that the configuration names; by `auto` packed on a GPU where the policy then says the same as padded.

    ValueError where model.attention=packed or model.compile=true is asked for, and cannot be.
    """
    asked = config.attention == "packed"
    parameter = next(policy.parameters())
    if not asked and not (config.attention == AUTO and parameter.is_cuda and parameter.dtype != torch.float32):
        if config.compile is True:
            raise ValueError(
                "model.compile=true compiles packed rows: set model.attention=packed, or model.compile=auto "
                f"(got model.attention={config.attention} on {parameter.device.type}, {parameter.dtype})"
            )
        return PADDED
    found, faults = _tried(policy, config)
    if found is None and asked:
        raise ValueError(f"model.attention=packed: {faults[-1]}: set model.attention=auto or sdpa")
    if found is None:
        say(f"learner: rows are padded, not packed: {faults[-1]}")
        return PADDED
    if faults:
        say(f"learner: decoder layers are not compiled: {faults[0]}")
    return found


def _tried(policy: PreTrainedModel, config: ModelConfig) -> tuple[Packed | None, list[str]]:
    """The first packed way that passes its trial, and what was wrong with those before it."""
    faults: list[str] = []
    try:
        window = window_of(policy)
    except Unsupported as error:
        return None, [str(error)]
    for compiled in [True] if config.compile is True else [True, False] if _compiles(policy, config) else [False]:
        passes = Packed(compiled, window)
        fault = trial(policy, passes)
        if fault is None:
            return passes, faults
        faults.append(fault)
    return None, faults


def _compiles(policy: PreTrainedModel, config: ModelConfig) -> bool:
    """Whether `auto` compiles: on a GPU, where transformers says which layers are repeated."""
    return config.compile == AUTO and next(policy.parameters()).is_cuda and bool(decoder_layers(policy))


@torch.no_grad()
def trial(policy: PreTrainedModel, passes: Passes) -> str | None:
    """Why this way is none for the policy: what it raises, or how far its log-probs are from those of padded rows."""
    batch = _few_rows(policy)
    try:
        ours_BT = passes.logprobs(policy, batch, 1.0)
    except Unsupported as error:
        return str(error)
    except Exception as error:  # a model's own code, or a compiler, may raise anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    theirs_BT = PADDED.logprobs(policy, batch, 1.0)
    counts = batch.mask_BT.bool()
    theirs, gap = theirs_BT[counts], (ours_BT - theirs_BT)[counts]
    share = float(gap.norm() / (theirs - theirs.mean()).norm().clamp(min=1e-6))
    if share <= TOLERANCE.get(policy.dtype, HALF_TOLERANCE):
        return None
    name = type(policy).__name__
    return f"packed rows of {name} have other log-probs than padded ones (by {share:.0%} of their spread)"


def _few_rows(policy: PreTrainedModel) -> Batch:
    """Three prompts with five rows each, of many lengths."""
    lengths = [3, 1, 23, 8, 14, 2, 19, 1, 7, 11, 22, 5, 16, 4, 9]
    return random_batch(policy, [17, 5, 11], [b // 5 for b in range(15)], lengths)


def random_batch(
    model: PreTrainedModel, prompts: Sequence[int], prompt_of_B: Sequence[int], responses: Sequence[int]
) -> Batch:
    """Random tokens: prompts and responses of these lengths; the same for the same model."""
    generator = torch.Generator().manual_seed(0)
    device, vocabulary = next(model.parameters()).device, model.config.get_text_config().vocab_size
    lengths_B = torch.tensor(responses, device=device)
    size = len(responses), max(responses)
    mask_BT = (torch.arange(size[1], device=device) < lengths_B[:, None]).float()
    return Batch(
        prompts=[tuple(torch.randint(0, vocabulary, (n,), generator=generator).tolist()) for n in prompts],
        prompt_of_B=list(prompt_of_B),
        ids_BT=torch.randint(0, vocabulary, size, generator=generator).to(device),
        mask_BT=mask_BT,
        sampled_BT=torch.zeros_like(mask_BT),
        truncated_B=torch.zeros_like(lengths_B, dtype=torch.bool),
        measured_B=torch.zeros_like(lengths_B, dtype=torch.bool),
    )
