"""The parts of the loop: workers that serve the warmed-up policy, the rewards, and what measures and saves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.ahead.in_turn import RewardInTurn
from rlhf.assembly.drawn_ahead import Outside, drawn_ahead
from rlhf.assembly.layout import lay_out
from rlhf.assembly.matter import Matter
from rlhf.assembly.policy_files import POLICY, base_of, put_adapter_on, write_policy
from rlhf.assembly.site import Site
from rlhf.assembly.trained_rewards import train_rewards
from rlhf.assembly.warm_up import warm_up
from rlhf.checkpoint.keeper import FOLDER, Keeper
from rlhf.checkpoint.state import State
from rlhf.checkpoint.store import Store
from rlhf.compose import choice
from rlhf.config import VllmRolloutConfig
from rlhf.episodes.loop import conversing
from rlhf.gather import Gather
from rlhf.held_out import evaluated
from rlhf.loop import Parts
from rlhf.models.adapter import sent_weights
from rlhf.monitor.flops import Meter
from rlhf.monitor.lanes import Lanes
from rlhf.monitor.loggers import make_loggers
from rlhf.monitor.metrics import Outlets, Recorder
from rlhf.monitor.probe import PROMPTS_PER_WORKER, Probe
from rlhf.ranks.outside import Gathers, ToldGather, ToldSampler
from rlhf.ranks.ranks import Ranks
from rlhf.reports.lanes import FILE
from rlhf.rewards import combine
from rlhf.rollout.alike import trial
from rlhf.rollout.client import RolloutClient, wanted_of
from rlhf.rollout.launch import Workers
from rlhf.rollout.scaling import Hooks, Scaled, Scaling
from rlhf.rollout.spec_of_run import JOURNALS, worker_spec
from rlhf.rollout.vllm_transfer import for_vllm
from rlhf.tasks.tokenised import tried
from rlhf.types import Environment, Task
from transfer import Sender, Transfer, make_transfer
from transfer.agreement.journal import Journal
from transfer.config import LocalConfig


def built(site: Site, matter: Matter, stack: ExitStack, meanwhile: Callable[[], None] = lambda: None) -> Parts:
    """The parts, with the warmed-up policy's first version live in every worker; processes end with the stack.

    `meanwhile` is done while workers start, when there is nothing else to do.
    """
    config, task, tokenizer, policy = site.config, matter.task, matter.tokenizer, matter.policy
    ranks, environment = site.ranks, _environment(site, task, stack)
    journal = stack.enter_context(closing(Journal(site.folder / JOURNALS / "trainer.jsonl" if ranks.first else None)))
    transfer = stack.enter_context(
        make_transfer(config.transfer, site.folder, config.rollout.in_flight, journal, ranks)
    )
    base, notes = base_of(config, site.folder), dict[str, Any](summary=site.notes, **matter.rows)
    if base is not None:  # workers load it, so that it must be there when they start
        warm_up(site, matter, base)
        notes["base"] = put_adapter_on(policy, tokenizer, site, base)
    workers = _workers(site, matter, transfer, base, stack) if ranks.first else None
    if base is None:  # workers start meanwhile
        warm_up(site, matter, base)
    senders = _senders(site, workers, meanwhile) if workers is not None else []
    ranks.told(None)  # others wait here, where they notice a rank's end, and not in a collective of a GPU
    if not matter.spread.sharded:  # by the warm-up
        lay_out(site, matter)
    if isinstance(config.rollout, VllmRolloutConfig):
        transfer = for_vllm(transfer, policy, senders, config.rollout.sleep_level, ranks)
    told = site.saved.told if site.saved else {"step": 0, "version": 0, "epoch": 0}
    transfer.open(sent_weights(policy), senders, told["version"], told["epoch"])
    version = transfer.push(sent_weights(policy))
    recover = _until_the_end(transfer.recover, stack)
    lanes = _lanes(site, stack)
    client = RolloutClient(senders, tokenizer, config.rollout, recover, wanted_of(config, policy), lanes.asked)
    own = conversing(client, environment)
    sampler = ToldSampler(ranks, own)
    probe = Probe(policy, list(task.held_out), sampler, config, matter.padded, matter.spread)
    probe(version)
    trained = train_rewards(site, matter, own)
    record = _recorder(site, transfer, journal, lanes, Meter.of(policy, config), stack)
    if workers is not None and not isinstance(config.transfer, LocalConfig):  # whose worker is this process
        record.profiler.workers, site.heart.ask = senders, workers.gpu_memory
    gather, measure = _judged(site, matter, Outside(client, environment, record, version), stack)
    writes: Callable[[Path], None] = partial(write_policy, policy, tokenizer, base)
    store, by = Store(site.folder / FOLDER), Ranks()
    if matter.spread.sharded:  # then each rank writes its rows of it, as of all else
        writes, by = _writes_nothing, ranks
        trained |= State(modules={POLICY: policy})
    keeper = Keeper(
        store, config, record, transfer, writes, site.began, site.saved, trained, notes, by, beside=gather.write
    )
    _let_change(site, workers, transfer, gather, _when_changed(site, matter, client.recover, probe, record), stack)
    return Parts(task, own, gather, measure, transfer, probe, record, keeper, version)


def _environment(site: Site, task: Task, stack: ExitStack) -> Environment | None:
    """What answers the policy, if anything does: it is tried on one row, and closed with the stack."""
    environment = task.environment
    if environment is not None and site.ranks.first:
        tried(stack.enter_context(environment), task.train[0], f"task={choice(site.config.task)}")
    return environment


def _writes_nothing(folder: Path) -> None:
    pass


def _workers(site: Site, matter: Matter, transfer: Transfer, base: str | None, stack: ExitStack) -> Workers:
    """The run's workers, which start meanwhile."""
    spec = worker_spec(matter.policy, site.config, transfer.endpoint, base)
    return stack.enter_context(Workers(spec, site.config, site.folder, matter.policy, site.hosts))


def _senders(site: Site, workers: Workers, meanwhile: Callable[[], None]) -> list[Sender]:
    """One a worker, once all are up."""
    if awaited := workers.awaited():
        site.bars.say(awaited)
    with site.bars.waiting("workers"):
        meanwhile()
        return workers.senders()


def _until_the_end(recover: Callable[[Sender], bool], stack: ExitStack) -> Callable[[Sender], bool]:
    """As the transfer recovers a worker, but none is started again by whoever still samples while the stack ends."""
    ended = threading.Event()
    stack.callback(ended.set)
    return lambda sender: not ended.is_set() and recover(sender)


def _let_change(
    site: Site, workers: Workers | None, transfer: Transfer, gather: ToldGather, hooks: Hooks, stack: ExitStack
) -> None:
    """Between two steps let there be more workers, or fewer, if somebody asks for them; in the first rank."""
    if workers is not None and gather.gather is not None:
        scaling = stack.enter_context(closing(Scaling(site.folder, site.config, workers, transfer, hooks)))
        gather.gather = Scaled(gather.gather, scaling)


def _when_changed(
    site: Site, matter: Matter, recover: Callable[[Sender], bool], probe: Probe, record: Recorder
) -> Hooks:
    """What is said, counted and tried out then."""

    def changed(workers: int) -> None:
        probe.workers, record.workers = workers, {"rollout/workers": float(workers)}

    few, rollout = list(matter.task.held_out)[:PROMPTS_PER_WORKER], site.config.rollout
    return Hooks(site.bars.say, changed, trial(few, matter.tokenizer, rollout, recover, probe.tolerance))


def _judged(site: Site, matter: Matter, outside: Outside, stack: ExitStack) -> tuple[ToldGather, Callable[[], Any]]:
    """A step's samples with their rewards, and what is measured of the held-out prompts: by the first rank, for all."""
    if not site.ranks.first:
        return ToldGather(site.ranks, None), partial(site.ranks.heard, _elsewhere)
    sampler = conversing(outside.client, outside.environment)
    for part in matter.rewards.values():
        if (close := getattr(part, "close", None)) is not None:
            stack.callback(close)  # processes in which it computes
    reward = RewardInTurn(combine(site.config.reward, matter.rewards))
    at_once = Gather(sampler, reward, site.config, outside.record)
    gather: Gathers = at_once
    if site.config.rollout.ahead.lag:
        gather = stack.enter_context(closing(drawn_ahead(site, matter, outside, at_once)))
    cut = site.config.evaluate.cut(site.config.rollout.cut)
    measure = partial(
        evaluated, matter.task, conversing(outside.client.cut(cut), outside.environment), reward, site.config
    )
    return ToldGather(site.ranks, gather), partial(site.ranks.heard, measure)


def _elsewhere(*_: Any) -> Any:
    raise AssertionError("only the first rank samples and scores")


def _lanes(site: Site, stack: ExitStack) -> Lanes:
    """Who does what when, noted by the first rank."""
    path = site.folder / FILE if site.ranks.first else None
    done = site.saved.told["step"] if site.saved else None
    return stack.enter_context(closing(Lanes(path, site.began, done, site.bars.say)))


def _recorder(
    site: Site, transfer: Transfer, journal: Journal, lanes: Lanes, meter: Meter | None, stack: ExitStack
) -> Recorder:
    """Where the run's numbers go, with those that there are already."""
    config, done = site.config, site.saved.told["step"] if site.saved else 0
    loggers = make_loggers(config, site.folder, done + 1 if site.saved else None)
    for logger in loggers:
        stack.enter_context(closing(logger))
    bar = site.bars.stage(config.algo.name, config.steps, done)
    record = Recorder(Outlets(loggers, site.folder, bar, journal, lanes), transfer, config, meter)
    if not site.ranks.first:
        record.keeps_samples, record.verified = False, True  # no score of the task's is asked for
    if site.saved is not None:
        record.restore(site.saved.rows())
    return record
