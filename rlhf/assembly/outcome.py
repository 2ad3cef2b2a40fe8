"""What a run tells of itself in the end: curves, the summary's file, and a table on the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch

from rlhf.assembly.site import Site
from rlhf.compose import choice
from rlhf.monitor.loggers import described
from rlhf.reports.advice import Dials, advice
from rlhf.reports.lanes import FILE as LANES
from rlhf.reports.lanes import history, shares
from rlhf.reports.plots import figure_class, plot_curves
from rlhf.reports.run_folder import flat, json_lines
from rlhf.reports.summary import Rows, print_table, summarise, write_summary

STEPS, SECONDS = 5, 30.0  # that a run has at least, whose end says who waited for whom


def reported(site: Site, rows: Rows, seconds: float, overrides: Sequence[str]) -> dict[str, float]:
    """The summary of a run of these metrics, which took so long, printed and written."""
    config = site.config
    summary = site.notes | summarise(rows)
    summary |= {"seconds": seconds, "threads": torch.get_num_threads(), **site.heart.peaks}
    title = f"{config.algo.name} on {choice(config.task)}, seed {config.seed}"
    _plot(site, rows, title)
    write_summary(site.folder, "finished", overrides, summary)
    if site.bars.on:
        print_table(summary, site.folder, title, _advised(site, summary))
    else:
        print(f"written: {site.folder}/")
    return summary


def _advised(site: Site, summary: Mapping[str, float]) -> str | None:
    """Who waits for whom, and what to do about it; None of a run that is too short to say."""
    if summary.get("steps", 0) < STEPS or summary["seconds"] < SECONDS:
        return None
    found = shares(history(json_lines(site.folder / LANES)))
    return advice(found, Dials.of(flat(described(site.config)), ended=True)) if found else None


def ready_to_draw() -> None:
    """Import what the curves in the end need, which takes a while."""
    with suppress(OSError):  # a full disk is told where something is drawn
        figure_class()


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
