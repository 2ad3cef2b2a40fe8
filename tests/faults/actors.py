"""The workers as Ray actors, the trainer's senders to them, and the Ray that they run in."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from tests.faults.mischief import Mischief
from tests.faults.worker import FORKS, PRELOADED, Actor
from transfer.agreement.wire import Refused, RemoteError
from transfer.trainer.senders.ray import RaySender
from transfer.worker.plain_worker import PlainSpec

if TYPE_CHECKING:
    from tests.faults.harness import Stage
    from tests.faults.trainer import Commands, Orders

START_S = 60.0
TRAPPED_S = 0.3  # for a step to come
ASK_S = 10.0
AGAIN_S = 0.05
STORE_BYTES = 80 * 2**20  # Ray's least
THREADS = 8  # of an actor
NAMESPACE = "faults"

Said = tuple[str, dict[str, Any]]  # verb and body
NOTHING: Said = ("", {})


class RayWorkers:
    """The actors of a case; Ray starts them again."""

    overlap = 0.3

    def __init__(self, specs: Sequence[PlainSpec], folder: Path, planted: str, stops: bool) -> None:
        import ray

        self._folder = folder
        self._names = tuple(f"{folder.name}-{index}" for index in range(len(specs)))
        made = ray.remote(num_cpus=1, max_concurrency=THREADS, max_restarts=-1)(Actor)
        told = zip(self._names, specs, strict=True)
        self._actors = [made.options(name=name).remote(spec, planted, stops) for name, spec in told]
        self._dead: dict[int, int] = {}  # the last process that was killed

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(self, *exception: object) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)

    def orders(self) -> dict[str, object]:
        """Where the trainer finds them."""
        import ray

        return {"workers": self._names, "ray": ray.get_runtime_context().gcs_address}

    def pid(self, index: int) -> int:
        """The process of one, once it is there."""
        ask, deadline = RayAsk(self._actors[index]), time.monotonic() + START_S
        while time.monotonic() < deadline:
            with suppress(OSError):
                answer = ask("health")
                if answer is not None and answer["pid"] != self._dead.get(index):
                    return answer["pid"]
            time.sleep(AGAIN_S)
        raise AssertionError(f"actor {index} is not back within {START_S:g} s")

    def ask(self, index: int) -> RayAsk:
        """For one thread to ask it."""
        return RayAsk(self._actors[index])

    def killed(self, index: int, pid: int, away_s: float) -> None:
        """Ray does the rest, in its own time."""
        self._dead[index] = pid

    def trap(self, step: str, answered: bool, pid: int, strike: Callable[[], None], trainer: Connection) -> None:
        """Let the trainer kill when some worker is told this step, or has answered it."""
        with suppress(OSError):  # it is dead already
            trainer.send((time.monotonic() + TRAPPED_S, step, answered, pid))

    def counts(self) -> Counter[str]:
        """What the senders did."""
        lines = [line for file in self._folder.glob("said-*.jsonl") for line in file.read_text().splitlines()]
        fates = Counter(fate for _, fate in map(heard, lines))
        return Counter({f"messages: {fate}": number for fate, number in fates.items() if fate})


class RayAsk:
    """Asks an actor, for one thread."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __call__(self, verb: str) -> dict[str, Any] | None:
        """The answer to a verb with an empty message."""
        import ray

        try:
            return ray.get(getattr(self._actor, verb).remote({}), timeout=ASK_S)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Refused) and error.cause.status == 503:
                return None
            raise
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            raise ConnectionError(str(error)) from error

    def close(self) -> None:
        """Nothing is held."""


class BadRaySender(RaySender):
    """A RaySender whose messages have the fates of mischief.py; what was said outlives the trainer, in a file."""

    def __init__(self, orders: Orders, name: str, commands: Commands) -> None:
        import ray

        limits = orders.case.config.sender
        super().__init__(ray.get_actor(name), name, limits.timeout_s, limits.start_timeout_s)
        self._commands = commands
        self._file = orders.folder / f"said-{name}.jsonl"
        self._mischief = Mischief[Said](Random(f"{orders.seed} {name}"), lambda message: message[0])
        for line in self._file.read_text().splitlines() if self._file.exists() else []:
            self._mischief.remember(heard(line)[0])

    def call(self, verb: str, body: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """The actor's answer, if it is to arrive."""
        mischief, message = self._mischief, (verb, dict(body))
        fate = mischief.fate(message)
        mischief.remember(message)
        self._note(message, fate)
        self._commands.reached(verb, False)
        if fate == "lose the request":
            self._replay_later([message], mischief.later_s())
            raise RemoteError(self.name, verb, 0, "the request is lost")
        if fate == "delay":
            time.sleep(mischief.later_s())
        answer = super().call(verb, body, timeout_s)
        if fate == "twice":
            with suppress(RemoteError):
                super().call(verb, body, timeout_s)
        self._commands.reached(verb, True)
        if fate == "replay":
            self._replay_later(mischief.run(), mischief.later_s())
        if fate == "lose the answer":
            raise RemoteError(self.name, verb, 0, "the answer is lost")
        return answer

    def restart(self) -> bool:
        """Wait until Ray has started the actor again."""
        back = super().restart()
        if back:
            self._replay(self._mischief.after_restart(), 0.0)
        return back

    def _note(self, message: Said, fate: str) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps([message, fate]) + "\n")

    def _replay_later(self, messages: list[Said], delay_s: float) -> None:
        threading.Thread(target=self._replay, args=(messages, delay_s), daemon=True).start()

    def _replay(self, messages: list[Said], delay_s: float) -> None:
        time.sleep(delay_s)
        for verb, body in messages:
            self._note(NOTHING, "replayed")
            with suppress(RemoteError):  # refused, or the actor is gone
                super().call(verb, body)


def heard(line: str) -> tuple[Said, str]:
    """A message and its fate, from the file; nothing if its trainer was killed while it wrote."""
    try:
        (verb, body), fate = json.loads(line)
    except ValueError:
        return NOTHING, ""
    return (verb, body), fate


@contextmanager
def ray_company(planted: str, stops: bool) -> Iterator[Callable[[Stage, Path, Random], RayWorkers]]:
    """A Ray of its own, in which it makes the workers of a case."""
    import ray

    root = str(Path(__file__).resolve().parents[2])
    os.environ |= {"PYTHONPATH": root, "RAY_USAGE_STATS_ENABLED": "0"}  # for its workers, too
    FORKS.set_forkserver_preload([*PRELOADED, "ray", "tests.faults.actors"])
    ray.init(
        "local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=STORE_BYTES,
        namespace=NAMESPACE,
        log_to_driver=False,
        logging_level="CRITICAL",
    )
    try:
        yield lambda stage, folder, random: RayWorkers(stage.specs(""), folder, planted, stops)
    finally:
        ray.shutdown()
