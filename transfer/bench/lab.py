"""What the ways share in one run: the weights, a folder, and one Ray."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from transfer.bench.source import Source
from transfer.worker.process import python_path
from transfer.worker.ray_start import QUIET, STORE_BYTES, keeping_sigterm, set_environment

START_S = 120.0  # deadline for a process to come up
TIMEOUT_S = 120.0  # deadline of one update, and of one message
RAY_STORE_COPIES = 2.5  # of the weights, in Ray's object store: the last update's go after the next one's have come
STOP_S = 5.0  # how long an actor may take to drop a model
ACTOR: dict[str, Any] = {
    "num_cpus": 0,
    "max_concurrency": 8,  # as the workers of a run have
    "runtime_env": {"env_vars": {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}},
}


class Unavailable(RuntimeError):
    """A way cannot run here; the message is the reason."""


class Reusable(Protocol):
    """What an actor does for one model after the other, since starting one takes seconds."""

    def build(self, argument: Any, /) -> None: ...
    def drop(self) -> None: ...


class RayHost:
    """A private Ray on this machine, or why there is none."""

    def __init__(self, store_bytes: int, folder: Path, reuses_actors: bool = True) -> None:
        self._folder = folder  # for its sockets, whose names must not get long, and its logs
        self.store_bytes = max(STORE_BYTES, store_bytes)
        self._reuses_actors = reuses_actors  # else each ends with its model, and its GPU's memory is free again
        self._missing = ""
        self._idle: dict[type[Reusable], list[Any]] = {}  # actors between two models

    def __enter__(self) -> RayHost:
        if importlib.util.find_spec("ray") is None:
            self._missing = "ray is not installed"
            return self
        import ray

        set_environment()
        options: dict[str, Any] = {**QUIET, "include_dashboard": False}
        options |= {"object_store_memory": self.store_bytes, "_temp_dir": str(self._folder)}
        try:
            with keeping_sigterm():
                ray.init("local", num_cpus=1, **options)
        except Exception as error:
            self._missing = f"Ray does not start: {reason(error)}"
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._missing:
            import ray

            ray.shutdown()

    @contextmanager
    def actor(self, kind: type[Reusable], argument: Any) -> Iterator[Callable[[], Any]]:
        """Waits for an actor of a Reusable class, built from the argument; Unavailable without a Ray."""
        if self._missing:
            raise Unavailable(self._missing)
        import ray

        idle = self._idle.setdefault(kind, [])
        actor: Any = idle.pop() if idle else ray.remote(kind).options(**ACTOR).remote()
        built = actor.build.remote(argument)

        def connect() -> Any:
            ray.get(built, timeout=START_S)
            return actor

        try:
            yield connect
        finally:
            try:
                ray.get(actor.drop.remote(), timeout=STOP_S)
                if self._reuses_actors:
                    idle.append(actor)
                else:
                    ray.kill(actor)
            except ray.exceptions.RayError:
                ray.kill(actor)


@dataclass(frozen=True, slots=True)
class Lab:
    """One model, its weights, and where its ways may work."""

    name: str
    source: Source
    nbytes: int
    folder: Path  # for logs, and the files of `disk`
    ray: RayHost | None
    receiver: str = "cpu"  # the device of the receiver's module
    ready: Callable[[], None] = lambda: None  # called when a receiver holds its module, and nothing else has begun
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32))


def reason(error: BaseException) -> str:
    """What an error says, on one line."""
    lines = str(error).strip().splitlines()
    name = "" if isinstance(error, Unavailable) else type(error).__name__
    return ": ".join(filter(None, [name, *lines[:1]]))
