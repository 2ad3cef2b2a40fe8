"""The parts of the loop: workers that serve the warmed-up policy, the rewards, and what measures and saves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

from rlhf.assembly.matter import Matter
from rlhf.assembly.policy_files import base_of, put_adapter_on, write_policy
from rlhf.assembly.site import Site
from rlhf.assembly.trained_rewards import train_rewards
from rlhf.assembly.warm_up import warm_up
from rlhf.checkpoint.keeper import FOLDER, Keeper
from rlhf.checkpoint.store import Store
from rlhf.config import VllmRolloutConfig
from rlhf.loop import Parts
from rlhf.models.adapter import sent_weights
from rlhf.monitor.flops import Meter
from rlhf.monitor.loggers import make_loggers
from rlhf.monitor.metrics import Outlets, Recorder
from rlhf.monitor.probe import Probe
from rlhf.rewards import combine
from rlhf.rollout.client import RolloutClient, wanted_of
from rlhf.rollout.launch import Workers
from rlhf.rollout.spec_of_run import JOURNALS, worker_spec
from rlhf.rollout.turns import conversing
from rlhf.rollout.vllm_transfer import for_vllm
from transfer import Transfer, make_transfer
from transfer.agreement.journal import Journal
from transfer.config import LocalConfig


def built(site: Site, matter: Matter, stack: ExitStack, meanwhile: Callable[[], None] = lambda: None) -> Parts:
    """The parts, with the warmed-up policy's first version live in every worker; processes end with the stack.

    `meanwhile` is done while workers start, when there is nothing else to do.
    """
    config, task, tokenizer, policy = site.config, matter.task, matter.tokenizer, matter.policy
    journal = stack.enter_context(closing(Journal(site.folder / JOURNALS / "trainer.jsonl")))
    transfer = stack.enter_context(make_transfer(config.transfer, site.folder, config.rollout.in_flight, journal))
    base, notes = base_of(config, site.folder), dict[str, Any](summary=site.notes, **matter.rows)
    if base is not None:  # workers load it, so that it must be there when they start
        warm_up(site, matter, base)
        notes["base"] = put_adapter_on(policy, tokenizer, site, base)
    workers = stack.enter_context(
        Workers(worker_spec(policy, config, transfer.endpoint, base), config, site.folder, policy)
    )
    if base is None:  # workers start meanwhile
        warm_up(site, matter, base)
    if awaited := workers.awaited():
        site.bars.say(awaited)
    with site.bars.waiting("workers"):
        meanwhile()
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
    return Parts(task, sampler, reward, transfer, probe, record, keeper, version)


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
