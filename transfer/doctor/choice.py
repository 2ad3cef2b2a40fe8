"""Which backend to choose on this machine, from what worked here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transfer.doctor.catalog import DEVICES, TRANSFERS
from transfer.doctor.finding import FAIL, LATE, Result

SHOWN = 5  # checks without time that are named
SENDERS = ("http", "ray")  # http first: no service besides trainer and workers
NO_WAY_ON_GPU = "on the GPU no way works: model.device=cpu"
ONE_PROCESS = "no way to another process works: trainer and sampler in one"
ON_CPU = (  # best first: backend, staging, take, why
    ("ipc", "arena", "view", "the trainer writes a version once, and samplers serve from where it lies"),
    ("ipc", "arena", "copy", "the trainer trains on while samplers copy a version"),
    ("ipc", "live", "copy", "samplers copy the trainer's own parameters, which wait meanwhile"),
    ("disk", "", "", "files do without memory that processes share"),
    ("gloo", "", "", "a broadcast over TCP is the only way here that weights reach another process"),
)
ON_GPU = (
    ("ipc", "live", "copy", "one copy on the GPU, and no memory besides the weights"),
    ("ipc", "arena", "copy", "the trainer trains on while samplers copy; one more set of the weights a slot"),
    ("ipc", "arena", "view", "samplers serve from the trainer's slots; one more set of the weights a slot"),
    ("disk", "", "", "files do without memory that processes share"),
    ("gloo", "", "", "a broadcast over TCP is the only way here that weights reach another process"),
)


@dataclass(frozen=True, slots=True)
class Choice:
    """What to set, as overrides of the configuration; empty if nothing works."""

    overrides: tuple[str, ...]
    why: tuple[str, ...]
    moves: bool  # whether weights reach another process this way

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def choose(results: Sequence[Result]) -> Choice:
    """The first way, of those that worked, in the order of preference for weights on a GPU, if there is one, or CPU."""
    gpu = any(result.check.name == DEVICES and result.works for result in results)
    for device, ways in ((("cuda:0", ON_GPU),) if gpu else ()) + (("cpu", ON_CPU),):
        rejected: list[Result] = []
        for backend, staging, take, why in ways:
            tried = [_find(results, backend, staging, take, device, sender) for sender in SENDERS]
            for result in filter(None, tried):
                if result.works:
                    reasons = [why, *([NO_WAY_ON_GPU] if gpu and device == "cpu" else []), *_why_not(rejected)]
                    return _chosen(result, reasons, results)
                rejected.append(result)
    return _last_resort(results)


def _find(results: Sequence[Result], backend: str, staging: str, take: str, device: str, sender: str) -> Result | None:
    way = {"backend": backend, "sender": sender, "device": device}
    way |= {"staging": staging, "take": take} if staging else {}
    return next((result for result in results if dict(result.check.arguments) == way), None)


def _chosen(best: Result, reasons: list[str], results: Sequence[Result]) -> Choice:
    way = best.check.arguments
    overrides = [f"transfer={way['backend']}"]
    overrides += [f"transfer.{key}={way[key]}" for key in ("staging", "take") if key in way]
    overrides.append(f"transfer/sender={way['sender']}")
    if way["sender"] == "http":
        reasons.append("http needs nothing besides trainer and workers")
    others = [f"{r.check.name} ({r.finding.data['ms']:.1f} ms)" for r in results if _also(r, best)]
    if others:
        reasons.append(f"these work, too: {'; '.join(others)}")
    if way.get("take") == "view":
        reasons.append("transfer.take=copy where a sampler's addresses must not move (CUDA graphs)")
    return Choice(tuple(overrides), tuple(reasons), moves=True)


def _also(result: Result, best: Result) -> bool:
    return (
        result.check.group == TRANSFERS
        and "sender" in result.check.arguments  # else no choice of a transfer
        and result.works
        and "ms" in result.finding.data
        and result is not best
        and result.check.arguments.get("device") == best.check.arguments["device"]
    )


def _last_resort(results: Sequence[Result]) -> Choice:
    local = next((result for result in results if result.check.name == "local"), None)
    failed = [result for result in results if result.finding.status == FAIL]
    failures = _why_not([result for result in failed if result.check.group == TRANSFERS] or failed)
    failures += _why_not([result for result in results if result.finding.status == LATE][:SHOWN])
    if local is not None and local.works:
        return Choice(("transfer=local",), (ONE_PROCESS, *failures), moves=False)
    return Choice((), tuple(failures) or ("no transfer could be tried",), moves=False)


def _why_not(rejected: Sequence[Result]) -> list[str]:
    """A line a reason, with all that it keeps from working."""
    reasons: dict[str, list[str]] = {}
    for result in rejected:
        reasons.setdefault(result.finding.seen, []).append(result.check.name)
    return [f"not {'; '.join(names)}: {reason}" for reason, names in reasons.items()]
