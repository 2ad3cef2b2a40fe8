"""vLLM's own way to take new weights into a model that serves: layer by layer, through its loaders (0.24 and later)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

Pairs = Iterable[tuple[str, torch.Tensor]]


class OwnWay:
    """Loads `(name, tensor)` pairs of a checkpoint's form into `model`."""

    def __init__(self, model: torch.nn.Module, device: torch.device, vllm_config: Any = None) -> None:
        self._model = model
        self._device = device
        self._vllm_config = vllm_config

    def reload(self, pairs: Pairs) -> None:
        """Every layer is made anew, loaded, processed, and copied to where it was."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        with _config(self._vllm_config), torch.device(self._device), torch.no_grad(), _keeping_added(self._model):
            initialize_layerwise_reload(self._model)
            self.load(pairs)
            finalize_layerwise_reload(self._model, _model_config(self._model, self._vllm_config))

    def load(self, pairs: Pairs) -> None:
        """The model's own loader alone."""
        with _config(self._vllm_config), torch.no_grad():
            self._model.load_weights(pairs)  # type: ignore[operator]


@contextmanager
def _keeping_added(model: torch.nn.Module) -> Iterator[None]:
    """What the loader adds stays, as an output bias that a model with dummy weights has not: vLLM's reloading drops it.

    It puts back the parameters that were there before, and those alone.
    """
    held = {(module, name) for module in model.modules() for name, own in module._parameters.items() if own is not None}
    added: dict[tuple[torch.nn.Module, str], torch.nn.Parameter] = {}

    def note(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta and (module, name) not in held:
            added[module, name] = parameter

    noting = register_module_parameter_registration_hook(note)
    try:
        yield
    finally:
        noting.remove()
    for (module, name), parameter in added.items():
        if getattr(module, name, None) is None:
            module.register_parameter(name, parameter)


def _config(vllm_config: Any) -> AbstractContextManager[Any]:
    """vLLM's layers look at the current configuration; none is set outside of its own calls."""
    if vllm_config is None:
        return nullcontext()
    from vllm.config import set_current_vllm_config

    return set_current_vllm_config(vllm_config)


def _model_config(model: torch.nn.Module, vllm_config: Any) -> Any:
    """vLLM's; of which reloading reads the dtype alone."""
    if vllm_config is not None:
        return vllm_config.model_config
    return SimpleNamespace(dtype=next(model.parameters()).dtype)
