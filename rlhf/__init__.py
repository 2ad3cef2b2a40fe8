"""RLHF: sample, score, learn, hand the weights over; repeat.

In Python: `config = rlhf.compose(["experiment=smoke"])`, then `result = rlhf.train(config, ...)` (docs/python.md). What
has a name here is imported when it is first asked for: `import rlhf` takes neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.api.composed import compose
    from rlhf.api.result import Result
    from rlhf.api.trained import train
    from rlhf.config import RunConfig
    from rlhf.shell.ending import RunError

__version__ = "0.3.0"
__all__ = ["Result", "RunConfig", "RunError", "__version__", "compose", "train"]

_WHERE = {
    "Result": "rlhf.api.result",
    "RunConfig": "rlhf.config",
    "RunError": "rlhf.shell.ending",
    "compose": "rlhf.api.composed",
    "train": "rlhf.api.trained",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
