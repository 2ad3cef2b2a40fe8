"""One run from its configuration. What each of its sentences means is in assembly/; the loop itself is in loop.py."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rlhf.assembly.matter import gathered, tried
from rlhf.assembly.outcome import ready_to_draw, reported
from rlhf.assembly.parts import built
from rlhf.assembly.site import begin, go_on, meet, opened, reserve
from rlhf.assembly.trainer import train_policy
from rlhf.config import RunConfig
from rlhf.preflight.before_torch import Seen
from rlhf.ranks.place import Place, place_of
from rlhf.shell.ending import full_disk_explained


def run(
    config: RunConfig,
    folder: Path,
    overrides: Sequence[str] = (),
    resume: bool = False,
    seen: Seen | None = None,
    place: Place | None = None,
) -> dict[str, float]:
    """Train as configured; writes metrics, samples, curves and the policy into `folder`, returns the summary.

    `resume`: go on from the folder's newest checkpoint; where there is none yet, begin. `seen`: what was looked at
    already (preflight/before_torch.py). `place`: of a rank that the first one has started. Whatever was opened is
    closed before the report.
    """
    place = place or place_of(config.trainer, config.model)
    with full_disk_explained(folder):
        with ExitStack() as stack:
            site = opened(config, folder, stack, place)
            if resume:
                go_on(site, stack)
            seen = tried(config, seen)  # before anything is removed that is there
            reserve(site, stack)  # before it, too
            begin(site, stack)
            meet(site, resume, stack)
            matter = gathered(site, seen)
            parts = built(site, matter, stack, meanwhile=ready_to_draw)
            train_policy(site, matter, parts)
        if not place.first:
            return {}
        return reported(site, parts.record.rows, parts.keeper.seconds(), overrides)
