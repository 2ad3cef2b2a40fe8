"""`python -m rlhf.beside`: a rank beside the first; what it is to run comes as a line on stdin.

It ends with the first rank, in whatever way that ends. Signals that tell all processes of a job of its end are for the
first rank, which decides.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from dataclasses import replace

from rlhf.config import Mode
from rlhf.plugins.found import use
from rlhf.ranks.place import by_torchrun
from rlhf.ranks.spec import of_spec
from rlhf.shell.ending import STOPS


def main() -> None:
    """A rank that the first one has started."""
    from transfer.worker.serve import die_with_parent
    from transfer.worker.stacks import dumps_stacks_when_asked

    _ignore_signals()
    die_with_parent()
    dumps_stacks_when_asked()
    os.dup2(2, 1)  # whatever is printed goes to the log
    run_beside(sys.stdin.readline())


def started_by_torchrun() -> bool:
    """Whether this process is another rank than the first of those of torchrun; then it has run, and ended."""
    place = by_torchrun()
    if place is None or place.count == 1:
        return False
    from rlhf.ranks.torchrun import heard, release

    if place.first:
        atexit.register(release, place.count)
        return False
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = heard(place)
    _ignore_signals()
    if line:
        run_beside(line)
    return True


def run_beside(line: str) -> None:
    """Run what the line says; an error that ends this rank ends all, and the first one says it."""
    config, folder, place, resume = of_spec(line)
    use(config.plugins)
    if (started := by_torchrun()) is not None:
        place = replace(place, local=started.local)
    if config.mode is Mode.check:
        from rlhf.check import check_run

        check_run(config, folder, place=place)
        return
    from rlhf.run import run

    run(config, folder, resume=resume, place=place)


def _ignore_signals() -> None:
    for signum in (signal.SIGINT, *STOPS):
        signal.signal(signum, signal.SIG_IGN)


if __name__ == "__main__":
    main()
