"""What a run tells of itself in the end: curves, the summary's file, and a table on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch

from rlhf.assembly.site import Site
from rlhf.compose import choice
from rlhf.reports.plots import plot_curves, pyplot
from rlhf.reports.summary import Rows, print_table, summarise, write_summary


def reported(site: Site, rows: Rows, seconds: float, overrides: Sequence[str]) -> dict[str, float]:
    """The summary of a run of these metrics, which took so long, printed and written."""
    config = site.config
    summary = site.notes | summarise(rows)
    summary |= {"seconds": seconds, "threads": torch.get_num_threads(), **site.heart.peaks}
    title = f"{config.algo.name} on {choice(config.task)}, seed {config.seed}"
    _plot(site, rows, title)
    write_summary(site.folder, "finished", overrides, summary)
    if site.bars.on:
        print_table(summary, site.folder, title)
    else:
        print(f"written: {site.folder}/")
    return summary


def ready_to_draw() -> None:
    """Import what the curves in the end need, which takes a while."""
    with suppress(OSError):  # a full disk is told where something is drawn
        pyplot()


def _plot(site: Site, rows: Rows, title: str) -> None:
    """`curves.png`; a disk that is full costs no more than that."""
    path = site.folder / "curves.png"
    try:
        plot_curves(rows, path, title)
        return
    except OSError as error:
        reason = error.strerror
    path.unlink(missing_ok=True)  # now that nobody has it open any more, its room is free
    site.bars.say(f"warning: there is no {path} ({reason}): python -m rlhf.report draws it again")
