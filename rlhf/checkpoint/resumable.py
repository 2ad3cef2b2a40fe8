"""How a run that has a checkpoint ends before it is done: whoever started it learns that it can go on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf.checkpoint.store import Store
from rlhf.shell.ending import EXPLAINED, RESUMABLE, STOPPED
from rlhf.shell.going_on import goes_on_by


@contextmanager
def resumable(store: Store) -> Iterator[None]:
    """Where a signal or an explained error ends a run in this block, say how it goes on; signals' codes become 75.

    That of Ctrl-C stays: who has typed it knows whether the run is to go on.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, *EXPLAINED) as end:
        if not store.steps():
            raise
        print(f"step {store.steps()[-1]} is saved: go on with {goes_on_by(store.folder.parent)}", file=sys.stderr)
        if isinstance(end, SystemExit) and end.code in STOPPED:
            raise SystemExit(RESUMABLE) from None
        raise
