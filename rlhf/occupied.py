"""A folder in which a run trains is left alone: whoever would write there is refused before Hydra does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from rlhf.ending import RunError, check_free


class Occupied(Callback):
    """Ends the program, with one line, if another one trains where it would write: `.hydra/` is the other's."""

    def on_run_start(self, config: Any, **kwargs: Any) -> None:
        """One run."""
        if config.hydra.output_subdir is not None:  # else Hydra writes nothing
            _end_if_busy(Path(config.hydra.run.dir))

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        """A sweep: any of its jobs."""
        for hydra in sorted(Path(config.hydra.sweep.dir).glob("*/.hydra")):
            _end_if_busy(hydra.parent)


def _end_if_busy(folder: Path) -> None:
    try:
        check_free(folder)
    except RunError as error:
        sys.exit(str(error))  # Hydra turns any other exception of a callback into a warning
