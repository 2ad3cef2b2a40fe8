"""One run from its configuration: build the parts, warm up, train, report; whatever was opened is closed again."""

from __future__ import annotations

import copy
import gc
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf.adapter import add_adapter, check_peft, has_adapter, merged, save_adapter, sent_weights
from rlhf.algorithm import Advantage, AlgoConfig, DpoConfig
from rlhf.compose import choice
from rlhf.config import (
    ConsoleLoggerConfig,
    EvaluationConfig,
    HfModelConfig,
    RunConfig,
    VerifierRewardConfig,
    VllmRolloutConfig,
)
from rlhf.learner import Learner
from rlhf.loggers import check_loggers, make_loggers
from rlhf.loop import Parts, train
from rlhf.metrics import Outlets, Recorder
from rlhf.models import Head, make_policy, make_tokenizer, save_model, value_model
from rlhf.plots import plot_curves
from rlhf.probe import Probe
from rlhf.progress import Bars
from rlhf.rewards import ModelReward, check_reward, combine, given_rewards
from rlhf.rollout.client import RolloutClient
from rlhf.rollout.launch import JOURNALS, Workers, worker_spec
from rlhf.rollout.turns import conversing
from rlhf.rollout.vllm_transfer import for_vllm
from rlhf.stages.dpo import DpoLearner, check_data, preference_pairs, train_on_pairs
from rlhf.stages.reward_model import margins, pairs_from, split, train_reward_model
from rlhf.stages.sft import encode, sft
from rlhf.summary import print_table, summarise, write_summary
from rlhf.tasks import make_task, read_task
from rlhf.types import Sampler, Task
from transfer import make_transfer
from transfer.journal import Journal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE = "base"  # folder of a run: the policy below its adapter, after the warm-up
PAIRS_SEED = 500_009  # added to the run's seed where preference pairs are sampled


@dataclass(slots=True)
class Site:
    """What every stage of one run shares."""

    config: RunConfig
    folder: Path
    bars: Bars
    notes: dict[str, float]  # numbers of the stages before RL, for the summary


def run(config: RunConfig, folder: Path, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Train as configured; writes metrics, samples, curves and the policy into `folder`, returns the summary."""
    start = time.monotonic()
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("summary.json", "metrics.jsonl", "samples.jsonl"):  # of an earlier run in the same folder
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / JOURNALS, ignore_errors=True)
    console = any(isinstance(logger, ConsoleLoggerConfig) for logger in config.logger.values())
    with ExitStack() as stack:
        site = Site(config, folder, stack.enter_context(Bars(console)), {})
        parts, policy, tokenizer, version = _build(site, stack)
        train_policy = _trainer(site, parts, policy, tokenizer, version)
        gc.collect()
        gc.freeze()  # what lives as long as the run needs no further looking at: collections in a step are short
        train_policy()
        _save(policy, tokenizer, site)
    summary = site.notes | summarise(parts.record.rows)
    summary |= {"seconds": time.monotonic() - start, "threads": torch.get_num_threads()}
    title = f"{config.algo.name} on {choice(config.task)}, seed {config.seed}"
    plot_curves(parts.record.rows, folder / "curves.png", title)
    write_summary(folder, "finished", overrides, summary)
    if console:
        print_table(summary, folder, title)
    else:
        print(f"written: {folder}/")
    return summary


def _build(site: Site, stack: ExitStack) -> tuple[Parts, PreTrainedModel, PreTrainedTokenizerBase, int]:
    """The parts of the loop, warmed up, with the policy's first version live in every worker."""
    config = site.config
    check_loggers(config.logger)
    if config.model.lora.rank:
        check_peft()
    raw = read_task(config.task, config.seed)
    tokenizer = make_tokenizer(config.model, raw.characters(), raw.conversational)
    task = make_task(raw, tokenizer)
    check(config, task)
    policy = make_policy(config.model, tokenizer, config.seed)
    check_lengths(config, task, policy)
    rewards = given_rewards(config.reward, task, config.model)
    site.bars.say(_plan(config, policy))
    if warning := _cut_answers(config, task, tokenizer):
        site.bars.say(warning)
    journal = stack.enter_context(closing(Journal(site.folder / JOURNALS / "trainer.jsonl")))
    transfer = stack.enter_context(make_transfer(config.transfer, site.folder, config.rollout.in_flight, journal))
    base = _base(config, site.folder)
    if base is not None:  # workers load it, so that it must be there when they start
        _warm_up(site, task, tokenizer, policy)
        _put_adapter_on(policy, tokenizer, site, base)
    spec = worker_spec(policy, config, transfer.endpoint, base)
    workers = stack.enter_context(Workers(spec, config, site.folder, policy))
    if base is None:  # workers start meanwhile
        _warm_up(site, task, tokenizer, policy)
    with site.bars.waiting("workers"):
        senders = workers.senders()
    if isinstance(config.rollout, VllmRolloutConfig):
        transfer = for_vllm(transfer, policy, senders, config.rollout.sleep_level)
    transfer.open(sent_weights(policy), senders)
    version = transfer.push(sent_weights(policy))
    sampler = conversing(RolloutClient(senders, tokenizer, config.rollout, transfer.recover), task.environment)
    probe = Probe(policy, list(task.held_out), sampler, config)
    probe(version)
    for name, part in config.reward.weighted().items():
        if rewards[name] is None:
            rewards[name] = _trained_reward(site, part.reward, task, tokenizer, policy, sampler)
    reward = combine(config.reward, rewards)
    loggers = [stack.enter_context(closing(logger)) for logger in make_loggers(config, site.folder)]
    outlets = Outlets(loggers, site.folder, site.bars.stage(config.algo.name, config.steps), journal)
    record = Recorder(outlets, transfer, config)
    return Parts(task, sampler, reward, transfer, probe, record), policy, tokenizer, version


def _trainer(
    site: Site, parts: Parts, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, version: int
) -> Callable[[], None]:
    """What trains the policy: RL, or DPO on preference pairs."""
    config = site.config
    match config.algo:
        case DpoConfig() as algo:
            with site.bars.waiting("pairs"):
                training, held_out = preference_pairs(parts, config, algo, version)
            site.notes["pairs"] = len(training)
            dpo_learner = DpoLearner(policy, tokenizer, training, held_out, config)
            return partial(train_on_pairs, parts, dpo_learner, config, version)
        case AlgoConfig() as algo:
            learner = Learner(
                policy,
                reference=_reference(policy) if algo.kl_coef > 0 else None,
                critic=value_model(policy, Head.token) if algo.advantage is Advantage.gae else None,
                config=config,
            )
            return partial(train, parts, learner, config, version)
    raise AssertionError(config.algo)


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


def _put_adapter_on(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, site: Site, base: str) -> None:
    """Write the base where it is not yet, and let an adapter learn from now on."""
    if base == str(site.folder.resolve() / BASE):
        save_model(policy, tokenizer, Path(base))
    lora = site.config.model.lora
    add_adapter(policy, lora.rank, lora.alpha, lora.target, site.config.seed)


def _save(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, site: Site) -> None:
    """`policy/`, a plain Hugging Face folder; of one with an adapter, merged, and beside it the adapter alone."""
    base = _base(site.config, site.folder)
    if base is None:
        save_model(policy, tokenizer, site.folder / "policy")
    else:
        save_model(merged(policy), tokenizer, site.folder / "policy")
        save_adapter(policy, site.folder / "adapter", base)


def _plan(config: RunConfig, policy: PreTrainedModel) -> str:
    """The run in one line: what its numbers multiply to."""
    rows = config.prompts_per_step * config.samples_per_prompt
    step = (
        f"{config.prompts_per_step} pairs"
        if isinstance(config.algo, DpoConfig)
        else f"{config.prompts_per_step} prompts x {config.samples_per_prompt} samples "
        f"({rows} rows a step, {config.updates_per_step} update(s))"
    )
    lora = f", an adapter of rank {config.model.lora.rank}" if config.model.lora.rank else ""
    by = "/".join(choice(part) for part in (config.transfer, config.transfer.sender))
    return (
        f"{choice(config.task)}: {config.steps} steps x {step}; "
        f"{policy.num_parameters():,} parameters{lora} on {policy.device}; "
        f"{config.rollout.workers} worker(s), weights by {by}"
    )


def check(config: RunConfig, task: Task) -> None:
    """Raise ValueError or RunError, before anything is trained, where configuration, data and reward do not fit."""
    if config.sft.steps and not task.demonstrations:
        raise ValueError("this task's data have no demonstrations to warm up on: set sft.steps=0")
    on_pairs = isinstance(config.algo, DpoConfig)
    if on_pairs:
        check_data(config, task)
    if not (on_pairs and isinstance(config.reward, VerifierRewardConfig)):  # shown there where there is a gold score
        check_reward(config.reward, task)
    prompts = len(task.train)
    if not on_pairs and config.prompts_per_step > prompts:
        raise ValueError(
            f"prompts_per_step must be at most the task's {prompts} training prompts (got {config.prompts_per_step})"
        )


def _warm_up(site: Site, task: Task, tokenizer: PreTrainedTokenizerBase, policy: PreTrainedModel) -> None:
    config = site.config
    if config.sft.steps:
        stage = site.bars.stage("SFT", config.sft.steps)
        for numbers in sft(policy, tokenizer, task.demonstrations, config.sft, config.optim, config.seed):
            stage.advance(numbers)


def check_lengths(config: RunConfig | EvaluationConfig, task: Task, policy: PreTrainedModel) -> None:
    """Raise ValueError unless prompts and answers fit the model's context."""
    longest = max(len(prompt.ids) for prompt in [*task.train, *task.held_out])
    limit, new = policy.config.get_text_config().max_position_embeddings, config.rollout.max_new_tokens
    told = task.environment
    later = (told.turns - 1) * (new + told.longest_reply) if told is not None else 0
    if later and longest + new + later > limit:
        raise ValueError(
            f"the longest prompt ({longest} tokens) and {config.task.most_answers} answers (task.turns) of up to {new} "
            f"tokens (rollout.max_new_tokens) with replies do not fit the model's context of {limit} tokens: lower one "
            "of them, or take a model with a longer context (model.context)"
        )
    if longest + new > limit:
        raise ValueError(
            f"the longest prompt ({longest} tokens) and rollout.max_new_tokens ({new}) do not fit the model's context "
            f"of {limit} tokens: lower rollout.max_new_tokens, or take a model with a longer context (model.context)"
        )


def _cut_answers(config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> str:
    """A warning, if rollout.max_new_tokens would cut most answers like the demonstrations; else nothing."""
    lengths = [len(ids) for ids in encode(tokenizer, [text for _, text in task.demonstrations], end=True)]
    new = config.rollout.max_new_tokens
    if not lengths or statistics.median(lengths) <= new:
        return ""
    return (
        f"warning: most answers will be cut: half of the demonstrations have {statistics.median(lengths):.0f} tokens "
        f"or more, and rollout.max_new_tokens is {new}; rollout.max_new_tokens={max(lengths)} fits them all"
    )


def _trained_reward(
    site: Site,
    config: Any,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    policy: PreTrainedModel,
    sampler: Sampler,
) -> ModelReward:
    """Pairs from the data or from the policy, training, and the held-out accuracy and margin into the notes."""
    reward = ModelReward(value_model(policy, Head.sequence), tokenizer)
    seed = site.config.seed + PAIRS_SEED
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
    reward.model.requires_grad_(False)
    reward.calibrate([p.prompt for p in training] * 2, [p.chosen for p in training] + [p.rejected for p in training])
    if held_out:
        with torch.no_grad():
            margins_B = margins(reward.model, reward.tokenizer, held_out)
        site.notes["reward_model_accuracy"] = float((margins_B > 0).float().mean())
        site.notes["reward_model_margin"] = float(margins_B.mean())
        site.notes["reward_model_pairs"] = len(training)
    save_model(reward.model, tokenizer, site.folder / "reward_model")
    return reward
