"""LoRA (arXiv:2106.09685) by peft: an adapter in the linear layers of a model learns, and the base stays as it is.

The base is what the policy was before RL. Trainer and workers each hold it, and an update carries the adapter alone;
without its adapter the policy is its own reference. peft is imported where an adapter is made, and only there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf.config import LoraConfig
from rlhf.models.loading import load_weights
from transfer.agreement.shown import one_line
from transfer.memory.digest import XXH3, digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "default"  # peft's name of an only adapter
PARTS = (f".lora_A.{NAME}.", f".lora_B.{NAME}.")  # in the names of an adapter's weights
READ_BY_KERNELS = ("x_proj", "dt_proj", "out_proj")
BASE = ".base_layer"  # peft's addition to the names of a layer that has an adapter


@dataclass(slots=True)
class AdapterSpec:
    """What a worker makes its adapter and its base from, as JSON."""

    rank: int
    alpha: float
    target: list[str]
    base: str  # a folder or a hub name, as `from_pretrained` takes it
    digest: str = ""  # of the base's weights in the worker's dtype; empty: nobody compares


def add_adapter(model: PreTrainedModel, rank: int, alpha: float, target: list[str], seed: int = 0) -> None:
    """Give the model an adapter, which at first changes nothing; from now on only the adapter learns.

    `target` names linear layers, none means all but the output layer; ValueError if the model has no such layer, or
    takes no adapter there.
    """
    import peft

    known = linear_layers(model)
    if not known:
        raise ValueError(f"model.lora.rank: {type(model).__name__} has no linear layers to adapt: set it to 0")
    if unknown := [name for name in target if name not in known]:
        raise ValueError(
            f"model.lora.target must be among the linear layers of {type(model).__name__}: {', '.join(known)} "
            f"(got {', '.join(unknown)})"
        )
    layers, turned = _targets(model, target or known)
    told: Any = {"r": rank, "lora_alpha": alpha, "target_modules": layers, "fan_in_fan_out": turned}
    config = peft.LoraConfig(**told)
    learning = any(parameter.requires_grad for parameter in model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(config, model, NAME)  # type: ignore[arg-type]
        except ValueError as error:
            said = one_line(str(error), 200)
            raise ValueError(f"model.lora: {type(model).__name__} takes no adapter: {said}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learning and _of_adapter(name))
    model.eval()


def remove_adapter(model: PreTrainedModel) -> None:
    """The model is its base again, and all of it learns."""
    for path, layer in layers_of(model):
        if not path.endswith(BASE):  # of adapters around each other the outermost
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer.get_base_layer())
    del model.peft_config
    model.requires_grad_(True)


def linear_layers(model: PreTrainedModel) -> list[str]:
    """The names, without their path, of all linear layers but the output layer."""
    return sorted({name.rpartition(".")[2] for name in _linear(model)})


def _linear(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """By path, the layers that multiply by a weight, and do nothing else with it.

    Left out are those of a Mamba mixer whose weights its kernels read, past an adapter.
    """
    output = model.get_output_embeddings()
    mixers = [path for path, module in model.named_modules() if hasattr(module, "conv1d") and hasattr(module, "D")]
    read = {f"{path}.{name}" for path in mixers for name in READ_BY_KERNELS}
    return {
        path: module
        for path, module in model.named_modules()
        if module is not output and path not in read and _multiplies(module)
    }


@torch.no_grad()
def _multiplies(module: torch.nn.Module) -> bool:
    """Whether it is a linear layer; subclasses may be more, such as routers, so that these are tried."""
    from transformers.pytorch_utils import Conv1D

    if not isinstance(module, torch.nn.Linear):
        return isinstance(module, Conv1D)
    if type(module).forward is torch.nn.Linear.forward:
        return True
    vector = torch.ones(1, 1, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    try:
        product = module(vector)
    except Exception:  # it wants something else
        return False
    same = torch.nn.functional.linear(vector, module.weight, module.bias)
    if not isinstance(product, torch.Tensor) or product.shape != same.shape:
        return False
    return product.is_meta or torch.allclose(product, same, rtol=0.05, atol=float(same.abs().max()) * 0.05)


def _targets(model: PreTrainedModel, names: list[str]) -> tuple[list[str], bool]:
    """What peft is told to adapt: the names, or whole paths where others have these names, too; and whether all the
    weights are turned round (GPT-2's [in, out])."""
    linear = _linear(model)
    chosen = {path: layer for path, layer in linear.items() if path.rpartition(".")[2] in names}
    others = {path.rpartition(".")[2] for path, _ in model.named_modules() if path not in chosen}
    turned = not any(isinstance(layer, torch.nn.Linear) for layer in chosen.values())
    return (list(chosen) if others & set(names) else names), turned


def has_adapter(model: torch.nn.Module) -> bool:
    """Whether the model has an adapter."""
    return any(_of_adapter(name) for name, _ in model.named_parameters())


def sent_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """What an update carries, not copied: the adapter's weights, or all parameters and persistent buffers."""
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if _of_adapter(name)} or state


def receiving(model: torch.nn.Module) -> Any:
    """What an update of the model arrives in, for `make_receiver`: the model, or its adapter."""
    return Receiving(model) if has_adapter(model) else model


class Receiving:
    """The adapter of a model, as a module of its own would look."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def state_dict(self, *, keep_vars: bool = False) -> dict[str, Tensor]:
        """The tensors by name, not copied."""
        return sent_weights(self._model)


def layers_of(model: torch.nn.Module, shared: bool = False) -> list[tuple[str, Any]]:
    """peft's layers by their paths; `shared`: one that has several by each."""
    every = model.named_modules(remove_duplicate=not shared)
    return [(path, module) for path, module in every if hasattr(module, "lora_A")]


@contextmanager
def without_adapter(model: torch.nn.Module) -> Iterator[None]:
    """The model is its base inside; what learns is the same afterwards."""
    layers = [layer for _, layer in layers_of(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def base_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers without the adapter, named as if there had never been one; not copied."""
    state = model.state_dict(keep_vars=True)
    return {name.replace(BASE, ""): tensor for name, tensor in state.items() if not _of_adapter(name)}


def base_digest(model: torch.nn.Module, dtype: torch.dtype) -> str:
    """The digest of the base's weights, cast to `dtype`, in the order of their names."""
    weights = base_weights(model)
    cast = (weights[n].detach() for n in sorted(weights))
    return digest_of((t.to(dtype) if t.is_floating_point() else t for t in cast), like=XXH3)


def save_adapter(policy: PreTrainedModel, folder: Path, base: str) -> None:
    """Write the adapter as peft does: `PeftModel.from_pretrained(a model from base, folder)` loads it."""
    from safetensors.torch import save_file

    config: Any = copy.copy(policy.peft_config[NAME])  # type: ignore[operator, index]
    config.task_type, config.base_model_name_or_path, config.inference_mode = "CAUSAL_LM", base, True
    config.save_pretrained(str(folder))
    weights = {_peft_name(name): tensor.detach().contiguous() for name, tensor in sent_weights(policy).items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def load_adapter(policy: PreTrainedModel, folder: Path) -> None:
    """Overwrite the policy's adapter with one that `save_adapter` wrote; ValueError if it is of another shape."""
    from safetensors.torch import load_file

    saved = load_file(folder / "adapter_model.safetensors")
    for name, tensor in sent_weights(policy).items():
        kept = saved.get(_peft_name(name))
        if kept is None or kept.shape != tensor.shape:
            raise ValueError(f"the adapter in {folder} has no {name} of shape {list(tensor.shape)}: another model's?")
        tensor.data.copy_(kept)


def load_base(spec: AdapterSpec, **options: Any) -> PreTrainedModel:
    """A worker's model, on the CPU: the base, and an adapter whose weights are nothing yet.

    ValueError where the base is not the trainer's.
    """
    from transformers import AutoModelForCausalLM

    model = load_weights(AutoModelForCausalLM, spec.base, "the worker's adapter.base", **options)
    found = base_digest(model, options["dtype"])
    if spec.digest and found != spec.digest:
        raise ValueError(
            f"the weights of {spec.base} have the digest {found}, and those that the trainer's adapter builds on "
            f"{spec.digest}"
        )
    add_adapter(model, spec.rank, spec.alpha, spec.target)
    return model


def spec_of(policy: PreTrainedModel, lora: LoraConfig, base: str, dtype: torch.dtype) -> dict[str, Any]:
    """The AdapterSpec of the policy, as JSON, for workers that compute in `dtype`."""
    return asdict(AdapterSpec(lora.rank, lora.alpha, lora.target, base, base_digest(policy, dtype)))


def _peft_name(name: str) -> str:
    """What peft calls a weight of an adapter in a file."""
    return f"base_model.model.{name.replace(f'.{NAME}.', '.')}"


def _of_adapter(name: str) -> bool:
    return any(part in name for part in PARTS)
