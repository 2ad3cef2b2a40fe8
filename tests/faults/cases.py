"""What is played: a way that the weights travel, with workers of a size."""

from __future__ import annotations

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
RAY = RaySenderConfig(timeout_s=3.0, start_timeout_s=30.0)


@dataclass(frozen=True)
class Case:
    """One way of transfer, and the workers that it feeds."""

    name: str
    config: TransferConfig
    workers: int = 2
    in_flight: InFlight = InFlight.wait
    size: str = "small"

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
