"""`mode=check`: everything that a run validates, what it will need and write, and one step of it with the real parts.

The step is the run's own code with `steps=1`, in a folder beside the run's that is removed again.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from rlhf.assembly.matter import Matter, gathered, tried
from rlhf.assembly.parts import built
from rlhf.assembly.site import Site, meet, opened, reserve
from rlhf.assembly.trainer import train_policy
from rlhf.config import ConsoleLoggerConfig, ModelRewardConfig, RunConfig
from rlhf.config.algo import AlgoConfig
from rlhf.config.trainer import ShardedConfig
from rlhf.models.saving import saved_dtype
from rlhf.monitor.loggers import is_service
from rlhf.preflight.before_torch import Seen
from rlhf.preflight.memory_estimate import Parts, Sizes, disk, human, shards, trainer, worker
from rlhf.preflight.plan import arithmetic, files
from rlhf.preflight.policy_sizes import sizes_of
from rlhf.ranks.place import Place, place_of
from rlhf.reports.run_folder import is_run
from rlhf.reports.summary import PHASES, Rows
from rlhf.rewards.model import ModelReward
from rlhf.shell.ending import RunError, check_free, explained
from rlhf.shell.screen import plain_console
from rlhf.types import Pair, Task
from transfer.config import DiskConfig

if TYPE_CHECKING:
    pass

BESIDE = ".rlhf-check-"  # begins the name of the folder in which the step is made
STALE_S = 3600.0  # older ones are removed, if their checks are gone


def check_run(
    config: RunConfig, folder: Path, told: str = "", seen: Seen | None = None, place: Place | None = None
) -> None:
    """Print what a run into `folder` (in messages: `told`) will do, need and write, and what one step of it took.

    `seen`: what was looked at already; `place`: of a rank that the first one has started, which prints nothing. Raises
    what the run would raise; an error that does not explain itself becomes a RunError of one line.
    """
    config = copy.deepcopy(config)
    config.logger.setdefault("console", ConsoleLoggerConfig())
    place = place or place_of(config.trainer, config.model)
    with ExitStack() as stack:
        if place.first:
            check_free(folder)
        site = opened(config, _beside(folder, stack) if place.first else folder, stack, place)
        stack.enter_context(explained(lambda: f"the check failed ({site.bars.pulse.stage})"))
        seen = tried(config, seen)
        reserve(site, stack)
        meet(site, False, stack)
        matter = gathered(site, seen)
        if place.first:
            _tell(site, matter, folder, told or str(folder))
        site.config = one_step(site.config)
        if place.first:
            _divert(site.config, stack)
        if not matter.task.preferences:
            matter.task.preferences = stand_ins(matter.task, config)
        began = time.monotonic()
        parts = built(site, matter, stack)
        train_policy(site, matter, parts)
        seconds = time.monotonic() - began
    if place.first:
        _tell_step(parts.record.rows, seconds, parts.record.seconds, site.heart.peaks)


def one_step(config: RunConfig) -> RunConfig:
    """The same run with each stage made one step; without what would stop a policy that has hardly learned."""
    short = copy.deepcopy(config)
    short.steps, short.sft.steps = 1, min(1, config.sft.steps)
    short.profile.steps = [1] if config.profile.steps else []
    short.alarms.stop = False
    for part in short.reward.weighted().values():
        if isinstance(part.reward, ModelRewardConfig):
            part.reward.steps = 1
    if isinstance(short.algo, AlgoConfig):
        short.algo.critic_warmup_steps = 0  # the policy is to learn, too
        short.algo.dynamic_sampling = 0  # all groups may be alike yet
    short.logger = {name: logger for name, logger in config.logger.items() if not is_service(logger)}
    return short


def stand_ins(task: Task, config: RunConfig) -> list[Pair]:
    """Pairs in place of those that a run samples: a policy that has hardly learned may be wrong in all its answers.

    Enough for one batch of any stage, of which at most nine tenths are held out.
    """
    good = {prompt.text: answer for prompt, answer in task.demonstrations}
    rewards = [part.reward for part in config.reward.weighted().values()]
    batches = [reward.prompts_per_batch for reward in rewards if isinstance(reward, ModelRewardConfig)]
    prompts = islice(cycle(task.train), 10 * max([config.prompts_per_step, *batches]))
    return [Pair(prompt, good.get(prompt.text, prompt.text[:1]), "") for prompt in prompts]


# --- folders ----------------------------------------------------------------------------------------------------------


def _beside(folder: Path, stack: ExitStack) -> Path:
    """A folder on the disk that `folder` is or will be on; it is removed with the stack."""
    place = _there(folder)
    _sweep(place)
    try:
        return Path(stack.enter_context(TemporaryDirectory(prefix=BESIDE, dir=place)))
    except OSError as error:
        raise RunError(f"nothing can be written into {place} ({error.strerror}): choose hydra.run.dir=...") from error


def _sweep(place: Path) -> None:
    """Remove what checks have left that were killed: folders of an hour ago or more, in which no process trains."""
    for left in place.glob(f"{BESIDE}*"):
        with suppress(OSError, RunError):
            if time.time() - left.stat().st_mtime > STALE_S:
                check_free(left)
                shutil.rmtree(left)


def _divert(config: RunConfig, stack: ExitStack) -> None:
    """Let weights that go to a folder of their own go beside it."""
    if isinstance(config.transfer, DiskConfig) and config.transfer.path:
        config.transfer.path = str(_beside(Path(config.transfer.path), stack))


# --- the screen -------------------------------------------------------------------------------------------------------


def _tell(site: Site, matter: Matter, folder: Path, told: str) -> None:
    """Batch arithmetic, memory, files."""
    config, console, ranks = site.config, site.bars.console, site.ranks.count
    _table(console, "The run", arithmetic(config, matter.task))
    rewards = [reward for reward in matter.rewards.values() if isinstance(reward, ModelReward)]
    dtype = getattr(torch, (config.rollout.dtype or config.model.dtype).value)
    left = getattr(torch, saved_dtype(matter.policy, matter.tokenizer, config.model.save_dtype))
    sizes = replace(sizes_of(matter.policy, config.model.lora, dtype, rewards), saved=left.itemsize)
    places = _places(config, sizes, str(matter.policy.device), ranks)
    lines = [line for place, parts in places.items() for line in _of_place(place, parts)]
    _table(console, "Memory, without activations and caches", lines)
    _table(console, f"Written into {told}", list(files(config)))
    if is_run(folder):
        console.print(f"warning: {folder} holds a run, which a new one there removes", highlight=False, soft_wrap=True)
    needed, free = sum(places["disk"].values()), shutil.disk_usage(_there(folder)).free
    if needed > free:
        console.print(
            f"warning: the run writes up to {human(needed)}, and {human(free)} are free on the disk of {told}: lower "
            "checkpoint.keep, or choose another hydra.run.dir",
            highlight=False,
            soft_wrap=True,
        )


def _places(config: RunConfig, sizes: Sizes, device: str, ranks: int) -> dict[str, Parts]:
    """What is needed where: of the trainer on `device`, of its host, of a worker, of the disk."""
    one = f"trainer, on {device}" if ranks == 1 else f"each of the trainer's {ranks} ranks, the first on {device}"
    offloads = ranks > 1 and isinstance(config.trainer, ShardedConfig) and config.trainer.offload
    return {
        one: trainer(config, sizes, ranks),
        **({"each of these, on its host": shards(config, sizes, ranks // config.trainer.hosts)} if offloads else {}),
        f"each of {config.rollout.workers} worker(s)": worker(config, sizes),
        "disk": disk(config, sizes),
    }


def _of_place(place: str, parts: Parts) -> list[tuple[str, str]]:
    return [(place, human(sum(parts.values()))), *((f"  {name}", human(nbytes)) for name, nbytes in parts.items())]


def _tell_step(rows: Rows, seconds: float, rest: Mapping[str, float], peaks: Mapping[str, float]) -> None:
    """What one step took, by phase, and what came before and after it."""
    step = next(row for row in rows if "seconds/step" in row)
    evaluated = sum(row.get("seconds/evaluate", 0.0) for row in rows)
    saved = step.get("seconds/checkpoint", 0.0) + rest.get("checkpoint", 0.0)
    others = {"evaluations before and after it": evaluated, "checkpoints": saved}
    before = seconds - step["seconds/step"] - sum(others.values())
    lines = [(f"  {phase}", step[f"seconds/{phase}"]) for phase in PHASES if f"seconds/{phase}" in step]
    taken = [("one step", step["seconds/step"]), *lines, *others.items(), ("start, warm-up and first transfer", before)]
    shown = [(name, f"{1e3 * value:,.1f} ms") for name, value in taken]
    shown += [(_of_memory(name), human(mib * 2**20)) for name, mib in peaks.items() if mib]
    console = plain_console()
    _table(console, "Made with the real parts", shown)
    console.print(
        "all is well, and nothing of it is left; without mode=check the same line trains",
        highlight=False,
        soft_wrap=True,
    )


def _of_memory(name: str) -> str:
    kind, _, who = name.partition("/")
    return f"most {'GPU ' if kind.startswith('gpu_') else ''}memory, {who}"


def _table(console: Console, title: str, lines: Sequence[tuple[str, str]]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for line in lines:
        table.add_row(*line)
    console.print(table)


def _there(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
