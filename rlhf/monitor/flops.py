"""MFU: the model FLOPs of a step's learning as a share of what the device could do in that time (docs/algorithms.md).

Counted is what a model of this shape has to compute for rows of prompt and answer, whoever does it: every row with a
prompt of its own, nothing twice. What is not known for sure is not counted at all: there is then no MFU.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf.config.algo import AlgoConfig

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from rlhf.config import RunConfig
    from rlhf.types import Rollouts

# Name of the device, as a regular expression; dense FLOP/s in bfloat16 and in float32, by NVIDIA's data sheets.
PEAKS = (
    (r"NVIDIA B200", 2250e12, 75e12),
    (r"NVIDIA (H200|H100 80GB HBM3|GH200 [0-9]+GB)", 989e12, 67e12),
    (r"NVIDIA (H200|H100) NVL", 835e12, 60e12),
    (r"NVIDIA H100 PCIe", 756e12, 51e12),
    (r"NVIDIA A100(-SXM4|-PCIE)?[- ][0-9]+GB( PCIe)?", 312e12, 19.5e12),
    (r"NVIDIA L40S", 362e12, 91.6e12),
    (r"NVIDIA GeForce RTX 4090", 165e12, 82.6e12),
)
FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers, as transformers names them
UNKNOWN = ("global_head_dim", "index_topk", "attention_layers", "layers_block_type")  # attention of another form


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens of a prompt and of its answer."""

    prompt: int
    answer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the work on a token depends on; parameters are those that it is multiplied by."""

    trained: float  # of the layers; of experts those that a token goes through
    frozen: float = 0.0  # the same, below an adapter
    output: float = 0.0  # of the output layer, for tokens that are predicted
    output_trained: bool = True
    attention: Sequence[tuple[int, int | None]] = ()  # a layer: heads x size of keys and values together; window

    def forward(self, rows: Iterable[Row]) -> float:
        """FLOPs of a pass over the rows without gradients."""
        return sum(
            2 * (self.trained + self.frozen) * (row.prompt + row.answer)
            + 2 * self.output * row.answer
            + self._attention(row)
            for row in rows
        )

    def training(self, rows: Iterable[Row]) -> float:
        """FLOPs of a pass over the rows, and of the gradients of all that learns."""
        output = (6 if self.output_trained else 4) * self.output
        return sum(
            (6 * self.trained + 4 * self.frozen) * (row.prompt + row.answer)
            + output * row.answer
            + 3 * self._attention(row)
            for row in rows
        )

    def _attention(self, row: Row) -> float:
        tokens = row.prompt + row.answer
        return sum(2.0 * size * _contexts(tokens, window) for size, window in self.attention)


def _contexts(tokens: int, window: int | None) -> float:
    """How many tokens each token sees, itself included, summed over a row."""
    seen = tokens if window is None else min(tokens, window)
    return seen * (seen + 1) / 2 + (tokens - seen) * seen


# --- models -----------------------------------------------------------------------------------------------------------


def shape_of(model: PreTrainedModel) -> Shape | None:
    """What a transformers causal LM computes; None where its layers are not all known."""
    attention = _attention_of(model.config)
    if attention is None:
        return None
    output = model.get_output_embeddings()
    of_output = set(output.modules()) if output is not None else set()
    trained = frozen = 0.0
    for module in model.modules():
        used = 0.0 if module in of_output else _used(module, model.config)
        if used is None:
            return None
        learns = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        trained, frozen = (trained + used, frozen) if learns else (trained, frozen + used)
    return Shape(
        trained=trained,
        frozen=frozen,
        output=sum(_used(module, model.config) or 0.0 for module in of_output),
        output_trained=any(p.requires_grad for module in of_output for p in module.parameters(recurse=False)),
        attention=attention,
    )


def _used(module: nn.Module, config: Any) -> float | None:
    """A module's own parameters that a token is multiplied by; None if nobody knows."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return float(module.in_features * module.out_features)
    if isinstance(module, Conv1D):
        return float(module.weight.numel())
    if isinstance(module, nn.Embedding):
        return 0.0
    found = [_of_experts(name, p.shape, config) for name, p in module.named_parameters(recurse=False) if p.ndim > 1]
    return None if None in found else float(sum(used for used in found if used is not None))


def _of_experts(name: str, shape: Sequence[int], config: Any) -> float | None:
    """The share of a parameter of experts, or of their router, that works on a token; None of any other."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((count for each in names if isinstance(count := getattr(config, each, None), int)), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    if experts is None or not isinstance(chosen, int) or shape[0] != experts:
        return None
    if name.endswith("bias"):
        return 0.0
    if len(shape) == 2:
        return float(experts * shape[1])
    return float(chosen * shape[1] * shape[2]) if len(shape) == 3 else None


def _attention_of(config: Any) -> list[tuple[int, int | None]] | None:
    """For each layer, heads x (size of a key + size of a value), and how many tokens it sees at most."""
    heads, layers = getattr(config, "num_attention_heads", None), getattr(config, "num_hidden_layers", None)
    if not (isinstance(heads, int) and isinstance(layers, int)) or config.get_text_config() is not config:
        return None
    if any(getattr(config, name, None) for name in UNKNOWN) or getattr(config, "is_encoder_decoder", False):
        return None
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if kinds is None:
        kinds = [SLIDING if window else FULL] * layers
    size = _head_sizes(config, heads)
    if size is None or len(kinds) != layers or not set(kinds) <= {FULL, SLIDING}:
        return None
    return [(heads * size, window if kind == SLIDING else None) for kind in kinds]


def _head_sizes(config: Any, heads: int) -> int | None:
    """The size of a key and of a value together."""
    if getattr(config, "kv_lora_rank", None):  # multi-head latent attention has its own
        sizes = [getattr(config, name, None) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")]
        return sum(sizes) if all(isinstance(size, int) for size in sizes) else None  # type: ignore[arg-type]
    size = getattr(config, "head_dim", None)
    if size is None and config.hidden_size % heads == 0:
        size = config.hidden_size // heads
    return 2 * size if isinstance(size, int) else None


# --- devices ----------------------------------------------------------------------------------------------------------


def peak_of(name: str, half: bool) -> float | None:
    """Dense FLOP/s of the device of this name, in bfloat16 (`half`) or float32; None of one that is not known."""
    found = next((peaks for pattern, *peaks in PEAKS if re.fullmatch(pattern, name)), None)
    return found[0 if half else 1] if found else None


def _peak(policy: PreTrainedModel) -> float | None:
    import torch

    from rlhf.models.device import device_of

    exact = torch.get_float32_matmul_precision() == "highest"  # else products of float32 are not of float32
    device = device_of(policy)
    if device.type != "cuda" or not (exact or policy.dtype != torch.float32):
        return None
    return peak_of(torch.cuda.get_device_name(device), half=policy.dtype != torch.float32)


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """What a run's learning computes, and how much its device could."""

    shape: Shape
    peak: float  # FLOP/s
    reference: bool = False  # whether a reference policy looks at the rows, too
    critic: bool = False
    updates: int = 1  # a step: those after the first need old log-probs

    @classmethod
    def of(cls, policy: PreTrainedModel, config: RunConfig) -> Meter | None:
        """None where the policy or its device is not known."""
        peak = _peak(policy)
        shape = shape_of(policy) if peak is not None else None
        if peak is None or shape is None:
            return None
        if not isinstance(config.algo, AlgoConfig):
            return cls(shape=shape, peak=peak)
        critic = config.algo.has_critic
        return cls(
            shape=shape,
            peak=peak,
            reference=config.algo.kl_coef > 0,
            critic=critic,
            updates=config.updates_per_step,
        )

    def flops(self, rows: Sequence[Row], later: Sequence[Row] = ()) -> float:
        """Of one step on these rows, of which those of `later` are in no first update."""
        total = self.shape.training(rows) + self.shape.forward(later)
        if self.reference:
            total += self.shape.forward(rows)
        if self.critic:
            critic = Shape(trained=self.shape.trained + self.shape.frozen, attention=self.shape.attention)
            total += critic.training(rows) + critic.forward(rows)
        return total

    def mfu(self, rows: Sequence[Row], seconds: float, later: Sequence[Row] = ()) -> float:
        """The share of the device's peak at which a step's learning, of so many seconds, was computed."""
        return self.flops(rows, later) / seconds / self.peak

    def of_step(self, rollouts: Rollouts, seconds: float) -> float:
        """The same of samples that were learned from."""
        rows = [
            Row(len(prompt.ids if completion.prompt is None else completion.prompt), len(completion.ids))
            for prompt, completion in zip(rollouts.prompts_B, rollouts.completions, strict=True)
        ]
        earlier = [each for completion in rollouts.completions for each in completion.earlier]
        rows += [Row(len(each.prompt or ()), len(each.ids)) for each in earlier]
        first = len(rollouts.prompts) // self.updates * rollouts.samples_per_prompt
        return self.mfu(rows, seconds, rows[first:] if self.updates > 1 else ())
