"""What a transfer can be configured to do; standard library only, so that `--help` and a typo answer at once.

Values have one home, these dataclasses; the YAML files under `conf/transfer/` only name choices.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field

RAY_ADDRESS = re.compile(r"(ray://)?([^\s/:\[\]]+|\[[0-9a-fA-F:]+\]):[0-9]{1,5}")


class Staging(enum.Enum):
    """Where the bytes of an update wait for the workers."""

    arena = "arena"  # in a slot of memory of their own: the trainer trains on while workers read or serve them
    live = "live"  # in the trainer's own parameters: no extra memory, and no byte is written; with take=view none is
    # moved at all, and workers serve nothing while a gradient step changes them


class Take(enum.Enum):
    """How a worker takes a staged update."""

    auto = "auto"  # copy of a trainer of several ranks, else view; a run chooses by its workers, too (docs/transfer.md)
    view = "view"  # its parameters are the slot; finishing swaps pointers
    copy = "copy"  # into memory of its own, whose addresses never move


class Library(enum.Enum):
    """What carries a broadcast."""

    gloo = "gloo"  # TCP between hosts' memory
    nccl = "nccl"  # NVLink, PCIe or the network between GPUs


class Verify(enum.Enum):
    """What a worker compares with the trainer's digest of the weights, before it serves them."""

    off = "off"
    digest = "digest"  # the bytes that it has staged
    full = "full"  # and once more its model's, after they were replaced


class InFlight(enum.Enum):
    """What becomes of completions that are being sampled when new weights arrive."""

    wait = "wait"  # they end on the old weights first
    abort = "abort"  # they are dropped, and sampled again on the new ones
    keep = "keep"  # they go on with the new weights; every token says which version sampled it


@dataclass(slots=True, kw_only=True)
class SenderConfig:
    """The control plane: how the trainer tells a worker what to do."""

    timeout_s: float = 60.0  # deadline of one weight-update message, seconds
    start_timeout_s: float = 120.0  # deadline for a worker to come up, seconds

    def __post_init__(self) -> None:
        positive("transfer.sender.timeout_s", self.timeout_s)
        positive("transfer.sender.start_timeout_s", self.start_timeout_s)


@dataclass(slots=True, kw_only=True)
class HttpSenderConfig(SenderConfig):
    """HTTP to workers on loopback; each worker binds a free port itself and reports it."""

    url: list[str] = field(default_factory=list)  # workers that already run, to drive instead of starting some;
    # their bearer token is read from the environment variable RLHF_WORKER_TOKEN

    def __post_init__(self) -> None:
        SenderConfig.__post_init__(self)
        for url in self.url:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"transfer.sender.url must be like http://127.0.0.1:8000 (got {url!r})")


@dataclass(slots=True, kw_only=True)
class RaySenderConfig(SenderConfig):
    """Method calls on Ray actors; `address=null` starts a private Ray on this machine, for this run only."""

    address: str | None = None  # HOST:PORT of its GCS, ray://HOST:PORT of a Ray client's server, or auto

    def __post_init__(self) -> None:
        SenderConfig.__post_init__(self)
        if self.address is not None and self.address != "auto" and not RAY_ADDRESS.fullmatch(self.address):
            raise ValueError(
                f"transfer.sender.address must be like 127.0.0.1:6379, ray://host:10001, auto, or null for a private "
                f"Ray (got {self.address!r})"
            )


@dataclass(slots=True, kw_only=True)
class TransferConfig:
    """The data plane: how the bytes of the weights move."""

    sender: SenderConfig
    verify: Verify = Verify.digest
    verify_every: int = 10  # pushes between two probes, in which workers' log-probs are compared with the trainer's;
    # the first push has one always. 0: no other
    verify_tolerance: float | None = None  # largest difference allowed, nats; null: by the dtypes

    def __post_init__(self) -> None:
        if self.verify_every < 0:
            raise ValueError(f"transfer.verify_every must be at least 0 (got {self.verify_every})")
        if self.verify_tolerance is not None:
            positive("transfer.verify_tolerance", self.verify_tolerance)


@dataclass(slots=True, kw_only=True)
class IpcConfig(TransferConfig):
    """Memory that both processes map: memfd shared memory on CPU, CUDA IPC on GPUs."""

    staging: Staging = Staging.arena
    take: Take = Take.auto
    slots: int = 2  # of the arena

    def __post_init__(self) -> None:
        TransferConfig.__post_init__(self)
        if self.slots < 2:
            raise ValueError(
                f"transfer.slots must be at least 2, so that workers can serve one version while the next is written "
                f"(got {self.slots})"
            )

    @property
    def exposes(self) -> bool:
        """Whether workers serve the trainer's own memory, and stop while it changes."""
        return self.staging is Staging.live and self.take is not Take.copy


NO_KEEP = (
    "transfer.staging=live with transfer.take=view (or auto) takes weights away before they change: no completion can "
    "span an update, so rollout.in_flight must be wait or abort (got keep)"
)


@dataclass(slots=True, kw_only=True)
class DiskConfig(TransferConfig):
    """safetensors files and a JSON manifest in a folder that both sides see, written atomically."""

    path: str | None = None  # the folder; null: `weights/` in the run's folder
    keep: int = 2  # finished versions that stay on the disk

    def __post_init__(self) -> None:
        TransferConfig.__post_init__(self)
        if self.keep < 1:
            raise ValueError(f"transfer.keep must be at least 1 (got {self.keep})")


@dataclass(slots=True, kw_only=True)
class CollectiveConfig(TransferConfig):
    """A torch.distributed broadcast from the trainer to all workers, packed in buckets."""

    library: Library = Library.gloo  # transfer=gloo or transfer=nccl sets it
    take: Take = Take.view
    bucket_mib: int | None = None  # MiB packed at a time, of which two are held; null: 64 for gloo, 256 for nccl
    host: str = "127.0.0.1"  # the trainer's address that workers connect to; nobody is authenticated there

    def __post_init__(self) -> None:
        TransferConfig.__post_init__(self)
        if self.bucket_mib is not None and not 1 <= self.bucket_mib <= 65536:
            raise ValueError(f"transfer.bucket_mib must be between 1 and 65536 (got {self.bucket_mib})")
        if self.host in ("", "0.0.0.0", "::"):
            raise ValueError(f"transfer.host must be the one address that workers connect to (got {self.host!r})")

    @property
    def bucket_bytes(self) -> int:
        """The size of a bucket."""
        return (self.bucket_mib or {Library.gloo: 64, Library.nccl: 256}[self.library]) * 2**20


@dataclass(slots=True, kw_only=True)
class LocalConfig(TransferConfig):
    """No second process: the sampler uses the learner's own module, for debugging and as the reference numbers."""

    sender: SenderConfig = field(default_factory=SenderConfig)
    verify: Verify = Verify.off

    def __post_init__(self) -> None:
        TransferConfig.__post_init__(self)
        if self.verify is not Verify.off:
            raise ValueError(f"transfer=local moves nothing: transfer.verify must be off (got {self.verify.value})")


@dataclass(slots=True, kw_only=True)
class HandlesConfig(TransferConfig):
    """vLLM's own `ipc` backend in servers that run already: a handle of every tensor, made anew for each update."""

    verify: Verify = Verify.off

    def __post_init__(self) -> None:
        TransferConfig.__post_init__(self)
        if self.verify is not Verify.off:
            raise ValueError(
                f"transfer=handles is for servers that compare no digest: transfer.verify must be off "
                f"(got {self.verify.value})"
            )
        if not isinstance(self.sender, HttpSenderConfig) or not self.sender.url:
            raise ValueError("transfer=handles needs servers that run already: set transfer.sender.url=[http://...]")


def taken(take: Take, ranks: int = 1) -> Take:
    """What `take` is for weights of so many ranks."""
    if take is not Take.auto:
        return take
    return Take.copy if ranks > 1 else Take.view


def check_takes_shards(config: TransferConfig, hosts: int = 1) -> None:
    """ValueError unless weights that are sharded over the ranks of a trainer can travel by this transfer.

    `hosts`: on how many these are; from several, weights go to workers on the same host alone.
    """
    if hosts > 1 and not isinstance(config, IpcConfig):
        raise ValueError(
            "weights that are sharded over ranks of several hosts travel by transfer=ipc, to workers on each: choose "
            f"it (got {_choice(config)})"
        )
    ours = "weights that are sharded over ranks travel by transfer=ipc (staging=arena, take=copy), disk, gloo or nccl"
    match config:
        case IpcConfig(staging=Staging.arena, take=Take.auto | Take.copy) | DiskConfig() | CollectiveConfig():
            return
        case IpcConfig(staging=Staging.live):
            raise ValueError(f"transfer.staging must be arena (got live): {ours}")
        case IpcConfig(take=take):
            raise ValueError(f"transfer.take must be copy (got {take.value}): {ours}")
    raise ValueError(f"transfer must be ipc (got {_choice(config)}): {ours}")


def _choice(config: TransferConfig) -> str:
    """By which name the group `transfer` has it."""
    if isinstance(config, CollectiveConfig):
        return config.library.value
    return type(config).__name__.removesuffix("Config").lower()


def positive(key: str, value: float) -> None:
    """Raise ValueError unless `value` > 0."""
    if not value > 0:
        raise ValueError(f"{key} must be greater than 0 (got {value})")
