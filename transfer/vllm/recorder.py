"""What a model's own loader does with the trainer's weights, as copies that can be done again without the loader.

A checkpoint's tensors are cut, fused and sharded on their way into vLLM's parameters, in Python, tensor by tensor; but
nearly always by views and copies alone. So the loader runs once under a dispatch mode that lets views pass and notes
every write to the model instead of doing it. The copies replace the loader if they write every byte of every parameter
exactly once; whatever else the loader does with the trainer's numbers is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default)  # values, as Python's


class Unsupported(Exception):
    """The loader does more than copy; the message says what."""


@dataclass(slots=True)
class Recording:
    """Writes to a model: copies of equal shapes, from staged memory, and constants, which never change again."""

    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # target, source
    constants: list[tuple[torch.Tensor, float]] = field(default_factory=list)


def record(model: torch.nn.Module, load: Callable[[], Any], staged: Iterable[torch.Tensor]) -> Recording:
    """What `load` would do with the staged tensors; nothing is written. Unsupported if that is more than copies."""
    recorder = _Recorder(model, staged)
    held = [(name, parameter, parameter.data) for name, parameter in model.named_parameters()]
    own = [(path, holder, dict(holder)) for path, module in model.named_modules() for holder in _holders(module)]
    try:
        with torch.no_grad(), recorder:
            load()
    finally:
        swapped = [name for name, parameter, data in held if parameter.data_ptr() != data.data_ptr()]
        for _, parameter, data in held:
            parameter.data = data
        anew = [f"{path}.{name}".lstrip(".") for path, holder, before in own for name in _put_back(holder, before)]
    if swapped:
        raise Unsupported(f"its loader gives {swapped[0]} other memory")
    if anew:
        raise Unsupported(f"its loader makes {anew[0]} anew")
    _check_coverage(model, recorder.found)
    return recorder.found


def _holders(module: torch.nn.Module) -> tuple[dict[str, Any], ...]:
    """What a module's tensors are found in: its parameters, its buffers, its other attributes."""
    return module._parameters, module._buffers, vars(module)


def _put_back(holder: dict[str, Any], before: Mapping[str, Any]) -> list[str]:
    """The names whose tensors are not those of `before`; `holder` has these again from now on."""
    changed = [
        name
        for name in {**before, **holder}
        if holder.get(name) is not before.get(name) and (_is_tensor(holder.get(name)) or _is_tensor(before.get(name)))
    ]
    for name in changed:
        holder.pop(name, None)
        if name in before:
            holder[name] = before[name]
    return changed


class _Recorder(TorchDispatchMode):
    def __init__(self, model: torch.nn.Module, staged: Iterable[torch.Tensor]) -> None:
        super().__init__()
        held = [*model.named_parameters(), *model.named_buffers()]
        self._names = {_storage(tensor): name for name, tensor in held if tensor.numel()}
        self._staged = {_storage(tensor) for tensor in staged if tensor.numel()}
        self.found = Recording()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS and any(_storage(each) in self._staged for each in args if _is_tensor(each)):
            raise Unsupported(f"its loader reads the value of a weight ({func})")
        if func is aten._to_copy.default and _storage(args[0]) in self._staged and _moves(args[0], kwargs or {}):
            return args[0]  # wherever it is to go, the copy into the model brings it there
        if func._schema.is_mutable:
            for tensor in _written(func, args, kwargs or {}):
                if _storage(tensor) in self._staged:
                    raise Unsupported(f"its loader changes a weight that it is given ({func})")
                if (name := self._names.get(_storage(tensor))) is not None:
                    return self._note(func, args, name)
        return func(*args, **(kwargs or {}))

    def _note(self, func: Any, args: Any, name: str) -> Any:
        target = args[0]
        if func is aten.copy_.default and _storage(args[1]) in self._staged:
            self.found.copies.append((target, args[1].expand(target.shape)))
        elif func is aten.fill_.Scalar:
            self.found.constants.append((target, args[1]))
        elif func is aten.zero_.default:
            self.found.constants.append((target, 0))
        else:
            raise Unsupported(f"its loader computes {name} ({func}), which can not be done again by copies alone")
        return target


def _moves(tensor: torch.Tensor, options: Mapping[str, Any]) -> bool:
    """Whether a copy with these options has the same values, and the same layout, on some device."""
    same = options.get("dtype") in (None, tensor.dtype) and options.get("layout") in (None, tensor.layout)
    return same and options.get("memory_format") in (None, torch.preserve_format)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _written(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operation changes."""
    schema = func._schema.arguments
    given = [*zip(schema, args, strict=False), *((each, kwargs[each.name]) for each in schema if each.name in kwargs)]
    changed = [value for each, value in given if each.alias_info is not None and each.alias_info.is_write]
    flat = [each for value in changed for each in (value if isinstance(value, list | tuple) else [value])]
    return list(filter(_is_tensor, flat))


def _check_coverage(model: torch.nn.Module, found: Recording) -> None:
    """Unsupported unless every byte of every parameter is written exactly once; the same copy twice counts as one."""
    unique = {(t.data_ptr(), t.shape, t.stride(), s.data_ptr(), s.dtype): (t, s) for t, s in reversed(found.copies)}
    found.copies = list(reversed(unique.values()))
    targets = [target for target, _ in [*found.copies, *found.constants] if target.numel()]
    by_storage: dict[int, list[torch.Tensor]] = {}
    for target in targets:
        by_storage.setdefault(_storage(target), []).append(target)
    for name, parameter in model.named_parameters():
        if parameter.numel():
            _check_parameter(name, parameter, by_storage.get(_storage(parameter), []))


def _check_parameter(name: str, parameter: torch.Tensor, targets: list[torch.Tensor]) -> None:
    if not _is_dense(parameter):
        raise Unsupported(f"{name} has gaps in memory")
    first, last = _span(parameter)
    spans = sorted(span for target in targets for span in _spans(target) if first < span[1] and span[0] < last)
    ends = [(first, first), *spans, (last, last)]
    for (_, end), (start, _) in pairwise(ends):
        if start != end:
            what = "does not write all of" if start > end else "writes twice to"
            raise Unsupported(f"its loader {what} {name} (at byte {min(start, end) - first} of {last - first})")


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.itemsize


def _spans(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """The stretches of memory, [begin, end), that a tensor without overlaps occupies."""
    if _is_dense(tensor):
        return [_span(tensor)]
    return [span for part in tensor.unbind(_widest(tensor)) for span in _spans(part)]


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements lie without gaps, in whatever order."""
    step = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def _widest(tensor: torch.Tensor) -> int:
    """The dimension with the longest step, among those that have more than one element."""
    return max((dim for dim in range(tensor.dim()) if tensor.shape[dim] > 1), key=tensor.stride)
