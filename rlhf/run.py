"""One run from its configuration: build the parts, warm up, train, report; whatever was opened is closed again."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf.assembly.matter import Matter, gathered
from rlhf.assembly.policy_files import BASE, base_of, put_adapter_on, save_policy, write_policy
from rlhf.assembly.site import Site, found, make_room, opened
from rlhf.assembly.trained_rewards import train_rewards
from rlhf.checkpoint.keeper import FOLDER, Keeper, resumable
from rlhf.checkpoint.store import Store
from rlhf.compose import choice
from rlhf.config import RunConfig, VllmRolloutConfig
from rlhf.config.algo import Advantage, AlgoConfig, DpoConfig
from rlhf.learning.fitting import fits, fitting_tokens
from rlhf.learning.learner import Learner
from rlhf.learning.pass_choice import announce, choose_passes
from rlhf.loop import Parts, train
from rlhf.models.adapter import has_adapter, sent_weights
from rlhf.models.policy import reload
from rlhf.models.value import Head, value_model
from rlhf.monitor.flops import Meter
from rlhf.monitor.loggers import make_loggers
from rlhf.monitor.metrics import Outlets, Recorder
from rlhf.monitor.probe import Probe
from rlhf.reports.plots import plot_curves
from rlhf.reports.summary import Rows, print_table, summarise, write_summary
from rlhf.rewards import combine
from rlhf.rollout.client import RolloutClient, wanted_of
from rlhf.rollout.launch import JOURNALS, Workers, worker_spec
from rlhf.rollout.turns import conversing
from rlhf.rollout.vllm_transfer import for_vllm
from rlhf.shell import screen
from rlhf.shell.ending import full_disk_explained
from rlhf.stages.dpo import DpoLearner, as_json, from_json, preference_pairs, train_on_pairs
from rlhf.stages.sft import sft
from transfer import Transfer, make_transfer
from transfer.agreement.journal import Journal
from transfer.config import LocalConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = "tokens_per_microbatch"  # a checkpoint's note


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
        site.saved = found(site) if resume else None
        make_room(site)
        stack.enter_context(resumable(Store(folder / FOLDER)))
        stack.enter_context(full_disk_explained(folder))  # inside, for `resumable` to see what is explained
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


def trained(site: Site, matter: Matter, stack: ExitStack) -> Parts:
    """Build, warm up and train, and write the policy; the parts, of which those with processes end with the stack."""
    parts, version = _build(site, matter, stack)
    train_policy = _trainer(site, parts, matter, version)
    gc.collect()
    gc.freeze()  # what lives as long as the run needs no further looking at: collections in a step are short
    with parts.keeper:
        train_policy()
        save_policy(matter.policy, matter.tokenizer, site)
    site.heart.look()  # while there are workers
    return parts


def _build(site: Site, matter: Matter, stack: ExitStack) -> tuple[Parts, int]:
    """The parts of the loop, warmed up, with the policy's first version live in every worker."""
    config, task, tokenizer, policy = site.config, matter.task, matter.tokenizer, matter.policy
    journal = stack.enter_context(closing(Journal(site.folder / JOURNALS / "trainer.jsonl")))
    transfer = stack.enter_context(make_transfer(config.transfer, site.folder, config.rollout.in_flight, journal))
    base, notes = base_of(config, site.folder), dict[str, Any](summary=site.notes, **matter.rows)
    if base is not None:  # workers load it, so that it must be there when they start
        _warm_up(site, matter, base)
        notes["base"] = put_adapter_on(policy, tokenizer, site, base)
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
    trained = train_rewards(site, matter, sampler)
    reward = combine(config.reward, matter.rewards)
    record = _recorder(site, transfer, journal, Meter.of(policy, config), stack)
    if not isinstance(config.transfer, LocalConfig):  # whose worker is this process
        record.profiler.workers, site.heart.ask = senders, workers.gpu_memory
    writes = partial(write_policy, policy, tokenizer, base)
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
