"""Whole runs: the same numbers by every way that the weights move, what a run leaves behind, and that it learns."""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch
from composed import composed_run
from history import check
from safetensors.torch import load_file
from sizes import SEEDS

from rlhf.reports.summary import PHASES
from rlhf.rollout.ray_workers import ray_running
from rlhf.run import run
from rlhf.shell.ending import RunError
from rlhf.tasks.tokenised import TokenisedTask
from transfer.config import RaySenderConfig

ROOT = Path(__file__).resolve().parent.parent
PLAIN = ("experiment=smoke", "steps=3", "logger=jsonl", "task.held_out=32", "sft.steps=4", "prompts_per_step=4")
SMOKE = (*PLAIN, "task.prompts=256")
ALGORITHMS = sorted(  # of RL
    path.stem for path in (ROOT / "conf" / "algo").glob("*.yaml") if "/schema/algo/base@" in path.read_text()
)
MAIN = {"grpo", "ppo", "dapo", "reinforce_pp"}  # the others' runs are variants; test_learner.py has all gradients
REWARDS = """
CONSTANT = 1

def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]

def takes_answers(prompts, completions, answer):
    return [float(text == right) for text, right in zip(completions, answer)]

def takes_topics(prompts, completions, topic, **columns):
    return [1.0 for _ in topic]

def raises(prompts, completions, **columns):
    return [1 / (len(text) - len(text)) for text in completions]

def too_short(prompts, completions, **columns):
    return [1.0]

def not_a_number(prompts, completions, **columns):
    return ["good"] * len(prompts)

def no_opinion(prompts, completions, **columns):
    return [None] * len(prompts)
"""


@pytest.fixture
def train(compose_run, tmp_path):
    """`train("algo=ppo", ..., name="a")` runs in this process; the folder."""

    def trained(*overrides: str, name: str = "run") -> Path:
        run(compose_run(*overrides), tmp_path / name, overrides)
        return tmp_path / name

    return trained


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The folder of a run whose weights do not move: SMOKE with the first seed."""
    folder = tmp_path_factory.mktemp("local") / "run"
    run(composed_run(*SMOKE, "transfer=local"), folder)
    check(folder / "journal")
    return folder


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    """A module of reward functions on the path: `mine`."""
    (tmp_path / "mine.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)


@pytest.fixture(scope="module")
def ray_for_all():
    """One Ray for this file's runs."""
    with ray_running(RaySenderConfig(), workers=2):
        yield


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def samples(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def numbers(folder: Path) -> list[dict[str, float]]:
    """All metrics but those that say how long things took and what the transfer moved."""
    measured = ("seconds/", "transfer/", "tokens_per_second")
    return [{name: value for name, value in row.items() if not name.startswith(measured)} for row in rows(folder)]


# --- one run, many ways -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "sender"),
    [
        ("ipc", "http"),
        ("ipc transfer.staging=live transfer.take=view", "http"),
        ("gloo", "http"),
        pytest.param("disk", "http", marks=pytest.mark.slow),
        pytest.param("ipc", "ray", marks=pytest.mark.slow),
        pytest.param("ipc transfer.staging=live transfer.take=view", "ray", marks=pytest.mark.slow),
        pytest.param("gloo", "ray", marks=pytest.mark.slow),
        pytest.param("disk", "ray", marks=pytest.mark.slow),
    ],
)
def test_every_backend_and_sender_gives_the_same_numbers(train, local, request, backend, sender):
    if sender == "ray":
        request.getfixturevalue("ray_for_all")
    steps = [row for row in numbers(local) if "train/loss" in row]
    assert {"train/reward", "train/gold", "train/kl", "train/grad_norm", "train/mismatch"} < set(steps[0])
    assert len(steps) == len({row["train/loss"] for row in steps}) == 3
    folder = train(*SMOKE, *f"transfer={backend}".split(), f"transfer/sender={sender}")
    assert numbers(folder) == numbers(local)
    assert samples(folder) == samples(local)
    assert json.loads((folder / "summary.json").read_text())["memory_mib/workers"] > 100


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [
        "rollout.workers=2",
        "transfer.take=copy",
        "transfer.slots=3",
        "transfer.staging=live transfer.take=copy",
        "transfer.staging=live transfer.take=view rollout.workers=2 rollout.in_flight=abort",
        "transfer.verify=full rollout.in_flight=keep",
    ],
)
def test_the_numbers_do_not_depend_on_how_many_workers_there_are_or_how_they_take_weights(train, way):
    reference = train(*SMOKE, "transfer=local", name="local")
    folder = train(*SMOKE, *way.split())
    assert samples(folder) == samples(reference)
    for row, expected in zip(numbers(folder), numbers(reference), strict=True):
        assert row == pytest.approx(
            expected, rel=1e-4, abs=1e-6
        )  # two halves of a batch round otherwise than the whole


@pytest.mark.parametrize(
    ("way", "sender"),
    [
        ("transfer=ipc", "http"),
        pytest.param("transfer=disk", "http", marks=pytest.mark.slow),
        pytest.param("transfer=ipc", "ray", marks=pytest.mark.slow),
        pytest.param("transfer=ipc transfer.staging=live", "http", marks=pytest.mark.slow),
    ],
)
def test_an_adapter_travels_alone_and_gives_the_same_numbers_by_every_way(train, request, way, sender):
    if sender == "ray":
        request.getfixturevalue("ray_for_all")
    lora = (*PLAIN, "model.lora.rank=4", "optim.lr=0.01", "transfer.verify_every=1")
    reference = train(*lora, "transfer=local", "transfer.verify=off", name="local")
    folder = train(*lora, *way.split(), f"transfer/sender={sender}")
    assert numbers(folder) == numbers(reference) and samples(folder) == samples(reference)
    losses = [row["train/loss"] for row in rows(folder) if "train/loss" in row]
    assert len(set(losses)) == 3 and rows(folder)[-2]["train/kl"] > 0.01, "it learns"
    adapter = sum(tensor.nbytes for tensor in load_file(folder / "adapter" / "adapter_model.safetensors").values())
    base = sum(tensor.nbytes for tensor in load_file(folder / "base" / "model.safetensors").values())
    moved = {row["transfer/bytes"] for row in rows(folder) if "transfer/bytes" in row}
    assert moved == {0.0} if "live" in way else all(adapter <= each < base / 3 for each in moved)


def test_another_seed_gives_other_numbers(train, local):
    assert numbers(train(*SMOKE, "transfer=local", "seed=1")) != numbers(local)


@pytest.mark.parametrize(
    "name", [name if name in MAIN else pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS]
)
def test_every_algorithm_takes_steps(train, name):
    folder = train(*SMOKE, "steps=2", "transfer=local", "algo.critic_warmup_steps=0", f"algo={name}")
    steps = [row for row in rows(folder) if "train/loss" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(row["train/grad_norm"] > 0 and row["train/skipped_updates"] == 0 for row in steps)
    assert [row["rollout/version"] for row in steps] == [0, 1]


def test_an_answer_is_scored_once_where_the_score_is_the_reward(train, monkeypatch):
    scored: list[bool] = []
    plain = TokenisedTask.score

    def count(task, prompt, answer):
        scored.append(prompt not in task.held_out)
        return plain(task, prompt, answer)

    monkeypatch.setattr(TokenisedTask, "score", count)
    folder = train(*SMOKE, "transfer=local")
    assert sum(scored) == 1 + 3 * 4 * 4, "a look at whether it scores at all; steps x prompts x samples"
    assert all(row["train/gold"] == row["train/reward"] for row in rows(folder) if "train/loss" in row)


def test_the_end_of_a_run_says_what_each_phase_takes_of_a_step(train, capsys):
    folder = train(*SMOKE, "logger=[console,jsonl]", "transfer=local")
    said, steps = capsys.readouterr().out, [row for row in rows(folder) if "seconds/step" in row]
    shown = {phase: float(re.search(rf"{phase} \([\d.]+%\) .* ([\d.]+) ms", said)[1]) for phase in PHASES}
    for phase, milliseconds in shown.items():
        measured = 1e3 * statistics.fmean(row[f"seconds/{phase}"] for row in steps)
        assert milliseconds == pytest.approx(measured, abs=0.06)
    assert sum(shown.values()) == pytest.approx(1e3 * statistics.fmean(row["seconds/step"] for row in steps), abs=0.3)


# --- what a run leaves ------------------------------------------------------------------------------------------------


def test_a_run_leaves_metrics_samples_curves_and_a_policy_that_transformers_loads(train, drawn):
    from safetensors.torch import load_file
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = train("experiment=smoke", "steps=3", "transfer=disk", name="run")
    logs = {"metrics.jsonl", "samples.jsonl", "lanes.jsonl", "summary.json", "status.json", "worker-0.log"}
    folders = {"tensorboard", "journal", "policy", "weights", "checkpoints"}
    assert {path.name for path in folder.iterdir()} == {*logs, *folders, "curves.png"}
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {"prompt", "answer", "reward", "gold", "version", "step"} <= set(samples(folder)[0])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["overrides"] == ["experiment=smoke", "steps=3", "transfer=disk"]
    assert {"reward_start", "reward_end", "gold_end", "greedy_accuracy_end", "kl_end", "transfer_share"} <= set(summary)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/reward")] == [1, 2, 3]

    policy, tokenizer = (auto.from_pretrained(folder / "policy") for auto in (AutoModelForCausalLM, AutoTokenizer))
    served = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "policy"))
    newest = max((folder / "weights").glob("*.safetensors"))  # what the worker had after the last step
    assert newest.stem == "00000001-00000003"
    served.load_state_dict(load_file(newest), strict=False)
    served.tie_weights()
    ids = torch.tensor([tokenizer.encode(samples(folder)[0]["prompt"])])
    with torch.no_grad():
        assert torch.equal(policy.eval()(ids).logits, served.eval()(ids).logits)
    assert tokenizer.decode(ids[0]) == samples(folder)[0]["prompt"]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_default_run_learns(train, seed):
    summary = json.loads((train(f"seed={seed}", "logger=jsonl") / "summary.json").read_text())
    assert summary["gold_end"] >= summary["gold_start"] + 0.15
    assert summary["reward_end"] >= summary["reward_start"] + 0.05
    assert summary["reward_model_accuracy"] > 0.6


# --- data, models and rewards of the user's own -----------------------------------------------------------------------


@pytest.mark.slow
def test_preferences_from_a_file_train_a_reward_model_that_is_then_optimised(train, monkeypatch):
    monkeypatch.chdir(ROOT)
    example = ("task=jsonl", "task.path=examples/preferences.jsonl", "model=micro", "transfer=local", "logger=jsonl")
    small = ("steps=2", "sft.steps=20", "reward.steps=20", "prompts_per_step=4", "samples_per_prompt=2")
    folder = train(*example, *small, "rollout.max_new_tokens=24")
    assert all("train/reward" in row for row in rows(folder) if "train/loss" in row)
    assert not any("eval/gold" in row for row in rows(folder))
    again = train(*example, *small, f"reward.path={folder}/reward_model", "rollout.max_new_tokens=24", name="again")
    assert rows(again)[0]["eval/reward"] == pytest.approx(rows(folder)[0]["eval/reward"], abs=1e-5)


def test_answers_from_a_file_are_scored_by_exact_match(train, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = train(*PLAIN, "task=jsonl", "task.path=examples/answers.jsonl", "transfer=local")
    assert all(row["reward"] == row["gold"] in (0.0, 1.0) for row in samples(folder))


def test_conversations_from_a_file_are_rewarded_by_a_users_function(train, monkeypatch):
    monkeypatch.chdir(ROOT)
    reward = ("reward=function", "reward.function=examples.reward_functions:brevity")
    folder = train(*PLAIN, *reward, "task=jsonl", "task.path=examples/conversations.jsonl", "transfer=local")
    assert all("<|user|>" in row["prompt"] and 0 <= row["reward"] <= 1 for row in samples(folder))


def test_the_policy_of_a_run_is_the_checkpoint_of_another(train, local):
    end = next(row for row in reversed(rows(local)) if "eval/gold" in row)
    second = train(*SMOKE, "sft.steps=0", "transfer=local", "model=hf", f"model.path={local}/policy")
    start = rows(second)[0]
    assert {name: value for name, value in end.items() if name.startswith("eval/")} == {
        name: value for name, value in start.items() if name.startswith("eval/")
    }


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ("raises", RunError, r"reward\.function=mine:raises raised ZeroDivisionError: .*mine\.py:14\)"),
        pytest.param(
            "too_short",
            ValueError,
            r"must return a list of 32 numbers or None \(got 1 values\)",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "not_a_number", ValueError, r"must return finite numbers or None \(got 'good'\)", marks=pytest.mark.slow
        ),
        ("no_opinion", RunError, r"16 of 16 samples have no reward \(None\)"),
        ("missing", ValueError, r"mine:missing cannot be imported.*AttributeError"),
        pytest.param("CONSTANT", ValueError, r"mine:CONSTANT must name a function \(got int\)", marks=pytest.mark.slow),
        ("takes_topics", ValueError, r"the task's columns are answer: missing a required argument: 'topic'"),
    ],
)
def test_a_reward_function_that_does_not_do_its_part_is_told_so(train, rewards, function, error, message):
    with pytest.raises(error, match=message):
        train(*SMOKE, "transfer=local", "reward=function", f"reward.function=mine:{function}")


def test_the_columns_of_the_data_reach_the_reward_function_by_name(train, rewards, tmp_path):
    write_rows(tmp_path / "rows.jsonl", answer=str)
    folder = train(*FROM_FILE, f"task.path={tmp_path}/rows.jsonl", "reward.function=mine:takes_answers")
    assert all(row["reward"] == row["gold"] is not None for row in samples(folder))


@pytest.mark.parametrize("column", ["prompts", "completions"])
def test_a_column_with_the_name_of_an_argument_is_found_before_anything_starts(train, rewards, tmp_path, column):
    write_rows(tmp_path / "rows.jsonl", answer=str, **{column: str})
    with pytest.raises(ValueError, match=rf"multiple values for argument '{column}'; .*rename the column"):
        train(*FROM_FILE, f"task.path={tmp_path}/rows.jsonl", "reward.function=mine:length")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["status.json"]


FROM_FILE = (*PLAIN, "transfer=local", "reward=function", "task=jsonl", "task.held_out=8")


def write_rows(path: Path, **columns) -> None:
    """Forty questions; each column is a function of the question's number."""
    lines = [{"prompt": f"{n}?", **{name: value(n) for name, value in columns.items()}} for n in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
