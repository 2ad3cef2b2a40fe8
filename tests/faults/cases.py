"""What is played: a way that the weights travel, with workers of a size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transfer.config import (
    CollectiveConfig,
    DiskConfig,
    HttpSenderConfig,
    InFlight,
    IpcConfig,
    RaySenderConfig,
    SenderConfig,
    Staging,
    Take,
    TransferConfig,
    Verify,
)

HTTP = HttpSenderConfig(timeout_s=1.5, start_timeout_s=10.0)
QUICK = HttpSenderConfig(timeout_s=0.25, start_timeout_s=10.0)  # a stop can outlast it
MEETING = HttpSenderConfig(timeout_s=0.5, start_timeout_s=10.0)  # time for processes to form a group
QUICK_RAY = RaySenderConfig(timeout_s=0.4, start_timeout_s=30.0)
RAY = RaySenderConfig(timeout_s=3.0, start_timeout_s=30.0)


@dataclass(frozen=True)
class Case:
    """One way of transfer, and the workers that it feeds."""

    name: str
    config: TransferConfig
    workers: int = 2
    in_flight: InFlight = InFlight.wait
    size: str = "small"
    ranks: int = 1  # of the trainer; several have sharded weights
    by_gloo: bool = False  # whether these talk by torch.distributed, or by connections as those of a run do

    @property
    def lease_s(self) -> float:
        """How long a worker keeps what a trainer that is gone has staged."""
        return 2 * self.config.sender.timeout_s


def ipc(sender: SenderConfig, staging: Staging, take: Take, verify: Verify) -> IpcConfig:
    """The backend `ipc`."""
    return IpcConfig(sender=sender, staging=staging, take=take, verify=verify)


ARENA, LIVE, VIEW, COPY = Staging.arena, Staging.live, Take.view, Take.copy
OFF, DIGEST, FULL = Verify.off, Verify.digest, Verify.full

CASES = {
    "http": [
        Case("arena view digest", ipc(HTTP, ARENA, VIEW, DIGEST)),
        Case("arena copy digest, keep", ipc(HTTP, ARENA, COPY, DIGEST), in_flight=InFlight.keep),
        Case("live view digest", ipc(HTTP, LIVE, VIEW, DIGEST)),
        Case("arena view off", ipc(HTTP, ARENA, VIEW, OFF)),
        Case("live copy full", ipc(HTTP, LIVE, COPY, FULL)),
        Case("arena copy full, one worker", ipc(HTTP, ARENA, COPY, FULL), workers=1),
        Case("live view off, big", ipc(HTTP, LIVE, VIEW, OFF), size="big"),
        Case("gloo digest", CollectiveConfig(sender=HTTP)),
        Case("disk digest", DiskConfig(sender=HTTP)),
        Case("arena view full, big", ipc(HTTP, ARENA, VIEW, FULL), size="big"),
        Case("arena copy digest, big", ipc(HTTP, ARENA, COPY, DIGEST), size="big"),
    ],
    "ray": [
        Case("arena view digest", ipc(RAY, ARENA, VIEW, DIGEST)),
        Case("arena copy full", ipc(RAY, ARENA, COPY, FULL)),
    ],
}


def to_stop(ipc_sender: SenderConfig) -> Iterator[Case]:
    """Every staging, take and verification of shared memory; to one worker an update is a single message."""
    for verify in Verify:
        for number, (staging, take) in enumerate(((LIVE, COPY), (ARENA, COPY), (ARENA, VIEW), (LIVE, VIEW))):
            workers = 1 + (number + list(Verify).index(verify)) % 2
            size = "big" if take is COPY and workers == 1 else "small"
            name = f"{staging.value} {take.value} {verify.value}, {workers}"
            keep = InFlight.keep if (staging, workers) == (ARENA, 2) else InFlight.wait
            yield Case(name, ipc(ipc_sender, staging, take, verify), workers, keep, size)
    yield Case("live copy off, 2", ipc(ipc_sender, LIVE, COPY, OFF))


def to_stop_elsewhere() -> Iterator[Case]:
    """Every take and verification of a broadcast, and files."""
    for number, (take, verify) in enumerate((take, verify) for verify in Verify for take in Take):
        workers = 1 + number % 2
        config = CollectiveConfig(sender=MEETING, take=take, verify=verify)
        yield Case(f"gloo {take.value} {verify.value}, {workers}", config, workers)
    for number, verify in enumerate(Verify):
        workers = 1 + number % 2
        yield Case(f"disk {verify.value}, {workers}", DiskConfig(sender=QUICK, verify=verify), workers)


RANKS = {
    "http": [
        Case("2 ranks digest, gloo", ipc(HTTP, ARENA, COPY, DIGEST), ranks=2, by_gloo=True),
        Case("2 ranks by gloo digest", CollectiveConfig(sender=HTTP), ranks=2),
        Case("3 ranks full, keep", ipc(HTTP, ARENA, COPY, FULL), in_flight=InFlight.keep, ranks=3),
        Case("3 ranks digest, gloo, one worker", ipc(HTTP, ARENA, COPY, DIGEST), workers=1, ranks=3, by_gloo=True),
        Case("2 ranks off", ipc(HTTP, ARENA, COPY, OFF), ranks=2),
        Case("3 ranks off, gloo", ipc(HTTP, ARENA, COPY, OFF), ranks=3, by_gloo=True),
        Case("3 ranks by gloo copy full", CollectiveConfig(sender=HTTP, take=COPY, verify=FULL), ranks=3, by_gloo=True),
        Case("2 ranks by gloo off, one worker", CollectiveConfig(sender=HTTP, verify=OFF), workers=1, ranks=2),
        Case("2 ranks full, one worker, big", ipc(HTTP, ARENA, COPY, FULL), workers=1, size="big", ranks=2),
    ]
}
STOPS = {"http": [*to_stop(QUICK), *to_stop_elsewhere()], "ray": list(to_stop(QUICK_RAY))}
