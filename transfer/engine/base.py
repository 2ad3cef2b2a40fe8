"""What a weight-transfer engine is, in vLLM's words: it agrees once, then receives; a static method sends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

if TYPE_CHECKING:
    import torch

    LoadWeights = Callable[[Iterable[tuple[str, torch.Tensor]]], Any]


class WeightTransferInitInfo:
    """What both sides agree on once, before the first update; a subclass is a dataclass."""


class WeightTransferUpdateInfo:
    """What one update's message says; a subclass is a dataclass."""


Init = TypeVar("Init", bound=WeightTransferInitInfo)
Update = TypeVar("Update", bound=WeightTransferUpdateInfo)
Info = TypeVar("Info")


class WeightTransferEngine(ABC, Generic[Init, Update]):
    """The receiving half of a backend, generic over its two kinds of message; both configs are vLLM's, or None."""

    init_info_cls: ClassVar[type[Any]]
    update_info_cls: ClassVar[type[Any]]

    def __init__(self, config: Any, parallel_config: Any) -> None:
        self.config = config
        self.parallel_config = parallel_config

    def parse_init_info(self, init_info: Mapping[str, Any]) -> Init:
        """The typed message; ValueError that names the key that is unknown, missing or wrong."""
        return parsed(self.init_info_cls, init_info)

    def parse_update_info(self, update_info: Mapping[str, Any]) -> Update:
        """The typed message; ValueError that names the key that is unknown, missing or wrong."""
        return parsed(self.update_info_cls, update_info)

    @abstractmethod
    def init_transfer_engine(self, init_info: Init) -> None:
        """Agree with the trainer, once."""

    @abstractmethod
    def receive_weights(self, update_info: Update, load_weights: LoadWeights) -> None:
        """Hand the update's weights to `load_weights` as (name, tensor) pairs, a few at a time."""

    @abstractmethod
    def shutdown(self) -> None:
        """Release what the engine holds."""

    @staticmethod
    @abstractmethod
    def trainer_send_weights(iterator: Iterator[tuple[str, torch.Tensor]], trainer_args: Any) -> None:
        """The sending half, called in the trainer: returns when every receiver has acknowledged."""


def parsed(cls: type[Info], given: Mapping[str, Any]) -> Info:
    """`cls(**given)` for a dataclass; ValueError if `given` is no mapping or has unknown or missing keys."""
    known = ", ".join(field.name for field in fields(cls)) or "none"  # type: ignore[arg-type]
    if not isinstance(given, Mapping):
        raise ValueError(f"{cls.__name__} is made from a dict (got {type(given).__name__}); keys: {known}")
    try:
        return cls(**given)
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}; keys: {known}") from error
