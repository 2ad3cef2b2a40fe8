"""What is written of a model: its weights, and as it came whatever its checkpoint brought that nobody trains.

A checkpoint for a resume has the policy's weights exactly (`save_model`); the policy and the reward model that a run
leaves have the dtype that their checkpoint had, each tensor its own (`export_model`), unless a dial says otherwise.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import Precision
from rlhf.models.stop_tokens import as_config, stop_ids
from transfer.agreement.dtensor import full, is_dtensor

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"  # transformers looks for them in this order,
ELSEWHERE = "transformers_weights"  # unless config.json has this key
TOKENIZER = (  # what a tokenizer or a processor is made from, and a model's own code
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "*.jinja", "additional_chat_templates/*.jinja", "chat_template.json", "*processor_config.json", "*.py",
)  # fmt: skip
BROUGHT = (*TOKENIZER, CONFIG, GENERATION, "LICENSE*", "NOTICE*")
ATTRIBUTE = "checkpoint"  # of a tokenizer
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names, and torch's


@dataclass(slots=True)
class Brought:
    """A checkpoint's small files by name, as they were when it was loaded, and its tensors' dtypes."""

    folder: Path
    files: dict[str, bytes]
    dtypes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_pretrained(cls, path: str, local_files_only: bool, trust_remote_code: bool) -> Brought:
        """What a folder or a repository of the hub has, no code of which is run; ValueError where its JSON is none.

        Not which dtypes: its weights may not be here yet.
        """
        from huggingface_hub import snapshot_download

        folder = Path(path)
        if not folder.is_dir():
            folder = Path(snapshot_download(path, allow_patterns=list(BROUGHT), local_files_only=local_files_only))
        paths = sorted({path for pattern in BROUGHT for path in folder.glob(pattern) if path.is_file()})
        brought = cls(folder, {str(path.relative_to(folder)): path.read_bytes() for path in paths})
        _ = brought.config, brought.generation
        return brought

    def look_at_weights(self) -> None:
        """Note which dtype each tensor has in the safetensors that transformers has loaded.

        Nothing is known of other formats, and what else is in the folder (an original's weights, say) tells nothing.
        """
        named = self.config.get(ELSEWHERE)
        there = (name for name in ([named] if named else [WEIGHTS, INDEX]) if (self.folder / name).is_file())
        name = next(there, "")
        if name.endswith(".index.json"):
            parts = sorted(set(_read((self.folder / name).read_bytes())["weight_map"].values()))
        else:
            parts = [name] if name.endswith(".safetensors") else []
        for part in parts:
            self.dtypes |= _dtypes(self.folder / part)

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return self._json(CONFIG)

    @property
    def generation(self) -> dict[str, Any]:
        """Its generation_config.json."""
        return self._json(GENERATION)

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return _read(self.files.get(name, b"{}"))
        except ValueError as error:
            raise ValueError(f"{name} is not JSON: {error}") from None

    @property
    def dtype(self) -> str | None:
        """That of most tensors, else what config.json says; None where nobody says."""
        most = Counter(self.dtypes.values()).most_common(1)
        return most[0][0] if most else self.config.get("dtype") or self.config.get("torch_dtype")

    def is_of(self, model: PreTrainedModel) -> bool:
        """Whether its config.json is the model's, so that it holds for new weights, too."""
        made = self.config.get("architectures") or [type(model).__name__]
        same = self.config.get("model_type") == model.config.model_type and type(model).__name__ in made
        return same and "quantization_config" not in self.config


def carry(tokenizer: Any, brought: Brought) -> None:
    """Let a checkpoint's tokenizer carry what else the checkpoint has."""
    setattr(tokenizer, ATTRIBUTE, brought)


def brought_by(tokenizer: Any) -> Brought | None:
    """What came with a tokenizer; None of one that was made here."""
    return getattr(tokenizer, ATTRIBUTE, None)


def saved_dtype(model: PreTrainedModel, tokenizer: Any, dtype: Precision | None) -> str:
    """In which dtype `export_model` writes the model's tensors, or most of them."""
    brought = brought_by(tokenizer)
    found = dtype.value if dtype is not None else brought.dtype if brought is not None else None
    return found or str(model.dtype).removeprefix("torch.")


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a policy or a reward model, exactly, as a plain Hugging Face folder, which `from_pretrained` loads."""
    _save(model, tokenizer, folder, None, str(model.dtype).removeprefix("torch."))


def export_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: Precision | None
) -> None:
    """The same in this dtype; None: each tensor in that of the checkpoint that it came from, else in its own."""
    brought, most = brought_by(tokenizer), saved_dtype(model, tokenizer, dtype)
    known = brought.dtypes if brought is not None and dtype is None else {}
    says = None if brought is not None and dtype is None and brought.is_of(model) else most
    _save(model, tokenizer, folder, _cast(model, lambda name: known.get(name, most)), says)


def help_export(model: PreTrainedModel) -> None:
    """In all ranks but the first, which exports a sharded model: one whole tensor after the other is put together."""
    for tensor in {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}.values():
        _whole(tensor.detach())


def _whole(tensor: Any) -> torch.Tensor:
    """The tensor, of a DTensor's parts on the CPU."""
    return full(tensor).cpu() if is_dtensor(tensor) else tensor


def _save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, torch.Tensor] | None,
    dtype: str | None,
) -> None:
    """Write the model with these weights, None: its own; `dtype` is what config.json is to say of them, if anything."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model.save_pretrained(folder, state_dict=weights)
    brought = brought_by(tokenizer)
    if brought is None or not any(name.startswith("tokenizer") for name in brought.files):
        tokenizer.save_pretrained(folder)
    if brought is not None:
        _put_back(brought, model, stop_ids(tokenizer), folder)
    told = _read((folder / CONFIG).read_bytes())
    if dtype not in (None, told.get("dtype"), told.get("torch_dtype")):
        told.pop("torch_dtype", None)
        (folder / CONFIG).write_text(json.dumps({**told, "dtype": dtype}, indent=2) + "\n", encoding="utf-8")


def _put_back(brought: Brought, model: PreTrainedModel, stops: tuple[int, ...], folder: Path) -> None:
    """Let the folder have the checkpoint's files; of a model that is another's, not what says which it is."""
    files = dict(brought.files)
    if not brought.is_of(model):
        files.pop(CONFIG, None)
    if not model.can_generate():
        files.pop(GENERATION, None)
    if GENERATION in files:
        files[GENERATION] = _stopping(files[GENERATION], stops)
    if CONFIG in files and ELSEWHERE in brought.config:
        told = {key: value for key, value in brought.config.items() if key != ELSEWHERE}
        files[CONFIG] = (json.dumps(told, indent=2) + "\n").encode()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _stopping(generation: bytes, stops: tuple[int, ...]) -> bytes:
    """A generation_config.json as it is, if it names any of the stop ids; else with them."""
    told = _read(generation)
    named = told.get("eos_token_id")
    if any(token in stops for token in (named if isinstance(named, list) else [named])):
        return generation
    return (json.dumps({**told, "eos_token_id": as_config(stops)}, indent=2) + "\n").encode()


def _cast(model: PreTrainedModel, dtype_of: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """The model's tensors in the dtypes that their names have, on the CPU where they change; tied ones stay tied."""
    import torch

    cast: dict[int, torch.Tensor] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        dtype = getattr(torch, dtype_of(name))
        if id(tensor) not in cast:
            plain = _whole(tensor.detach())
            changes = plain.is_floating_point() and plain.dtype != dtype
            cast[id(tensor)] = plain.to("cpu", dtype) if changes else plain
    return {name: cast[id(tensor)] for name, tensor in state.items()}


def _dtypes(path: Path) -> dict[str, str]:
    """The dtypes of a safetensors file's tensors, of those that a model may be trained in."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as weights:
        told = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 - no dict
    return {name: DTYPES[dtype] for name, dtype in told.items() if dtype in DTYPES}


def _read(content: bytes) -> dict[str, Any]:
    told = json.loads(content)
    return told if isinstance(told, dict) else {}
