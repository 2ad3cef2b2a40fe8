"""The folder of a run: opened for one process, with the checkpoint that the run goes on from, and room for files."""

from __future__ import annotations

import copy
import shutil
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rlhf.checkpoint.keeper import FOLDER, Saved
from rlhf.checkpoint.resumable import resumable
from rlhf.checkpoint.store import Store
from rlhf.config import ConsoleLoggerConfig, JsonlLoggerConfig, RunConfig
from rlhf.monitor.heartbeat import Heartbeat
from rlhf.monitor.progress import Bars
from rlhf.ranks.meeting import met
from rlhf.ranks.place import Place
from rlhf.ranks.ranks import ALONE, Ranks
from rlhf.ranks.ray_hosts import Hosts, placed
from rlhf.reports.lanes import FILE as LANES
from rlhf.rollout.spec_of_run import JOURNALS
from rlhf.shell import screen
from rlhf.shell.ending import RunError, alone, full_disk_explained
from rlhf.shell.scale_files import clear
from transfer.backends.disk import remove_versions


@dataclass(slots=True)
class Site:
    """What every stage of one run shares."""

    config: RunConfig
    folder: Path
    bars: Bars
    heart: Heartbeat
    began: float
    place: Place  # of this process among the trainer's ranks
    ranks: Ranks = ALONE
    hosts: Hosts | None = None  # in the Ray that has started the ranks, for workers to be on, too
    notes: dict[str, float] = field(default_factory=dict)  # numbers of the stages before RL, for the summary
    saved: Saved | None = None  # the checkpoint that the run goes on from
    resumable: bool = False  # whether what stops the run says how it goes on


def opened(config: RunConfig, folder: Path, stack: ExitStack, place: Place) -> Site:
    """The folder of a run, in which no other process trains, with its bars and heartbeat; both end with the stack.

    A rank beside the first neither writes nor shows anything.
    """
    began = time.monotonic()
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    if not place.first:
        bars = Bars(on=False)
        return Site(beside_first(config), folder, bars, Heartbeat(folder, bars.pulse, bars.say), began, place)
    folder.mkdir(parents=True, exist_ok=True)
    locked = stack.enter_context(alone(folder))
    console = any(isinstance(logger, ConsoleLoggerConfig) for logger in config.logger.values())
    bars = stack.enter_context(Bars(console))
    heart = stack.enter_context(Heartbeat(folder, bars.pulse, bars.say))
    if not locked:
        bars.say(f"warning: the file system of {folder} has no locks: see to it that no other process trains there")
    return Site(config, folder, bars, heart, began, place)


def go_on(site: Site, stack: ExitStack) -> None:
    """Let the run go on from its newest checkpoint; nothing is written yet."""
    if site.place.first:
        screen.into(site.folder)
        site.saved = found(site)
        _say_how_it_goes_on(site, stack)


def begin(site: Site, stack: ExitStack) -> None:
    """Let the run write into its folder: behind the checkpoint that it goes on from, else over what is there."""
    if site.place.first:
        screen.into(site.folder)
        make_room(site)
        _say_how_it_goes_on(site, stack)


def _say_how_it_goes_on(site: Site, stack: ExitStack) -> None:
    """From now on, until the stack ends, what stops the run does so."""
    if not site.resumable:
        stack.enter_context(resumable(Store(site.folder / FOLDER)))
        stack.enter_context(full_disk_explained(site.folder))  # inside, for `resumable` to see what is explained
        site.resumable = True


def reserve(site: Site, stack: ExitStack) -> None:
    """Let the run have the hosts that it names, until the stack ends; nothing is started or written yet."""
    if site.place.first and site.config.trainer.address is not None:
        with site.bars.waiting("hosts"):
            site.hosts = stack.enter_context(placed(site.config, site.folder))


def meet(site: Site, resume: bool, stack: ExitStack) -> None:
    """Let all ranks of the trainer come together, to go on from one checkpoint; they part with the stack."""
    with site.bars.waiting("ranks") if site.place.count > 1 else nullcontext():
        site.ranks = stack.enter_context(met(site.config, site.folder, site.place, resume, site.hosts))
    stack.enter_context(site.ranks.explained())
    step = site.ranks.told(int(site.saved.told["step"]) if site.saved else None)
    if not site.place.first and step is not None:
        site.saved = Saved.of(Store(site.folder / FOLDER).path(step))


def beside_first(config: RunConfig) -> RunConfig:
    """The configuration of a rank that writes, shows and judges nothing."""
    quiet = copy.deepcopy(config)
    quiet.logger = {}
    quiet.checkpoint.every = 0
    quiet.profile.steps = []
    quiet.alarms.stop = False
    return quiet


def found(site: Site) -> Saved | None:
    """The newest checkpoint that verifies; None where the run was stopped before its first, RunError if none does."""
    store = Store(site.folder / FOLDER)
    step = store.newest(Saved.fault_in)
    for number, fault in store.damaged.items():
        site.bars.say(f"warning: the checkpoint of step {number} does not verify: {fault}")
    if step is None and store.damaged:
        raise RunError(f"no checkpoint in {store.folder} verifies: start the run again with python -m rlhf.train")
    if step is None:
        site.bars.say("nothing was saved yet: the run begins anew")
        return None
    if step > site.config.steps:
        raise RunError(f"step {step} is done already: steps must be at least that (got {site.config.steps})")
    store.keep_only([kept for kept in store.steps() if kept <= step])
    site.bars.say(f"goes on after step {step}")
    return Saved.of(store.path(step))


def make_room(site: Site) -> None:
    """Remove what an earlier run left in the same folder, or what this one wrote after its checkpoint."""
    (site.folder / "summary.json").unlink(missing_ok=True)
    clear(site.folder)  # what another run was asked
    remove_versions(site.folder)  # of transfer=disk, in other epochs or of another run: workers get the newest anew
    if site.saved is not None:
        written = any(isinstance(logger, JsonlLoggerConfig) for logger in site.config.logger.values())
        site.saved.rewind(site.folder, written or (site.folder / "metrics.jsonl").exists())
        site.notes |= site.saved.told["notes"].get("summary", {})
        return
    for name in ("metrics.jsonl", "samples.jsonl", LANES):
        (site.folder / name).unlink(missing_ok=True)
    for name in (JOURNALS, FOLDER):
        shutil.rmtree(site.folder / name, ignore_errors=True)
