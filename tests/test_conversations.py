"""Runs of task=guess: what they log, the same by every way of the weights, and that hints come to be used."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from rlhf.episodes.loop import Episodes
from rlhf.models.policy import make_policy
from rlhf.models.tokenizer import make_tokenizer
from rlhf.rollout.client import RolloutClient
from rlhf.rollout.worker import Worker
from rlhf.run import run
from rlhf.tasks import make_task, read_task
from transfer import make_transfer
from transfer.config import LocalConfig
from transfer.trainer.senders.direct import DirectSender

SMOKE = ("experiment=guess", "model=micro", "steps=3", "sft.steps=20", "prompts_per_step=8", "task.held_out=16")


@pytest.fixture
def train(compose_run, tmp_path):
    """`train("algo=ppo", ..., name="a")` runs in this process; the folder."""

    def trained(*overrides: str, name: str = "run") -> Path:
        run(compose_run(*overrides, "logger=jsonl"), tmp_path / name, overrides)
        return tmp_path / name

    return trained


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(folder: Path) -> list[dict[str, float]]:
    measured = ("seconds/", "transfer/", "tokens_per_second")
    rows = lines(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(measured)} for row in rows]


@pytest.mark.parametrize("algo", ["grpo", "ppo", "dapo"])
def test_a_run_logs_turns_and_whole_conversations_and_counts_sampled_tokens_alone(train, algo):
    dials = (f"algo={algo}", "algo.critic_warmup_steps=0", "algo.dynamic_sampling=0")
    folder = train(*SMOKE, *dials, "transfer=local")
    steps = [row for row in lines(folder / "metrics.jsonl") if "train/loss" in row]
    assert len(steps) == 3 and all(row["train/mismatch"] < 1e-5 for row in steps)
    assert any(row["train/grad_norm"] > 0 for row in steps) and all(1 < row["train/turns"] <= 3 for row in steps)
    assert all(row["train/tokens_per_row"] <= 2 * row["train/turns"] for row in steps), (
        "max_new_tokens a turn, no hints"
    )
    for row in lines(folder / "samples.jsonl"):
        said = row["conversation"]
        assert said[-1] == row["answer"] and len(said) in (1, 3, 5) and set(said[1::2]) <= {"<", ">"}


@pytest.mark.slow
def test_over_worker_processes_a_run_has_the_numbers_of_one_process(train):
    alone = train(*SMOKE, "transfer=local", name="local")
    workers = train(*SMOKE, "transfer=ipc", name="ipc")
    assert numbers(workers) == numbers(alone)
    assert lines(workers / "samples.jsonl") == lines(alone / "samples.jsonl")


def played(config, folder: Path, swapped: bool) -> tuple[float, float]:
    """Gold score on held-out ranges, and the share of second guesses on the side of the first that the hint names."""
    raw = read_task(config.task, config.seed)
    if swapped:
        honest, other = raw.replies.reply, {"<": ">", ">": "<", None: None}
        lying = dataclasses.replace(raw.replies, reply=lambda columns, answers: other[honest(columns, answers)])
        raw = dataclasses.replace(raw, replies=lying)
    tokenizer = make_tokenizer(config.model, [], chat=False)
    policy, task = make_policy(config.model, tokenizer, seed=0), make_task(raw, tokenizer)
    with make_transfer(LocalConfig(), folder) as transfer:
        senders = [DirectSender(Worker.around(policy, transfer.endpoint), "worker 0")]
        transfer.open(policy.state_dict(keep_vars=True), senders)
        transfer.push(policy.state_dict())
        sampler = Episodes(RolloutClient(senders, tokenizer, config.rollout), task.environment)
        rollouts = sampler.sample(task.held_out, n=8, temperature=1.0, seed=5)
    gold = [task.score(prompt, text) for prompt, text in zip(rollouts.prompts_B, rollouts.texts, strict=True)]
    moved = [said for said in rollouts.conversations if len(said) >= 3 and said[2] != said[0]]
    followed = [(said[2] < said[0]) == (said[1] == "<") for said in moved]
    return sum(gold) / len(gold), sum(followed) / len(followed)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_policy_learns_to_use_hints_so_that_lies_mislead_it(train, compose_run, tmp_path):
    folder = train("experiment=guess", "steps=60", "transfer=local")
    config = compose_run("experiment=guess", "model=hf", f"model.path={folder}/policy", "transfer=local")
    (gold, followed), (misled, _) = (played(config, tmp_path, swapped) for swapped in (False, True))
    summary = json.loads((folder / "summary.json").read_text())
    assert gold > 0.45 > summary["gold_start"] + 0.15
    assert followed > 0.85 and misled < gold - 0.15
