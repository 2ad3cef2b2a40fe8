"""The policy and its tokenizer."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from rlhf.config.rules import at_least, one_of
from transfer.agreement.shown import shown
from transfer.config import positive


class Precision(enum.Enum):
    """The dtype of a model's weights and arithmetic."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Device(enum.Enum):
    """Where models live; auto takes a GPU when there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


AUTO = "auto"  # a dial that the machine decides; what it decided is in a run's first lines


@dataclass(slots=True, kw_only=True)
class LoraConfig:
    """A low-rank adapter (arXiv:2106.09685) that RL and DPO train in the policy's place; it has no dropout."""

    rank: int = 0  # 0: none, all weights are trained
    alpha: float = 16.0  # what the adapter adds is scaled by alpha / rank
    target: list[str] = field(default_factory=list)  # linear layers, like q_proj; none: all but the output layer

    def __post_init__(self) -> None:
        at_least("model.lora.rank", self.rank, 0)
        positive("model.lora.alpha", self.alpha)


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """The policy."""

    dtype: Precision = Precision.float32  # of weights and arithmetic; optim.master_weights has what is stepped
    save_dtype: Precision | None = None  # of the saved policy/ and reward_model/; null: the checkpoint's, or as trained
    device: Device = Device.auto
    attention: str = AUTO  # packed: rows behind each other, without padding; the others are transformers', rows padded.
    # auto: packed on a GPU in bfloat16, where the model allows it, else sdpa, else eager
    compile: Any = (
        AUTO  # decoder layers of packed rows through torch.compile; auto: on a GPU, where the model allows it
    )
    gradient_checkpointing: bool = False  # compute each layer twice, and keep less between: memory for time
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        one_of("model.attention", self.attention, (AUTO, "packed", "sdpa", "eager", "flash_attention_2"))
        if not (isinstance(self.compile, bool) or self.compile == AUTO):
            raise ValueError(f"model.compile must be auto, true or false (got {shown(self.compile)})")
        if self.compile is True and self.attention not in (AUTO, "packed"):
            raise ValueError(
                f"model.compile=true compiles packed rows: set model.attention=packed, or model.compile=auto "
                f"(got model.attention={self.attention})"
            )

    @property
    def implementation(self) -> str | None:
        """transformers' attn_implementation, of all but packed rows; None: sdpa, or eager where a model has no sdpa."""
        return None if self.attention in (AUTO, "packed") else self.attention


@dataclass(slots=True, kw_only=True)
class TinyModelConfig(ModelConfig):
    """A transformers architecture made from these numbers, with a character-level tokenizer made from the task."""

    architecture: str = "qwen3"  # or llama, mistral
    layers: int = 3
    hidden: int = 64
    heads: int = 4
    intermediate: int = 192
    context: int = 512  # positions

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        for key in ("layers", "hidden", "heads", "intermediate", "context"):
            at_least(f"model.{key}", getattr(self, key), 1)
        if self.hidden % self.heads:
            raise ValueError(f"model.hidden must be a multiple of model.heads (got {self.hidden} and {self.heads})")


@dataclass(slots=True, kw_only=True)
class HfModelConfig(ModelConfig):
    """Any transformers causal LM with its tokenizer."""

    path: str  # a folder, or a name on the Hugging Face hub
    trust_remote_code: bool = False  # run the code that a checkpoint brings along (auto_map in its config.json)


@dataclass(slots=True, kw_only=True)
class GivenModelConfig(ModelConfig):
    """A model of a Python program: `rlhf.train(config, policy=model)`, whose dtype is the policy's."""
