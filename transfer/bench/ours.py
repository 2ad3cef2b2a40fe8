"""Our own ways: a session that feeds one worker; `verify` off and digest take turns over the same memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transfer.agreement.journal import Journal
from transfer.backends.make import make_publisher
from transfer.bench.forked import ForkedWorker
from transfer.bench.lab import TIMEOUT_S, Lab, Unavailable
from transfer.bench.relay import Relay
from transfer.bench.source import Source
from transfer.bench.ways import Connect, Control, Parts, Unit, Way
from transfer.bench.worker import RayBenchWorker
from transfer.config import (
    CollectiveConfig,
    DiskConfig,
    InFlight,
    IpcConfig,
    Library,
    SenderConfig,
    Staging,
    Take,
    TransferConfig,
    Verify,
)
from transfer.trainer.interfaces import Sender
from transfer.trainer.senders.http import HttpSender
from transfer.trainer.senders.ray import RaySender
from transfer.trainer.session import Session
from transfer.worker.plain_worker import PlainSpec

NEEDS = {  # times the model's bytes: while the channel is open, and more while it sends
    "ipc-arena-view": (2.0, 0.0),
    "ipc-arena-copy": (3.0, 0.0),
    "ipc-live-copy": (2.0, 0.0),
    "ipc-live-view": (1.0, 0.0),
    "gloo": (2.0, 1.0),
    "nccl": (2.0, 1.0),
    "disk": (1.0, 3.0),
}


def units(lab: Lab, names: Collection[str]) -> list[Unit]:
    """What must be started for these ways: a worker for each backend, staging, take and sender, and one for `full`."""
    groups: dict[tuple[str, str, Verify], list[str]] = {}
    for name in names:
        channel, verify, sender = name.rsplit("-", 2)
        agreed = Verify.full if verify == "full" else Verify.digest
        groups.setdefault((channel, sender, agreed), []).append(name)
    made = []
    for (channel, sender, agreed), members in groups.items():
        start = {"http": _over_http, "ray": _over_ray}[sender]
        made.append(Unit(members, *NEEDS[channel], partial(start, lab, _config(channel, agreed), members)))
    return made


class CountedSender:
    """Two senders to one worker, directly and through a counting relay, as one; adds up the seconds of its calls."""

    def __init__(self, direct: Sender, relayed: Sender) -> None:
        self.name = direct.name
        self.remote = True
        self._direct = direct
        self._relayed = relayed
        self.through_relay = False
        self.seconds = 0.0

    def call(self, verb: str, body: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """As the sender of the two that is chosen."""
        sender = self._relayed if self.through_relay else self._direct
        began = time.perf_counter()
        try:
            return sender.call(verb, body, timeout_s)
        finally:
            self.seconds += time.perf_counter() - began

    def restart(self) -> bool:
        """Never: a worker that dies ends its ways."""
        return False

    def close(self) -> None:
        """The two belong to whoever made them."""


@dataclass(frozen=True, slots=True)
class Channel:
    """One worker and the open session that feeds it."""

    session: Session
    source: Source
    sender: CountedSender
    relay: Relay | None


class OurWay:
    """A push over a channel, with or without a digest."""

    def __init__(self, name: str, channel: Channel) -> None:
        self.name = name
        self._channel = channel
        self._with_digest = "-off-" not in name
        self._wire = 0

    def change(self) -> str:
        """Change the trainer's weights; their digest."""
        self._channel.source.change()
        return self._channel.source.digest()

    def prepare(self, counted: bool) -> None:
        """Choose the sender, and whether there is a digest."""
        self._channel.sender.through_relay = counted
        self._channel.session.with_digest = self._with_digest

    def send(self) -> None:
        """Withdraw, which only views of the trainer's own memory need, and push."""
        channel = self._channel
        before = channel.relay.bytes if channel.relay else 0
        channel.sender.seconds = 0.0
        channel.session.withdraw()
        channel.session.push(channel.source.weights)
        self._wire = channel.relay.bytes - before if channel.relay else 0

    def held(self) -> str:
        """The digest of the worker's live weights."""
        return self._channel.sender.call("completions", {})["digest"]

    def parts(self) -> Parts:
        """The write as the session timed it, the flip as the worker did, and what calls took beyond its verbs."""
        calls = self._channel.sender.seconds
        status = self._channel.sender.call("status", {})
        return Parts(self._channel.session.last.write_seconds, status["flip_seconds"], calls - status["verb_seconds"])

    def plan(self) -> str:
        """As the worker's status says it."""
        return str(self._channel.sender.call("status", {})["plan"])

    def control(self) -> Control:
        """The session counts the bodies, the relay all of HTTP."""
        return Control(self._channel.session.last.control_bytes, self._wire or None)


def _config(channel: str, verify: Verify) -> TransferConfig:
    sender = SenderConfig(timeout_s=TIMEOUT_S)
    if channel == "disk":
        return DiskConfig(sender=sender, verify=verify)
    if channel in (Library.gloo.value, Library.nccl.value):
        return CollectiveConfig(sender=sender, verify=verify, library=Library(channel))
    _, staging, take = channel.split("-")
    return IpcConfig(sender=sender, verify=verify, staging=Staging(staging), take=Take(take))


@contextmanager
def _session(lab: Lab, config: TransferConfig, folder: Path) -> Iterator[Session]:
    folder.mkdir()
    with Session(make_publisher(config, folder), config, InFlight.wait, Journal()) as session:
        try:
            yield session
        finally:
            if _moves_source(lab, session.endpoint):
                lab.source.renew()


def _opened(lab: Lab, session: Session, sender: CountedSender, relay: Relay | None) -> Channel:
    moves_tensors = session.endpoint.get("staging") == Staging.live.value
    source = lab.source.alias() if moves_tensors and not _moves_source(lab, session.endpoint) else lab.source
    session.open(source.weights, [sender])
    return Channel(session, source, sender, relay)


def _moves_source(lab: Lab, endpoint: Mapping[str, Any]) -> bool:
    """Whether the weights themselves move into shared memory: on a GPU, where a second copy would be counted."""
    return endpoint.get("staging") == Staging.live.value and lab.receiver != "cpu"


@contextmanager
def _over_http(lab: Lab, config: TransferConfig, names: list[str]) -> Iterator[Connect]:
    with ExitStack() as stack:
        session = stack.enter_context(_session(lab, config, lab.folder / names[0]))
        process = stack.enter_context(http_worker(lab, names[0], session.endpoint))

        def connect() -> list[Way]:
            url = process.url()
            lab.ready()
            relay = stack.enter_context(Relay(url))
            direct, relayed = (HttpSender(to, lab.token, names[0], TIMEOUT_S) for to in (url, relay.url))
            stack.enter_context(closing(direct))
            stack.enter_context(closing(relayed))
            channel = _opened(lab, session, CountedSender(direct, relayed), relay)
            return [OurWay(name, channel) for name in names]

        yield connect


@contextmanager
def _over_ray(lab: Lab, config: TransferConfig, names: list[str]) -> Iterator[Connect]:
    with (
        _session(lab, config, lab.folder / names[0]) as session,
        ray_worker(lab, session.endpoint) as built,
    ):

        def connect() -> list[Way]:
            sender = RaySender(built(), names[0], TIMEOUT_S)
            lab.ready()
            channel = _opened(lab, session, CountedSender(sender, sender), None)
            return [OurWay(name, channel) for name in names]

        yield connect


def http_worker(lab: Lab, name: str, endpoint: Mapping[str, Any]) -> ForkedWorker:
    """A worker of the lab's model as a process behind HTTP, to be entered."""
    return ForkedWorker(_spec(lab, endpoint), lab.folder / f"{name}.log")


@contextmanager
def ray_worker(lab: Lab, endpoint: Mapping[str, Any]) -> Iterator[Callable[[], Any]]:
    """The same as a Ray actor, to be waited for."""
    if lab.ray is None:
        raise Unavailable("no Ray was started")
    with lab.ray.actor(RayBenchWorker, _spec(lab, endpoint)) as built:
        yield built


def _spec(lab: Lab, endpoint: Mapping[str, Any]) -> PlainSpec:
    manifest = lab.source.manifest.to_json()
    return PlainSpec(manifest=manifest, endpoint=dict(endpoint), device=lab.receiver, token=lab.token)
