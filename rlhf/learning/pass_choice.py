"""Which way a run's models compute rows (passes.py): what is asked for, or packed where that is sure to be right.

Before a run trusts packed rows, its policy has to give the log-probs of padded ones on a few, and a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from rlhf.config.model import AUTO, ModelConfig
from rlhf.learning.compiled_layers import decoder_layers
from rlhf.learning.flash_attention import LARGEST_HEAD
from rlhf.learning.forward import Batch
from rlhf.learning.packed_attention import Unsupported, window_of
from rlhf.learning.passes import PADDED, Packed, Passes
from rlhf.models.device import device_of

TOLERANCE = {torch.float32: 1e-3}  # of log-probs in a trial, as a share of their spread;
HALF_TOLERANCE = 0.1  # in bfloat16 and float16, whose own error is about a tenth of it


def check_passes(policy: PreTrainedModel, config: ModelConfig, padded: Passes = PADDED) -> None:
    """ValueError, before anything is trained, where model.attention=packed or model.compile=true cannot be.

    `padded`: the way to compute padded rows that is right for the policy, here as below.
    """
    if config.compile is True and not _wanted(policy, config):
        parameter = next(policy.parameters())
        raise ValueError(
            "model.compile=true compiles packed rows: set model.attention=packed, or model.compile=auto "
            f"(got model.attention={config.attention} on {parameter.device.type}, {parameter.dtype})"
        )
    if config.attention == "packed" and (fault := _fault(policy, padded)) is not None:
        raise ValueError(f"model.attention=packed: {fault}: set model.attention=auto or sdpa")


def choose_passes(
    policy: PreTrainedModel, config: ModelConfig, say: Callable[[str], None], padded: Passes = PADDED
) -> Passes:
    """The way that the configuration names; by `auto` packed on a GPU where the policy then says the same as padded.

    ValueError where what is asked for cannot be; where `auto` has to do without something, one line says why.
    """
    check_passes(policy, config, padded)
    if not _wanted(policy, config):
        return padded
    asked = config.attention == "packed"
    fault = None if asked else _no_flash(policy) or _fault(policy, padded)
    if fault is not None:
        say(f"learner: rows are padded, not packed: {fault}")
        return padded
    window = window_of(policy)
    if not _compiles(policy, config):
        return Packed(False, window)
    fault = trial(policy, Packed(True, window), padded)
    if fault is None:
        return Packed(True, window)
    if config.compile is True:
        raise ValueError(f"model.compile=true: {fault}: set model.compile=auto or false")
    say(f"learner: decoder layers are not compiled: {fault}")
    return Packed(False, window)


def announce(passes: Passes, tokens: int, measured: int | None, say: Callable[[str], None]) -> None:
    """Say what `auto` has decided, where that is not the same on every machine; `measured`: tokens that fit the GPU."""
    if isinstance(passes, Packed):
        layers = "compiled" if passes.compiled else "not compiled"
        size = f"{measured:,} tokens a micro-batch, as measured" if measured else f"{tokens:,} tokens a micro-batch"
        say(f"learner: rows packed, decoder layers {layers}, {size}")


def _wanted(policy: PreTrainedModel, config: ModelConfig) -> bool:
    """Whether rows are to be packed, if that can be."""
    parameter = next(policy.parameters())
    gpu = parameter.is_cuda and parameter.dtype != torch.float32
    return config.attention == "packed" or (config.attention == AUTO and gpu)


def _compiles(policy: PreTrainedModel, config: ModelConfig) -> bool:
    """`auto` compiles on a GPU, where transformers says which layers are repeated."""
    by_itself = next(policy.parameters()).is_cuda and bool(decoder_layers(policy))
    return by_itself if config.compile == AUTO else bool(config.compile)


def _no_flash(policy: PreTrainedModel) -> str | None:
    """Why FlashAttention does not take the policy's heads; without it padded rows are faster."""
    config = policy.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    if not size:
        return f"{type(policy).__name__} has no attention heads that its configuration tells of"
    if size <= LARGEST_HEAD and not size % 8:
        return None
    return f"FlashAttention takes heads of 8 to {LARGEST_HEAD} numbers, in steps of 8, and these have {size}"


def _fault(policy: PreTrainedModel, padded: Passes) -> str | None:
    """Why the policy's rows cannot be packed; None if they can."""
    try:
        return trial(policy, Packed(False, window_of(policy)), padded)
    except Unsupported as error:
        return str(error)


def trial(policy: PreTrainedModel, passes: Passes, padded: Passes = PADDED) -> str | None:
    """Why this way is none for the policy: what it raises, or how far its log-probs are from those of padded rows."""
    batch = _few_rows(policy)
    try:
        with torch.enable_grad():
            ours_BT = passes.logprobs(policy, batch, 1.0)
            torch.autograd.grad(ours_BT.sum(), next(p for p in policy.parameters() if p.requires_grad))
    except Unsupported as error:
        return str(error)
    except Exception as error:  # a model's own code, or a compiler, may raise anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    with torch.no_grad():
        theirs_BT = padded.logprobs(policy, batch, 1.0)
    counts = batch.mask_BT.bool()
    theirs, gap = theirs_BT[counts], (ours_BT.detach() - theirs_BT)[counts]
    share = float(gap.norm() / (theirs - theirs.mean()).norm().clamp(min=1e-6))
    if share <= TOLERANCE.get(policy.dtype, HALF_TOLERANCE):
        return None
    name = type(policy).__name__
    return f"packed rows of {name} have other log-probs than padded ones (by {share:.0%} of their spread)"


def context_of(model: PreTrainedModel) -> int:
    """Positions that the model has at most."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**20)


def _few_rows(policy: PreTrainedModel) -> Batch:
    """Three prompts with five rows each, of many lengths."""
    lengths = [3, 1, 23, 8, 14, 2, 19, 1, 7, 11, 22, 5, 16, 4, 9]
    half = max(1, context_of(policy) // 2)
    prompts, responses = ([min(length, half) for length in each] for each in ([17, 5, 11], lengths))
    return random_batch(policy, prompts, [b // 5 for b in range(15)], responses)


def random_batch(
    model: PreTrainedModel, prompts: Sequence[int], prompt_of_B: Sequence[int], responses: Sequence[int]
) -> Batch:
    """Random tokens: prompts and responses of these lengths; the same for the same model."""
    generator = torch.Generator().manual_seed(0)
    device, vocabulary = device_of(model), model.config.get_text_config().vocab_size
    special = torch.tensor(_special_tokens(model), dtype=torch.long)

    def drawn(*size: int) -> torch.Tensor:
        ids = torch.randint(0, vocabulary, size, generator=generator)
        while bool((there := torch.isin(ids, special)).any()):
            ids = torch.where(there, (ids + 1) % vocabulary, ids)
        return ids

    lengths_B = torch.tensor(responses, device=device)
    size = len(responses), max(responses)
    mask_BT = (torch.arange(size[1], device=device) < lengths_B[:, None]).float()
    return Batch(
        prompts=[tuple(drawn(n).tolist()) for n in prompts],
        prompt_of_B=list(prompt_of_B),
        ids_BT=drawn(*size).to(device),
        mask_BT=mask_BT,
        sampled_BT=torch.zeros_like(mask_BT),
        truncated_B=torch.zeros_like(lengths_B, dtype=torch.bool),
        measured_B=torch.zeros_like(lengths_B, dtype=torch.bool),
    )


def _special_tokens(model: PreTrainedModel) -> list[int]:
    """Ids that stand for something, such as an image, by the model's configuration."""
    configs = (model.config, model.config.get_text_config())
    told = {name: value for config in configs for name, value in vars(config).items()}
    named = [value for name, value in told.items() if name.endswith(("token_id", "token_index"))]
    every = [each for value in named for each in (value if isinstance(value, list) else [value])]
    return [each for each in every if isinstance(each, int)]
