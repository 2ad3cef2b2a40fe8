"""What a run's state is, and how it becomes files: tensors as safetensors, all else as JSON; nothing is pickled.

policy/                     a plain Hugging Face folder; of a policy with an adapter, adapter/ as peft has it
<module>.safetensors        weights of the critic, the reference, a reward model
<name>.safetensors          moving averages, or what DPO's reference says of the pairs
<module>-optimizer.safetensors
<name>-00001-of-00002.safetensors  any of these, and policy's, by the ranks that have its shards (shards.py)
state.json                  step, version, epoch, attributes, random generators, position in samples.jsonl, notes
rows.jsonl                  the metrics so far
config.json                 the run's configuration
"""

from __future__ import annotations

import dataclasses
import enum
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rlhf.checkpoint.shards import Stored, stored
from transfer.agreement.dtensor import is_dtensor, local_part

MASTER = "master"  # an optimiser's fp32 copy of a weight
STEP = "step"  # how many an optimiser has taken of a weight
OPTIMIZER = "-optimizer"


class NotFiniteError(RuntimeError):
    """A state that is not worth keeping."""


@dataclass(slots=True)
class State:
    """What training changes, beside the policy's weights: the things themselves, to be saved or overwritten."""

    modules: dict[str, torch.nn.Module] = field(default_factory=dict)
    optimizers: dict[str, tuple[torch.nn.Module, torch.optim.Optimizer]] = field(default_factory=dict)
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    attributes: dict[str, tuple[Any, str]] = field(default_factory=dict)  # JSON values, by object and attribute

    def __or__(self, other: State) -> State:
        return State(**{name: getattr(self, name) | getattr(other, name) for name in self.__slots__})

    def values(self) -> dict[str, Any]:
        """The attributes as they are now."""
        return {name: getattr(owner, attribute) for name, (owner, attribute) in self.attributes.items()}

    def files(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """All tensors, not copied, by the names of their files without suffix."""
        for name, module in self.modules.items():
            yield name, weights_of(module)
        for name, (module, optimizer) in self.optimizers.items():
            yield name + OPTIMIZER, optimizer_tensors(module, optimizer)
        yield from self.tensors.items()


class Trainee(Protocol):
    """What is trained, as checkpoints see it."""

    @property
    def policy(self) -> Any: ...
    def state(self) -> State:
        """What training changes, beside the policy's weights."""


# --- tensors ----------------------------------------------------------------------------------------------------------


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, not copied; tied ones once."""
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        unique.setdefault(id(tensor), (name, tensor))
    return dict(unique.values())


def optimizer_tensors(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser over `module` holds, as `<parameter>/<key>`, with its fp32 weights where it has its own."""
    stepped, own = _stepped(optimizer), dict(module.named_parameters())
    names, state = list(stepped), optimizer.state_dict()["state"]
    tensors = {f"{names[i]}/{key}": value for i, held in state.items() for key, value in held.items()}
    masters = {name: weight for name, weight in stepped.items() if weight is not own[name]}
    return tensors | {f"{name}/{MASTER}": master.detach() for name, master in masters.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Stored]) -> None:
    """The inverse of `optimizer_tensors`; rates and the like stay those of the optimiser."""
    stepped = _stepped(optimizer)
    index = {name: i for i, name in enumerate(stepped)}
    state: dict[int, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        if key == MASTER:
            _overwrite(path, stepped[name], tensor)
        else:
            shape = torch.Size() if key == STEP else stepped[name].shape
            _check_like(path, tensor, torch.float32 if key == STEP else stepped[name].dtype, shape)
            held = torch.empty(shape, dtype=tensor.dtype) if key == STEP else torch.empty_like(stepped[name])
            tensor.read_into(held)
            state.setdefault(index[name], {})[key] = held
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _stepped(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What it steps, by the names it was given (which weights learn is no sign: while they sample, none do)."""
    groups = optimizer.param_groups
    return {
        name: weight for group in groups for name, weight in zip(group["param_names"], group["params"], strict=True)
    }


def check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    """NotFiniteError if any tensor, or this rank's shard of it, has NaN or an infinity."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(local_part(tensor.detach())).all()):
            raise NotFiniteError(f"{name}: {key} has values that are not finite")


@torch.no_grad()
def load_state(state: State, folder: Path, values: Mapping[str, Any], device: torch.device) -> None:
    """Overwrite a state with what a checkpoint's folder holds; ValueError where that is another state's."""
    from safetensors import SafetensorError

    try:
        for name, module in state.modules.items():
            load_module(module, folder, name)
        for name, (module, optimizer) in state.optimizers.items():
            with stored(folder, name + OPTIMIZER) as saved, stored(folder, name) as weights:
                load_optimizer(optimizer, saved)
                _load_masters(optimizer, module, weights)
        for name, held in state.tensors.items():
            with stored(folder, name) as saved:
                for key, tensor in saved.items():
                    held.setdefault(key, _room_for(key, tensor, state.modules.values(), device))
                    _overwrite(key, held[key], tensor)
        _set_attributes(state, values)
    except (KeyError, RuntimeError, SafetensorError, ValueError, TypeError) as error:
        raise ValueError(
            f"the checkpoint {folder} does not hold what this run trains ({error}): resume it with the model, the "
            "reward and the algorithm that it was started with"
        ) from error


@torch.no_grad()
def load_module(module: torch.nn.Module, folder: Path, name: str) -> None:
    """Overwrite a module's weights, or this rank's shards of them; KeyError, RuntimeError where it has others."""
    with stored(folder, name) as saved:
        if not saved:
            raise RuntimeError(f"it has no {name}.safetensors")
        for key, tensor in weights_of(module).items():
            shards = is_dtensor(tensor) or saved[key].of_ranks  # in fp32, and the model perhaps in bfloat16
            other = shards and {saved[key].dtype, tensor.dtype} <= {torch.float32, torch.bfloat16, torch.float16}
            _check_like(key, saved[key], saved[key].dtype if other else tensor.dtype, tensor.shape)
            saved[key].read_into(tensor)


def _load_masters(optimizer: torch.optim.Optimizer, module: torch.nn.Module, weights: Mapping[str, Stored]) -> None:
    """Of ranks with shards the weights themselves are what was stepped: masters here are those."""
    own = dict(module.named_parameters())
    for name, weight in _stepped(optimizer).items():
        if weight is not own[name] and name in weights and weights[name].of_ranks:
            _overwrite(name, weight, weights[name])


def _room_for(key: str, saved: Stored, modules: Iterable[torch.nn.Module], device: torch.device) -> Tensor:
    """For a tensor that is made of a module's: for this rank's rows of it, where those are shards."""
    for module in modules:
        like = weights_of(module).get(key)
        if like is not None and is_dtensor(like) and like.shape == saved.shape:
            return torch.empty_like(like, dtype=saved.dtype, requires_grad=False)
    return torch.empty(saved.shape, dtype=saved.dtype, device=device)


def _set_attributes(state: State, values: Mapping[str, Any]) -> None:
    for name, (owner, attribute) in state.attributes.items():
        if not _alike(getattr(owner, attribute), values[name]):
            raise RuntimeError(f"{name} is {values[name]!r:.60}")
        setattr(owner, attribute, values[name])


def _overwrite(name: str, held: Tensor, saved: Stored) -> None:
    """Copy, but nothing that would be cast or repeated; RuntimeError."""
    _check_like(name, saved, held.dtype, held.shape)
    saved.read_into(held)


def _check_like(name: str, saved: Stored, dtype: torch.dtype, shape: torch.Size) -> None:
    if saved.shape != shape or saved.dtype != dtype:
        raise RuntimeError(f"{name} is {saved.dtype} {list(saved.shape)}, and must be {dtype} {list(shape)}")


def _alike(now: Any, saved: Any) -> bool:
    """Whether a saved attribute is of the kind that it is now: a number, or what else it is; None may become any."""
    if isinstance(now, (int, float)) and not isinstance(now, bool):
        return isinstance(saved, (int, float)) and not isinstance(saved, bool)
    return now is None or saved is None or type(now) is type(saved)


# --- random generators ------------------------------------------------------------------------------------------------


def seed_python(seed: int) -> None:
    """Let Python's and numpy's global generators begin anew: a user's reward may draw from them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state() -> dict[str, Any]:
    """All random generators of this process, as JSON."""
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [state.numpy().tobytes().hex() for state in torch.cuda.get_rng_state_all()],
        "python": [version, list(internal), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
    }


def restore_random(state: Mapping[str, Any]) -> None:
    """The inverse of `random_state`; generators of GPUs that are not here are left out. ValueError of another's."""
    try:
        _restore_random(state)
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"the checkpoint's random generators cannot be restored: {error}") from error


def _restore_random(state: Mapping[str, Any]) -> None:

    def tensor(text: str) -> Tensor:
        return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

    torch.set_rng_state(tensor(state["torch"]))
    for device, text in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(tensor(text), device)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))


# --- JSON -------------------------------------------------------------------------------------------------------------


def plain(config: Any) -> Any:
    """A configuration as JSON; enums by the names by which they are chosen."""
    if isinstance(config, enum.Enum):
        return config.name
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {each.name: plain(getattr(config, each.name)) for each in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): plain(value) for key, value in config.items()}
    return [plain(value) for value in config] if isinstance(config, (list, tuple)) else config


def write_lines(path: Path, rows: list[Any]) -> None:
    """A JSON line a row."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_lines(path: Path) -> list[Any]:
    """The inverse of `write_lines`; ValueError where a line is no JSON."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except RecursionError:
        raise ValueError(f"{path.name}: nested too deeply") from None
