"""The models that are moved: names, dtypes and shapes of their tensors, by a name or from a file; no torch in here."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100 * 2**20  # of a safetensors file
SAFETENSORS = {  # dtypes as a safetensors header names them
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
ITEM_BYTES = {
    **dict.fromkeys(("float64", "int64"), 8),
    **dict.fromkeys(("float32", "int32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16"), 2),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "int8", "uint8", "bool"), 1),
}
Shape = tuple[int, ...]


class BenchError(Exception):
    """What was asked for cannot be done; the message is one line that says why."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model by its tensors: name -> (dtype, shape)."""

    name: str
    tensors: dict[str, tuple[str, Shape]]

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors, without padding."""
        return sum(math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in self.tensors.values())

    def scaled(self, scale: float) -> Model:
        """As many tensors, of which each first dimension is multiplied by `scale`, but stays at least 1."""
        tensors = {}
        for name, (dtype, shape) in self.tensors.items():
            first = tuple(max(1, round(size * scale)) if size else 0 for size in shape[:1])
            tensors[name] = (dtype, first + shape[1:])
        return Model(f"{self.name} x {scale:g}", tensors)


def model_named(text: str) -> Model:
    """The model called `text`, or described by the file of that path; BenchError if it is neither."""
    if text in NAMED:
        return Model(text, {name: ("bfloat16", shape) for name, shape in NAMED[text]().items()})
    path = Path(text)
    if not path.is_file():
        raise BenchError(f"--shapes must name one of {', '.join(NAMED)}, or a file (got {text!r})")
    try:
        header = _header(path)
        tensors = {name: _described(name, value) for name, value in header.items() if name != "__metadata__"}
    except (OSError, ValueError, RecursionError) as error:
        raise BenchError(f"{path}: {error}") from None
    model = Model(path.stem, tensors)
    if model.nbytes == 0:
        raise BenchError(f"{path}: there is no tensor with any bytes in it")
    return model


def _equal(count: int, shape: Shape) -> dict[str, Shape]:
    return {f"layers.{index}.weight": shape for index in range(count)}


def _qwen2(
    hidden: int, layers: int, intermediate: int, heads: tuple[int, int, int], vocabulary: int
) -> dict[str, Shape]:
    """A Qwen2 checkpoint's tensors; `heads` are query heads, key-value heads and a head's size. Tied: no lm_head."""
    queries, keys = heads[0] * heads[2], heads[1] * heads[2]
    tensors: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for index in range(layers):
        layer = {
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.q_proj.bias": (queries,),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.k_proj.bias": (keys,),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.v_proj.bias": (keys,),
            "self_attn.o_proj.weight": (hidden, queries),
            "mlp.gate_proj.weight": (intermediate, hidden),
            "mlp.up_proj.weight": (intermediate, hidden),
            "mlp.down_proj.weight": (hidden, intermediate),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        tensors |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return tensors


def _qwen3_moe(
    hidden: int, layers: int, experts: tuple[int, int], heads: tuple[int, int, int], vocabulary: int
) -> dict[str, Shape]:
    """A Qwen3 mixture-of-experts checkpoint's tensors; `experts` are how many a layer has, and their width."""
    queries, keys, head = heads[0] * heads[2], heads[1] * heads[2], heads[2]
    count, width = experts
    table = (vocabulary, hidden)
    tensors: dict[str, Shape] = {"model.embed_tokens.weight": table, "model.norm.weight": (hidden,)}
    for index in range(layers):
        layer: dict[str, Shape] = {
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
            "self_attn.q_norm.weight": (head,),
            "self_attn.k_norm.weight": (head,),
            "mlp.gate.weight": (count, hidden),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        for expert in range(count):
            layer[f"mlp.experts.{expert}.gate_proj.weight"] = (width, hidden)
            layer[f"mlp.experts.{expert}.up_proj.weight"] = (width, hidden)
            layer[f"mlp.experts.{expert}.down_proj.weight"] = (hidden, width)
        tensors |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return tensors | {"lm_head.weight": table}


NAMED = {
    "1mb": lambda: _equal(40, (100, 125)),
    "512mb": lambda: _equal(300, (64, 13334)),
    "qwen2.5-0.5b": lambda: _qwen2(896, 24, 4864, (14, 2, 64), 151936),
    "qwen2.5-7b": lambda: _qwen2(3584, 28, 18944, (28, 4, 128), 152064) | {"lm_head.weight": (152064, 3584)},
    "qwen3-30b-a3b": lambda: _qwen3_moe(2048, 48, (128, 768), (32, 4, 128), 151936),
}


def _header(path: Path) -> dict[str, Any]:
    """The JSON object of the file, or at the beginning of a safetensors file."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            length = file.read(8)
            size = struct.unpack("<Q", length)[0] if len(length) == 8 else MAX_HEADER_BYTES + 1
            if size > MAX_HEADER_BYTES:
                raise ValueError("not a safetensors file")
            text = file.read(size)
    else:
        text = path.read_bytes()
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError('the shapes must be a JSON object like {"name": [2, 3]}')
    return value


def _described(name: str, value: Any) -> tuple[str, Shape]:
    """A tensor's dtype and shape, from `[2, 3]` (bfloat16) or a safetensors header's `{"dtype", "shape"}`."""
    if isinstance(value, list):
        value = {"dtype": "BF16", "shape": value}
    match value:
        case {"dtype": str(dtype), "shape": list(shape)} if all(type(size) is int and size >= 0 for size in shape):
            if dtype in SAFETENSORS:
                return SAFETENSORS[dtype], tuple(shape)
            raise ValueError(f"{name!r} has dtype {dtype!r}, allowed: {', '.join(SAFETENSORS)}")
    raise ValueError(f'{name!r} must be like [2, 3] or {{"dtype": "BF16", "shape": [2, 3]}} (got {str(value)[:80]})')
