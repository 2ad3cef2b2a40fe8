"""What a run must be for its samples to be drawn while it learns: rules across groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf.config.algo import AlgoConfig, Correction
from rlhf.config.rollout import Order, VllmRolloutConfig
from transfer.config import DiskConfig, InFlight, IpcConfig, Staging

if TYPE_CHECKING:
    from rlhf.config.run import RunConfig


def check_ahead(run: RunConfig) -> None:
    """ValueError where samples cannot be drawn by weights of the step before, or would be learned from wrongly."""
    if run.rollout.ahead.lag == 0:
        return
    key = f"rollout.ahead.lag={run.rollout.ahead.lag}"
    if not isinstance(run.algo, AlgoConfig):
        raise ValueError(f"{run.algo.name} samples nothing while it learns: leave out {key}")
    if run.algo.correction is Correction.off:
        raise ValueError(
            f"with {key} older weights sample what is learned from, which algo.correction=off would take for the "
            "policy's own: choose algo.correction=tis, icepop or sequence"
        )
    arena = isinstance(run.transfer, IpcConfig) and run.transfer.staging is Staging.arena
    if not (arena or isinstance(run.transfer, DiskConfig)):
        raise ValueError(
            f"with {key} workers sample while the weights change, so that they need a version that stays as it is: "
            "choose transfer=ipc with staging=arena, or transfer=disk"
        )
    if run.rollout.ahead.order is Order.free and run.rollout.in_flight is InFlight.abort:
        raise ValueError(
            "with rollout.ahead.order=free rollout.in_flight=abort draws long answers again at each push: choose keep, "
            "or wait"
        )
    if isinstance(run.rollout, VllmRolloutConfig) and run.rollout.sleep_level:
        raise ValueError(f"with {key} workers sample while the trainer learns: set rollout.sleep_level=0")
