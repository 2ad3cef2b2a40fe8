"""One line about a run's time: who waits for whom, and which key would change that. A pure function of the shares."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.config.rollout import MOST_LAG
from rlhf.reports.lanes import SAMPLE, Shares

MUCH = 0.2  # of the time, from which it is worth a word
IDLE = 0.4  # of the workers' time, from which they are too many, or too fast
FULL = 0.8  # of a worker's time, that is to be left where there are fewer of them
LEARN, REWARD, BESIDE = "learn", "reward", "beside"


@dataclass(frozen=True, slots=True)
class Dials:
    """What a run was told that advice depends on."""

    lag: int = 0
    free: bool = False  # steps take groups from a queue
    waits: bool = True  # new weights wait for requests that run
    corrected: bool = False  # algo.correction is not off
    keeps_versions: bool = True  # whether its transfer lets workers sample while weights change
    own_process: bool = True  # workers are not the trainer itself
    elsewhere: bool = False  # somebody else has started them
    prompts: int = 32  # of a step, of which each worker has one at least
    sleeps: bool = False  # workers sleep while the trainer learns
    samples: bool = True  # it is no training on pairs
    ended: bool = True

    @classmethod
    def of(cls, config: Mapping[str, Any], ended: bool) -> Dials | None:
        """Those of a configuration with dotted keys; None where that is not known."""
        if "rollout.workers" not in config:
            return None
        lag, prompts = config.get("rollout.ahead.lag"), config.get("prompts_per_step")
        return cls(
            lag=lag if isinstance(lag, int) else 0,
            free=config.get("rollout.ahead.order") == "free",
            waits=config.get("rollout.in_flight") == "wait",
            corrected=config.get("algo.correction") not in ("off", False),  # YAML may take off for false
            keeps_versions=config.get("transfer.staging") == "arena" or "transfer.keep" in config,
            own_process="transfer.sender.url" in config or "transfer.sender.address" in config,
            elsewhere=bool(config.get("transfer.sender.url")),
            prompts=prompts if isinstance(prompts, int) else 1,
            sleeps=config.get("rollout.sleep_level") in (1, 2),
            samples="algo.correction" in config,
            ended=ended,
        )


def advice(shares: Shares, dials: Dials | None) -> str:
    """What the shares say, and what to do about it, in one line."""
    waits = shares.trainer.get(SAMPLE, 0.0)
    idle = statistics.fmean(shares.idle.values()) if shares.idle else 0.0
    if dials is None:
        return f"the trainer waits for samples {waits:.0%} of the time, and the workers have nothing to do {idle:.0%}"
    spent = {what: share for what, share in shares.trainer.items() if what != LEARN}
    spent[BESIDE] = max(0.0, 1 - sum(shares.trainer.values()))
    most = max(spent, key=lambda what: spent[what])
    if spent[most] >= MUCH and most != SAMPLE:
        return _beside(most, spent[most], dials)
    learning = shares.trainer.get(LEARN, 0.0)
    if not dials.samples:
        return f"learning takes {learning:.0%} of the time, and nothing else much"
    if waits >= MUCH:
        return _taking_turns(shares, idle, dials) if dials.lag == 0 else _behind(shares, idle, dials)
    if idle >= IDLE:
        return _waiting_workers(shares, idle, dials)
    return f"nobody waits much: the trainer for samples {waits:.0%} of the time, the workers {idle:.0%}"


def _beside(what: str, share: float, dials: Dials) -> str:
    """Something else than sampling and learning takes the time."""
    ahead = f"; with {_ahead(dials)} they are computed while the trainer learns" if dials.lag == 0 else ""
    said = {
        "transfer": f"moving weights takes {{}}: {_moved(dials)}",
        "verify": "verifying weights takes {}: raise transfer.verify_every",
        "evaluate": "evaluations take {}: raise evaluate_every",
        "checkpoint": "saving takes {}: raise checkpoint.every",
        REWARD: f"rewards take {{}}: a faster reward would help{ahead}",
        BESIDE: "what is in no phase takes {}: the answers' gold scores, and loggers",
    }
    return said.get(what, f"{what} takes {{}}").format(f"{share:.0%} of the time")


def _taking_turns(shares: Shares, idle: float, dials: Dials) -> str:
    """Each step is sampled before it is learned from, and the trainer waits for that."""
    waits, learning = shares.trainer[SAMPLE], shares.trainer.get(LEARN, 0.0)
    if learning < MUCH:
        busy = waits + shares.trainer.get("evaluate", 0.0)
        if dials.own_process and idle > 1 - busy + MUCH:
            return f"the trainer waits for samples {waits:.0%} of the time, and {_between(idle)}"
        return f"the trainer waits for samples {waits:.0%} of the time: {_more(shares, dials)}"
    turns = f"sampling ({waits:.0%} of the time) and learning ({learning:.0%}) take turns"
    if dials.sleeps:
        return f"{turns} on one GPU: give workers their own (rollout.gpus), rollout.sleep_level=0 and {_ahead(dials)}"
    if not dials.own_process:
        return f"{turns} in one process: {_ahead(dials)} do both at once, on cores or a GPU for each"
    return (
        f"the trainer waits for samples {waits:.0%} of the time, and the workers for it {idle:.0%}: with "
        f"{_ahead(dials)} both go on at once, where each has cores or a GPU of its own"
    )


def _behind(shares: Shares, idle: float, dials: Dials) -> str:
    """Steps are sampled ahead, and the trainer waits for samples nevertheless."""
    waits = f"the trainer waits for samples {shares.trainer[SAMPLE]:.0%} of the time"
    if idle < MUCH:
        return f"{waits}, and the workers are busy: {_more(shares, dials)}"
    if dials.lag < MOST_LAG:
        queue = "" if dials.free else "rollout.ahead.order=free "
        return f"{waits}, and the workers wait {idle:.0%}: {queue}rollout.ahead.lag={dials.lag + 1}, or a faster reward"
    return f"{waits}, and {_between(idle)}"


def _waiting_workers(shares: Shares, idle: float, dials: Dials) -> str:
    """The trainer hardly waits for samples, and the workers have nothing to do."""
    learning, workers = shares.trainer.get(LEARN, 0.0), shares.workers
    said = f"the workers wait {idle:.0%} of the time, and learning takes {learning:.0%} of it"
    enough = max(1, math.ceil(workers * (1 - idle) / FULL))
    fresher = f"; with a lower rollout.ahead.lag ({dials.lag}) samples would be fresher" if dials.lag > 1 else ""
    if dials.lag and enough < workers:
        return f"{said}: {enough} of {workers} would do ({_scaled(enough, dials)}){fresher}"
    return f"{said}: a faster trainer would help (trainer=replicas on more GPUs), more workers would not{fresher}"


def _moved(dials: Dials) -> str:
    if dials.lag and dials.free and dials.waits:
        return "they wait for the requests that run, which rollout.in_flight=keep lets go on"
    return "python -m transfer.doctor says which ways are the fastest here"


def _ahead(dials: Dials) -> str:
    """The keys that let a step be sampled while the one before is learned from."""
    keys = "" if dials.own_process and dials.keeps_versions else "transfer=ipc "
    return f"{keys}rollout.ahead.lag=1{'' if dials.corrected else ' algo.correction=tis'}"


def _more(shares: Shares, dials: Dials) -> str:
    if not dials.own_process:
        return "workers of their own sample faster (transfer=ipc rollout.workers=2)"
    if shares.workers >= dials.prompts:
        return f"more workers than prompts ({dials.prompts}) help nobody: shorten answers (rollout.max_new_tokens)"
    return f"add a worker ({_scaled(shares.workers + 1, dials)})"


def _scaled(workers: int, dials: Dials) -> str:
    if dials.elsewhere:
        return f"{workers} in transfer.sender.url" if dials.ended else "rlhf scale RUN_DIR --join URL"
    return f"rollout.workers={workers}" if dials.ended else f"rlhf scale RUN_DIR {workers}"


def _between(idle: float) -> str:
    return (
        f"the workers have nothing to do {idle:.0%} of it: what lies between takes the time (rewards, replies of a "
        "conversation, or one worker's long answers)"
    )
