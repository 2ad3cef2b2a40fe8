"""A saved policy on a task's held-out prompts: greedy accuracy, sampled gold score and pass@k, as a table and JSON."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from rlhf.compose import choice
from rlhf.config import EvaluationConfig, HfModelConfig, VllmRolloutConfig
from rlhf.episodes.loop import conversing
from rlhf.held_out import measure, temperature_of
from rlhf.models.policy import make_policy
from rlhf.models.tokenizer import make_tokenizer
from rlhf.monitor.metrics import of_episodes
from rlhf.preflight.agreement import check_engine
from rlhf.preflight.before_torch import Seen, look
from rlhf.preflight.lengths import check_lengths
from rlhf.rollout.client import RolloutClient, wanted_of
from rlhf.rollout.launch import Workers
from rlhf.rollout.spec_of_run import JOURNALS, worker_spec
from rlhf.shell.ending import RunError
from rlhf.shell.screen import plain_console
from rlhf.tasks import make_task
from rlhf.types import TRUNCATED, Sampler, Task
from transfer import make_transfer
from transfer.agreement.journal import Journal


def evaluate_policy(config: EvaluationConfig, folder: Path, seen: Seen | None = None) -> dict[str, Any]:
    """Evaluate as configured, print the table, write `evaluation.json` into `folder`; its numbers.

    `seen`: what was looked at already.
    Raises ValueError where the task holds no answers to score against, or prompts do not fit the model.
    """
    start = time.monotonic()
    torch.set_num_threads(config.threads)
    folder.mkdir(parents=True, exist_ok=True)
    raw = (seen or look(config)).take()
    tokenizer = make_tokenizer(config.model, raw.characters(), raw.conversational, raw.tags())
    task = make_task(raw, tokenizer)
    policy = make_policy(config.model, tokenizer, config.seed)
    if isinstance(config.model, HfModelConfig) and not isinstance(config.rollout, VllmRolloutConfig):
        check_engine(policy)
    for note in (*task.notes, *check_lengths(config, task, policy, tokenizer)):
        print(note)
    with ExitStack() as stack:
        journal = stack.enter_context(closing(Journal(folder / JOURNALS / "trainer.jsonl")))
        transfer = stack.enter_context(make_transfer(config.transfer, folder, config.rollout.in_flight, journal))
        workers = stack.enter_context(Workers(worker_spec(policy, config, transfer.endpoint), config, folder, policy))
        senders = workers.senders()
        transfer.open(policy.state_dict(keep_vars=True), senders)
        transfer.push(policy.state_dict())
        client = RolloutClient(senders, tokenizer, config.rollout, transfer.recover, wanted_of(config, policy))
        cut = config.evaluate.cut(config.rollout.cut)
        if task.environment is not None:
            stack.enter_context(task.environment)
        numbers = scored(task, conversing(client.cut(cut), task.environment), config)
    written = {**_about(config), **numbers, "seconds": time.monotonic() - start}
    _print(numbers, written)
    path = folder / "evaluation.json"
    try:
        path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}): the numbers are those above") from error
    print(f"written: {path}")
    return written


def scored(task: Task, sampler: Sampler, config: EvaluationConfig) -> dict[str, float]:
    """What is measured of the held-out prompts that have gold scores, by the names of `evaluation.json`.

    RunError if environments have failed so often that there is nothing to measure.
    """
    prompts = [prompt for prompt in task.held_out if task.score(prompt, "") is not None]
    measured, sampled = measure(task, prompts, sampler, config)
    if measured.get("greedy_accuracy") is None or measured.get("gold") is None:
        why = next((f": environment {told.failed}: {told.why}" for told in sampled.episodes if told.failed), "")
        raise RunError(f"there is no score of any answer{why}")
    gold = {"greedy_accuracy": measured["greedy_accuracy"], "sampled_gold": measured["gold"]}
    passed = {f"pass@{k}": measured[f"pass_at_{k}"] for k in sorted(set(config.evaluate.k))}
    rows = len(sampled.completions)
    cut = sum(row.finish_reason == TRUNCATED for row in sampled.completions) / rows
    of_rows = {"truncated": cut, "tokens_per_answer": sampled.tokens / rows, "prompts": len(prompts)}
    return gold | passed | of_rows | of_episodes(sampled.episodes)


def _about(config: EvaluationConfig) -> dict[str, Any]:
    """What was evaluated, and how."""
    return {
        "model": config.model.path if isinstance(config.model, HfModelConfig) else choice(config.model),
        "task": choice(config.task),
        "seed": config.seed,
        "samples": config.evaluate.samples,
        "temperature": temperature_of(config),
        **config.evaluate.cut(config.rollout.cut).told,
        **({"stop": config.rollout.stop} if config.rollout.stop else {}),
        "max_new_tokens": config.rollout.max_new_tokens,
    }


def _print(numbers: dict[str, float], written: dict[str, Any]) -> None:
    title = (
        f"{written['model']} on {written['task']}: {numbers['prompts']:.0f} held-out prompts, "
        f"{written['samples']} samples each at temperature {written['temperature']:g}"
        + "".join(f", {name} {written[name]:g}" for name in ("top_p", "top_k", "min_p") if name in written)
    )
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in numbers.items():
        if name != "prompts":
            table.add_row(name.replace("_", " "), f"{value:.3f}")
    console = plain_console()
    console.print(title, soft_wrap=True, highlight=False)
    console.print(table)
