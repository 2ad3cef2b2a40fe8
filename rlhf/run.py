"""One run from its configuration: build the parts, warm up, train, report; whatever was opened is closed again."""

from __future__ import annotations

import copy
import gc
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf import screen
from rlhf.adapter import (
    add_adapter,
    base_digest,
    check_peft,
    has_adapter,
    load_adapter,
    merged,
    save_adapter,
    sent_weights,
)
from rlhf.checkpoint.keeper import FOLDER, Keeper, Saved, resumable
from rlhf.checkpoint.rows import MOMENT, ROWS, check_rows, splits_of
from rlhf.checkpoint.state import State
from rlhf.checkpoint.store import Store
from rlhf.checkpoint.whole import whole
from rlhf.compose import choice
from rlhf.config import (
    ConsoleLoggerConfig,
    HfModelConfig,
    JsonlLoggerConfig,
    ModelRewardConfig,
    RunConfig,
    VllmRolloutConfig,
)
from rlhf.config.algo import Advantage, AlgoConfig, DpoConfig
from rlhf.ending import RunError, alone, full_disk_explained
from rlhf.learning.fitting import fits, fitting_tokens
from rlhf.learning.learner import Learner
from rlhf.learning.pass_choice import announce, check_passes, choose_passes
from rlhf.learning.passes import PADDED, Passes
from rlhf.loop import Parts, train
from rlhf.models import Head, make_policy, make_tokenizer, reload, value_model
from rlhf.monitor.flops import Meter
from rlhf.monitor.heartbeat import Heartbeat
from rlhf.monitor.loggers import check_loggers, make_loggers
from rlhf.monitor.metrics import Outlets, Recorder
from rlhf.monitor.probe import Probe
from rlhf.monitor.progress import Bars
from rlhf.preflight.agreement import agreeing_passes
from rlhf.preflight.lengths import check_lengths
from rlhf.preflight.plan import check_data, in_one_line
from rlhf.reports.plots import plot_curves
from rlhf.reports.summary import Rows, print_table, summarise, write_summary
from rlhf.rewards import ModelReward, combine, given_rewards
from rlhf.rollout.client import RolloutClient, wanted_of
from rlhf.rollout.launch import JOURNALS, Workers, worker_spec
from rlhf.rollout.turns import conversing
from rlhf.rollout.vllm_transfer import for_vllm
from rlhf.saving import export_model, save_model
from rlhf.stages.dpo import DpoLearner, as_json, from_json, preference_pairs, train_on_pairs
from rlhf.stages.reward_model import margins, pairs_from, split, train_reward_model
from rlhf.stages.sft import sft
from rlhf.tasks import make_task, read_task
from rlhf.types import Reward, Sampler, Task
from transfer import Transfer, make_transfer
from transfer.config import LocalConfig
from transfer.journal import Journal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE = "base"  # folder of a run: the policy below its adapter, after the warm-up
TOKENS = "tokens_per_microbatch"  # a checkpoint's note
PAIRS_SEED = 500_009  # added to the run's seed where preference pairs are sampled


@dataclass(slots=True)
class Site:
    """What every stage of one run shares."""

    config: RunConfig
    folder: Path
    bars: Bars
    heart: Heartbeat
    began: float
    notes: dict[str, float] = field(default_factory=dict)  # numbers of the stages before RL, for the summary
    saved: Saved | None = None  # the checkpoint that the run goes on from


def run(config: RunConfig, folder: Path, overrides: Sequence[str] = (), resume: bool = False) -> dict[str, float]:
    """Train as configured; writes metrics, samples, curves and the policy into `folder`, returns the summary.

    `resume`: go on from the folder's newest checkpoint; where there is none yet, begin.
    """
    with full_disk_explained(folder):
        return _run(config, folder, overrides, resume)


def _run(config: RunConfig, folder: Path, overrides: Sequence[str], resume: bool) -> dict[str, float]:
    with ExitStack() as stack:
        site = opened(config, folder, stack)
        screen.into(folder)
        site.saved = _found(site) if resume else None
        _make_room(site)
        stack.enter_context(resumable(Store(folder / FOLDER)))
        stack.enter_context(full_disk_explained(folder))
        parts = trained(site, gathered(site), stack)
    summary = site.notes | summarise(parts.record.rows)
    summary |= {"seconds": parts.keeper.seconds(), "threads": torch.get_num_threads(), **site.heart.peaks}
    title = f"{config.algo.name} on {choice(config.task)}, seed {config.seed}"
    _plot(site, parts.record.rows, title)
    write_summary(folder, "finished", overrides, summary)
    if site.bars.on:
        print_table(summary, folder, title)
    else:
        print(f"written: {folder}/")
    return summary


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


def opened(config: RunConfig, folder: Path, stack: ExitStack) -> Site:
    """The folder of a run, in which no other process trains, with its bars and heartbeat; both end with the stack."""
    began = time.monotonic()
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    locked = stack.enter_context(alone(folder))
    console = any(isinstance(logger, ConsoleLoggerConfig) for logger in config.logger.values())
    bars = stack.enter_context(Bars(console))
    heart = stack.enter_context(Heartbeat(folder, bars.pulse, bars.say))
    if not locked:
        bars.say(f"warning: the file system of {folder} has no locks: see to it that no other process trains there")
    return Site(config, folder, bars, heart, began)


def trained(site: Site, matter: Matter, stack: ExitStack) -> Parts:
    """Build, warm up and train, and write the policy; the parts, of which those with processes end with the stack."""
    parts, version = _build(site, matter, stack)
    train_policy = _trainer(site, parts, matter, version)
    gc.collect()
    gc.freeze()  # what lives as long as the run needs no further looking at: collections in a step are short
    with parts.keeper:
        train_policy()
        _save(matter.policy, matter.tokenizer, site)
    site.heart.look()  # while there are workers
    return parts


def _found(site: Site) -> Saved | None:
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


def _make_room(site: Site) -> None:
    """Remove what an earlier run left in the same folder, or what this one wrote after its checkpoint."""
    (site.folder / "summary.json").unlink(missing_ok=True)
    if site.saved is not None:
        written = any(isinstance(logger, JsonlLoggerConfig) for logger in site.config.logger.values())
        site.saved.rewind(site.folder, written or (site.folder / "metrics.jsonl").exists())
        site.notes |= site.saved.told["notes"].get("summary", {})
        return
    for name in ("metrics.jsonl", "samples.jsonl"):
        (site.folder / name).unlink(missing_ok=True)
    for name in (JOURNALS, FOLDER):
        shutil.rmtree(site.folder / name, ignore_errors=True)


@dataclass(slots=True)
class Matter:
    """What is trained, and what on."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    policy: PreTrainedModel
    rewards: dict[str, Reward | None]  # by part; None: the run trains it
    rows: dict[str, Any] = field(default_factory=dict)  # what the task's rows are, for checkpoints
    padded: Passes = PADDED  # the way to compute padded rows that is right for the policy


def gathered(site: Site) -> Matter:
    """Task, policy and rewards as they are given, checked against each other."""
    config = site.config
    check_loggers(config.logger)
    if config.model.lora.rank:
        check_peft()
    raw = read_task(config.task, config.seed)
    tokenizer = make_tokenizer(config.model, raw.characters(), raw.conversational, raw.tags())
    began = site.saved.told["notes"].get(MOMENT) if site.saved else None
    moment = datetime.fromisoformat(began) if began else datetime.now()
    task = make_task(raw, tokenizer, moment)
    rows = _rows(site, task, tokenizer)
    check_data(config, task)
    policy = make_policy(config.model, tokenizer, config.seed)
    notes = check_lengths(config, task, policy, tokenizer)
    padded = _padded(site, policy)
    check_passes(policy, config.model, padded)
    rewards = given_rewards(config.reward, task, config.model, moment)
    site.bars.say(in_one_line(config, policy))
    for note in (*task.notes, *notes):
        site.bars.say(note)
    return Matter(task, tokenizer, policy, rewards, {ROWS: rows, MOMENT: moment.isoformat()}, padded)


def _rows(site: Site, task: Task, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the task's rows are; of a run that goes on, RunError if they are others than before."""
    settings = site.config.checkpoint
    if not settings.every and site.saved is None:
        return {}
    rows = splits_of(task, tokenizer)
    if site.saved is not None:
        said = check_rows(site.saved.told["notes"].get(ROWS), rows, task, allowed=not settings.check_data)
        if said:
            site.bars.say(said)
    return rows


def _padded(site: Site, policy: PreTrainedModel) -> Passes:
    """How to compute padded rows; a checkpoint may be of any architecture, and is tried."""
    if not isinstance(site.config.model, HfModelConfig):
        return PADDED
    engine = not isinstance(site.config.rollout, VllmRolloutConfig)
    return agreeing_passes(policy, site.config.model.lora, engine, site.bars.say)


def _build(site: Site, matter: Matter, stack: ExitStack) -> tuple[Parts, int]:
    """The parts of the loop, warmed up, with the policy's first version live in every worker."""
    config, task, tokenizer, policy = site.config, matter.task, matter.tokenizer, matter.policy
    journal = stack.enter_context(closing(Journal(site.folder / JOURNALS / "trainer.jsonl")))
    transfer = stack.enter_context(make_transfer(config.transfer, site.folder, config.rollout.in_flight, journal))
    base, notes = _base(config, site.folder), dict[str, Any](summary=site.notes, **matter.rows)
    if base is not None:  # workers load it, so that it must be there when they start
        _warm_up(site, matter, base)
        notes["base"] = _put_adapter_on(policy, tokenizer, site, base)
    spec = worker_spec(policy, config, transfer.endpoint, base)
    workers = stack.enter_context(Workers(spec, config, site.folder, policy))
    if base is None:  # workers start meanwhile
        _warm_up(site, matter, base)
    if awaited := workers.awaited():
        site.bars.say(awaited)
    with site.bars.waiting("workers"):
        senders = workers.senders()
    if isinstance(config.rollout, VllmRolloutConfig):
        transfer = for_vllm(transfer, policy, senders, config.rollout.sleep_level)
    told = site.saved.told if site.saved else {"step": 0, "version": 0, "epoch": 0}
    transfer.open(sent_weights(policy), senders, told["version"], told["epoch"])
    version = transfer.push(sent_weights(policy))
    client = RolloutClient(senders, tokenizer, config.rollout, transfer.recover, wanted_of(config, policy))
    sampler = conversing(client, task.environment)
    probe = Probe(policy, list(task.held_out), sampler, config, matter.padded)
    probe(version)
    trained = _train_rewards(site, matter, sampler)
    reward = combine(config.reward, matter.rewards)
    record = _recorder(site, transfer, journal, Meter.of(policy, config), stack)
    if not isinstance(config.transfer, LocalConfig):  # whose worker is this process
        record.profiler.workers, site.heart.ask = senders, workers.gpu_memory
    writes = partial(_write_policy, policy, tokenizer, base)
    store = Store(site.folder / FOLDER)
    keeper = Keeper(store, config, record, transfer, writes, site.began, site.saved, trained, notes)
    return Parts(task, sampler, reward, transfer, probe, record, keeper), version


def _recorder(site: Site, transfer: Transfer, journal: Journal, meter: Meter | None, stack: ExitStack) -> Recorder:
    """Where the run's numbers go, with those that there are already."""
    config, done = site.config, site.saved.told["step"] if site.saved else 0
    loggers = make_loggers(config, site.folder, done + 1 if site.saved else None)
    for logger in loggers:
        stack.enter_context(closing(logger))
    bar = site.bars.stage(config.algo.name, config.steps, done)
    record = Recorder(Outlets(loggers, site.folder, bar, journal), transfer, config, meter)
    if site.saved is not None:
        record.restore(site.saved.rows())
    return record


def _trainer(site: Site, parts: Parts, matter: Matter, version: int) -> Callable[[], None]:
    """What trains the policy: RL, or DPO on preference pairs."""
    config, policy = site.config, matter.policy
    passes = choose_passes(policy, config.model, site.bars.say, matter.padded)
    match config.algo:
        case DpoConfig() as algo:
            if site.saved is None:
                with site.bars.waiting("pairs"):
                    training, held_out = preference_pairs(parts, config, algo, version)
            else:
                training, held_out = from_json(site.saved.told["notes"]["pairs"], parts.task)
            site.notes["pairs"] = len(training)
            parts.keeper.notes["pairs"] = as_json(training, held_out)
            announce(passes, config.microbatch_tokens, None, site.bars.say)
            dpo_learner = DpoLearner(policy, matter.tokenizer, training, held_out, config, passes)
            return partial(train_on_pairs, parts, dpo_learner, config, version)
        case AlgoConfig() as algo:
            learner = Learner(
                policy,
                reference=_reference(policy) if algo.kl_coef > 0 else None,
                critic=value_model(policy, Head.token) if algo.advantage is Advantage.gae else None,
                config=config,
                passes=passes,
            )
            _fit(site, parts, learner)
            announce(passes, config.microbatch_tokens, learner.fitting_tokens, site.bars.say)
            return partial(train, parts, learner, config, version)
    raise AssertionError(config.algo)


def _fit(site: Site, parts: Parts, learner: Learner) -> None:
    """Let a GPU's memory decide how many tokens a micro-batch has; a run that goes on keeps what was measured first.

    Not where workers sleep while the policy learns: now they are awake, and hold what it will have.
    """
    rollout = site.config.rollout
    if not fits(learner) or (isinstance(rollout, VllmRolloutConfig) and rollout.sleep_level):
        return
    known = site.saved.told["notes"].get(TOKENS) if site.saved else None
    if known is None:
        with site.bars.waiting("learner"):
            known = fitting_tokens(learner)
    learner.fitting_tokens = parts.keeper.notes[TOKENS] = known


def _reference(policy: PreTrainedModel) -> PreTrainedModel:
    """A copy of the policy as it is, or the policy itself, which without its adapter is what it was."""
    return policy if has_adapter(policy) else copy.deepcopy(policy).requires_grad_(False)


def _base(config: RunConfig, folder: Path) -> str | None:
    """From where workers load what the adapter builds on: the checkpoint, unless the warm-up changes it; else None."""
    if not config.model.lora.rank:
        return None
    if not (isinstance(config.model, HfModelConfig) and config.sft.steps == 0):
        return str(folder.resolve() / BASE)
    path = Path(config.model.path).expanduser()
    return str(path.resolve()) if path.is_dir() else config.model.path


def _put_adapter_on(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, site: Site, base: str) -> str:
    """Write the base where it is not yet, and let an adapter learn from now on; the base's digest."""
    if base == str(site.folder.resolve() / BASE) and site.saved is None:
        with whole(Path(base)) as writing:
            save_model(policy, tokenizer, writing)
    lora = site.config.model.lora
    add_adapter(policy, lora.rank, lora.alpha, lora.target, site.config.seed)
    digest = base_digest(policy, policy.dtype)
    if site.saved is not None:
        if site.saved.told["notes"]["base"] != digest:
            raise RunError(f"the weights of {base} are not those below the checkpoint's adapter: they have changed")
        load_adapter(policy, site.saved.path / "adapter")
    return digest


def _write_policy(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: str | None, folder: Path) -> None:
    """What a checkpoint holds of the policy: `policy/`, or `adapter/`, since the base stays as it is."""
    if base is None:
        save_model(policy, tokenizer, folder / "policy")
    else:
        save_adapter(policy, folder / "adapter", base)


def _save(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, site: Site) -> None:
    """`policy/`, a plain Hugging Face folder; of one with an adapter, merged, and beside it the adapter alone."""
    base, dtype = _base(site.config, site.folder), site.config.model.save_dtype
    with whole(site.folder / "policy") as folder:
        export_model(policy if base is None else merged(policy), tokenizer, folder, dtype)
    if base is not None:
        with whole(site.folder / "adapter") as folder:
            save_adapter(policy, folder, base)


def _warm_up(site: Site, matter: Matter, base: str | None) -> None:
    """SFT, or the weights that the run goes on with; of one with an adapter, those below it."""
    config, policy = site.config, matter.policy
    if site.saved is not None:
        if base is None:
            reload(policy, site.saved.path / "policy")
        elif base == str(site.folder.resolve() / BASE):
            reload(policy, Path(base))
        return
    if config.sft.steps:
        stage = site.bars.stage("SFT", config.sft.steps)
        for numbers in sft(policy, matter.tokenizer, matter.task.demonstrations, config.sft, config.optim, config.seed):
            stage.advance(numbers)


def _train_rewards(site: Site, matter: Matter, sampler: Sampler) -> State:
    """Fill in the rewards that the run trains itself; what of them a run that goes on will need."""
    state = State()
    for name, part in site.config.reward.weighted().items():
        if matter.rewards[name] is None:
            assert isinstance(part.reward, ModelRewardConfig)
            model = value_model(matter.policy, Head.sequence)
            trained = ModelReward(model, matter.tokenizer, clip=part.reward.clip)
            if site.saved is None:
                _train_reward(site, trained, part.reward, matter, sampler)
            trained.model.requires_grad_(False)
            matter.rewards[name] = trained
            state |= trained.state(name)
    return state


def _train_reward(site: Site, reward: ModelReward, config: Any, matter: Matter, sampler: Sampler) -> None:
    """Pairs from the data or from the policy, training, and the held-out accuracy and margin into the notes."""
    task, seed = matter.task, site.config.seed + PAIRS_SEED
    pairs = list(task.preferences)
    if not pairs:
        with site.bars.waiting("pairs"):
            prompts = task.train[: config.prompts]
            temperature = site.config.rollout.temperature
            rollouts = sampler.sample(prompts, n=config.samples, temperature=temperature, seed=seed)
            pairs = pairs_from(rollouts, task, config.label_noise, seed)
    training, held_out = split(pairs, config.held_out, seed)
    stage = site.bars.stage("reward model", config.steps)
    for numbers in train_reward_model(reward.model, reward.tokenizer, training, config, site.config.optim, seed):
        stage.advance(numbers)
    reward.calibrate([p.prompt for p in training] * 2, [p.chosen for p in training] + [p.rejected for p in training])
    if held_out:
        with torch.no_grad():
            margins_B = margins(reward.model, reward.tokenizer, held_out)
        site.notes["reward_model_accuracy"] = float((margins_B > 0).float().mean())
        site.notes["reward_model_margin"] = float(margins_B.mean())
        site.notes["reward_model_pairs"] = len(training)
    with whole(site.folder / "reward_model") as folder:
        export_model(reward.model, matter.tokenizer, folder, site.config.model.save_dtype)
