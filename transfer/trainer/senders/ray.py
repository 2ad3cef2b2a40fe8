"""Sender to a Ray actor, whose methods have the names of the verbs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from transfer.agreement import wire
from transfer.trainer import answers

AGAIN_S = 0.2  # between two questions whether an actor is back


class RaySender:
    """Calls `actor.<verb>.remote(body)` and waits for the answer."""

    remote = True  # a message takes time, and `call` returns by its deadline

    def __init__(self, actor: Any, name: str, timeout_s: float, start_timeout_s: float = 120.0) -> None:
        self._actor = actor
        self.name = name
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s

    def call(self, verb: str, body: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """The actor's answer; RemoteError with its own message, status 0 if it died or did not answer in time."""
        import ray

        deadline = self._timeout_s if timeout_s is None else timeout_s
        try:
            said = ray.get(getattr(self._actor, verb).remote(dict(body)), timeout=deadline)
            return answers.checked(self.name, verb, wire.handed_on(said))
        except ray.exceptions.GetTimeoutError:
            raise wire.RemoteError(self.name, verb, 0, f"no answer within {deadline:g} s") from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, wire.Refused):
                raise wire.RemoteError(self.name, verb, error.cause.status, error.cause.reason) from None
            raise wire.RemoteError(self.name, verb, 500, f"{type(error.cause).__name__}: {error.cause}") from None
        except ray.exceptions.RayError as error:
            raise wire.RemoteError(self.name, verb, 0, f"the actor is gone: {error}") from None

    def restart(self) -> bool:
        """Wait until the actor answers, which Ray starts again by itself; False once Ray has given it up."""
        import ray

        deadline = time.monotonic() + self._start_timeout_s
        while (left := deadline - time.monotonic()) > 0:
            try:
                ray.get(self._actor.health.remote({}), timeout=left)
                return True
            except ray.exceptions.ActorUnavailableError:
                time.sleep(AGAIN_S)
            except ray.exceptions.RayError:
                return False
        return False

    def close(self) -> None:
        """The actor belongs to whoever made it."""
