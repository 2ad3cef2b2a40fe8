"""`mode=check`: the estimate is what is really there, one step is made with the real parts, and nothing is left."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from forked import LIGHT
from safetensors import safe_open

from rlhf.check import BESIDE, check_run, count, human, one_step, sizes_of
from rlhf.checkpoint.state import optimizer_tensors
from rlhf.config import LoraConfig
from rlhf.learning.optimizer import make_optimizer
from rlhf.models.policy import make_policy
from rlhf.models.tokenizer import make_tokenizer
from rlhf.preflight.memory_estimate import Count, checkpoint, gradients, optimizer_state, slots, trainer, worker
from rlhf.preflight.plan import arithmetic, files
from rlhf.run import run
from rlhf.shell.ending import RunError, alone
from rlhf.tasks import make_task, read_task
from rlhf.train import NOWHERE, _check, for_check
from transfer import make_transfer

SMALL = (
    "experiment=smoke",
    "transfer=local",
    "sft.steps=3",
    "steps=3",
    "task.held_out=8",
    "task.prompts=64",
    "task.max_length=3",
)
ODD = """\
from dataclasses import dataclass
from rlhf.config import RewardConfig, TaskConfig
from rlhf.plugins import reward, task
from rlhf.tasks import RawTask, Row

@dataclass(slots=True, kw_only=True)
class OddTask(TaskConfig): ...

@dataclass(slots=True, kw_only=True)
class OddReward(RewardConfig): ...

@task("odd", OddTask)
def odd(config, seed):
    rows = [Row(f"{letter}?", {"answer": letter}, demonstration=letter) for letter in "abcdefghijklmnopqrst"]
    return RawTask(rows, rows[:2], gold=lambda columns, answer: 1 / len(answer))

def no_such_grade(config, task):
    raise KeyError("no such grade")

@reward("odd", OddReward, check=no_such_grade)
def reward_of_its_own(config, given):
    return lambda prompts, answers: [1.0] * len(answers)
"""
REWARDS = """\
def broken(prompts, completions, **columns):
    raise LookupError("no such grade")
"""


@pytest.fixture(autouse=True)
def functions(tmp_path, monkeypatch):
    """The module `broken_reward` on the path, outside of what tests look at."""
    folder = tmp_path / "python"
    folder.mkdir()
    (folder / "broken_reward.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "broken_reward", raising=False)


def policy_and_task(config):
    raw = read_task(config.task, config.seed)
    tokenizer = make_tokenizer(config.model, raw.characters(), raw.conversational)
    return make_policy(config.model, tokenizer, config.seed), make_task(raw, tokenizer)


def sizes(config):
    policy, _ = policy_and_task(config)
    return sizes_of(policy, config.model.lora, getattr(torch, config.model.dtype.value), [])


def below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")} - {"python", "python/broken_reward.py"}


# --- the estimate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides", [(), ("model.dtype=bfloat16",), ("model.dtype=bfloat16", "optim.master_weights=false")]
)
def test_weights_gradients_and_optimiser_state_of_a_model_are_estimated_to_the_byte(compose_run, overrides):
    config = compose_run(*SMALL, *overrides)
    policy, _ = policy_and_task(config)
    masters, counted = config.optim.master_weights, count(policy.parameters())
    assert counted.nbytes == sum(p.nbytes for p in policy.parameters())
    optimizer = make_optimizer(policy, config.optim, 1e-3)
    policy(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.float().sum().backward()
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    assert gradients(counted, masters) == sum(p.grad.nbytes for p in stepped)
    optimizer.step()
    assert optimizer_state(counted, masters) == sum(t.nbytes for t in optimizer_tensors(policy, optimizer).values())


def test_an_adapters_sizes_are_known_before_it_is_there(compose_run):
    from rlhf.models.adapter import add_adapter, sent_weights

    config = compose_run(*SMALL)
    policy, _ = policy_and_task(config)
    base, lora = count(policy.parameters()), LoraConfig(rank=4, target=["q_proj", "up_proj"])
    told = sizes_of(policy, lora, torch.float32, [])
    assert not any(".lora_" in name for name, _ in policy.named_parameters())
    add_adapter(policy, lora.rank, lora.alpha, lora.target)
    sent = list(sent_weights(policy).values())
    assert told.learning == Count(sum(t.numel() for t in sent), len(sent), 4)
    assert told.policy.elements == base.elements + told.learning.elements


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_slots_are_as_large_as_those_that_the_arena_allocates(compose_run, tmp_path, dtype):
    config = compose_run(*SMALL, "transfer=ipc", "transfer.slots=3", f"rollout.dtype={dtype}")
    policy, _ = policy_and_task(config)
    told = slots(config, sizes_of(policy, config.model.lora, getattr(torch, dtype), []))
    with make_transfer(config.transfer, tmp_path) as transfer:
        publisher = transfer._publisher
        weights = policy.state_dict(keep_vars=True)
        from transfer.agreement.manifest import Manifest

        publisher.prepare(Manifest.of(weights, getattr(torch, dtype)), weights)
        assert told == {"transfer, 3 slots": publisher._slots._regions[0].bytes.nbytes}


@pytest.mark.parametrize(
    ("overrides", "there", "not_there"),
    [
        (("algo=grpo", "algo.kl_coef=0.1"), {"reference"}, {"critic", "reward model"}),
        (("algo=ppo", "algo.critic_warmup_steps=0"), {"critic", "critic, gradients", "critic, optimiser"}, set()),
        (("algo=dpo",), set(), {"reference", "critic"}),
        (("reward=model",), {"reward model"}, set()),
        (("model.lora.rank=4",), set(), {"reference"}),
        (("transfer=ipc", "transfer.staging=live"), set(), {"transfer, 2 slots"}),
        (("transfer=gloo",), {"transfer, 2 buckets"}, set()),
    ],
)
def test_the_estimate_has_what_the_choices_need_and_nothing_else(compose_run, overrides, there, not_there):
    config = compose_run(*SMALL, *overrides)
    parts = trainer(config, sizes(config))
    assert there <= set(parts) and not not_there & set(parts)


def test_every_rank_with_shards_has_whole_buckets_and_its_share_of_a_slot(compose_run):
    for transfer, name, shares in (("gloo", "transfer, 2 buckets", 1), ("ipc", "transfer, 2 slots", 2)):
        config = compose_run(*SMALL, "trainer=sharded", "trainer.ranks=2", f"transfer={transfer}")
        parts = trainer(config, sizes(config), 2)
        assert parts[name] == pytest.approx(2 * sizes(config).slot / shares, abs=1)


def test_a_worker_that_copies_has_weights_of_its_own_and_one_that_views_has_none(compose_run):
    views, copies = (compose_run(*SMALL, "transfer=ipc", f"transfer.take={take}") for take in ("view", "copy"))
    told = sizes(copies)
    assert sum(worker(views, told).values()) == 0
    assert worker(copies, told) == {"weights": told.slot}


OF_REWARD_MODEL = ("reward=model", "reward.steps=2", "reward.prompts=64")


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("algo=ppo", "algo.critic_warmup_steps=0", *OF_REWARD_MODEL), id="a critic and a reward model"),
        pytest.param(
            ("algo.ref_decay=0.9", "model.dtype=bfloat16", "logger=jsonl"), id="a moving reference in bfloat16"
        ),
        pytest.param(("algo.ref_decay=0.9", "logger=[]"), id="a moving reference", marks=pytest.mark.slow),
    ],
)
def test_a_run_writes_the_files_that_were_told_and_checkpoints_as_large_as_was_told(
    compose_run, drawn, tmp_path, overrides
):
    config = compose_run(*SMALL, "steps=1", *overrides)
    run(config, tmp_path / "run")
    assert {name.rstrip("/") for name, _ in files(config)} - {".hydra"} == {
        p.name for p in (tmp_path / "run").iterdir()
    }
    held = 0
    for path in (tmp_path / "run" / "checkpoints" / "00000001").rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            held += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 - no mapping
    assert held == checkpoint(config, sizes(config))


@pytest.mark.parametrize(
    ("nbytes", "said"), [(5, "5 B"), (2048, "2 KiB"), (3 * 2**19, "1.5 MiB"), (2**41, "2048.00 GiB")]
)
def test_bytes_are_said_in_units_that_people_read(nbytes, said):
    assert human(nbytes) == said


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_arithmetic_of_a_run_is_told_line_by_line(compose_run):
    dials = ("steps=10", "prompts_per_step=8", "samples_per_prompt=4", "updates_per_step=2", "evaluate_every=4")
    config = compose_run(*SMALL, *dials, "rollout.max_new_tokens=6", "tokens_per_microbatch=50", "checkpoint.every=4")
    _, task = policy_and_task(config)
    told = dict(arithmetic(config, task))
    assert told["rows a step"] == "8 prompts x 4 samples = 32"
    assert told["tokens a step"] == "32 rows x 6 = 192 sampled, at most"
    assert told["updates"] == "2 a step, each of 16 rows at most; 20 in all"
    assert told["micro-batches"] == "4 an update: 5 of the longest rows (10 tokens) fit in 50"  # 3 letters, "=", 6 more
    assert told["evaluations"] == "4 x 8 held-out prompts x 2 = 64 answers"  # before steps 1, 5, 9; after 10
    assert told["checkpoints"].startswith("4, ")  # 0, 4, 8, 10


# --- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ("algo=ppo", "reward=model", "steps=9"),  # a critic and a reward model
        ("algo=dpo", "algo.held_out=0.8", "task.prompts=20", "prompts_per_step=40"),  # more pairs than prompts
        ("algo=dapo", "profile.steps=[2]", "alarms.stop=true", "alarms.truncated=0", "model.lora.rank=2"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_a_check_makes_one_step_of_whatever_is_trained_and_leaves_nothing(compose_run, tmp_path, capsys, overrides):
    check_run(compose_run(*SMALL, *overrides), tmp_path / "outputs" / "run")
    screen = capsys.readouterr().out
    assert "all is well" in screen and "one step" in screen and "learn" in screen
    assert below(tmp_path) == set()


def test_a_reward_that_is_broken_is_found_by_the_check_and_nothing_is_left(compose_run, tmp_path):
    config = compose_run(*SMALL, "reward=function", "reward.function=broken_reward:broken")
    with pytest.raises(RunError, match="LookupError: no such grade"):
        check_run(config, tmp_path / "run")
    assert below(tmp_path) == set()


def test_what_a_killed_check_has_left_is_removed_by_a_later_one_but_not_that_of_one_that_goes_on(compose_run, tmp_path):
    dead, going, young = (tmp_path / f"{BESIDE}{name}" for name in ("dead", "going", "young"))
    for folder in (dead, going, young):
        (folder / "policy").mkdir(parents=True)
    for folder in (dead, going):
        os.utime(folder, (0, 0))
    with alone(going), pytest.raises(RunError, match="no such grade"):
        check_run(compose_run(*SMALL, "reward=function", "reward.function=broken_reward:broken"), tmp_path / "run")
    assert sorted(tmp_path.glob(f"{BESIDE}*")) == sorted([going, young])


def test_an_error_that_does_not_explain_itself_becomes_one_line(compose_run, tmp_path, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("tried to allocate\n  20 GiB")

    monkeypatch.setattr("rlhf.learning.learner.Learner.learn", no_memory)
    with pytest.raises(RunError, match=r"^the check failed \(grpo\): OutOfMemoryError: tried to allocate 20 GiB "):
        check_run(compose_run(*SMALL), tmp_path / "run")
    assert below(tmp_path) == set()


def test_a_check_needs_nothing_that_draws(compose_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    with pytest.raises(ImportError):
        importlib.import_module("matplotlib.pyplot")
    check_run(compose_run(*SMALL), tmp_path / "run")


def test_a_check_of_a_folder_with_a_run_says_so_and_leaves_it_as_it_is(compose_run, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    check_run(compose_run(*SMALL), tmp_path / "run")
    assert "holds a run, which a new one there removes" in capsys.readouterr().out
    assert below(tmp_path) == {"run", "run/metrics.jsonl"}


def test_weights_on_a_disk_of_their_own_are_written_beside_those_of_runs(compose_run, tmp_path):
    config = compose_run(*SMALL, "transfer=disk", f"transfer.path={tmp_path}/weights")
    assert one_step(config).transfer.path == config.transfer.path
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "00000000.json").write_text("a run's")
    check_run(config, tmp_path / "run")
    assert below(tmp_path) == {"weights", "weights/00000000.json"}
    assert (tmp_path / "weights" / "00000000.json").read_text() == "a run's"


# --- the command line -------------------------------------------------------------------------------------------------


def test_a_check_lets_hydra_write_nothing_wherever_its_folder_is_given():
    assert for_check(["seed=1", "mode=train"]) == ["seed=1", "mode=train"]
    assert for_check(["mode=check", "mode=train"]) == ["mode=check", "mode=train"]
    assert for_check(["mode=check", "seed=1"]) == ["mode=check", *NOWHERE, "seed=1"]
    assert for_check(["mode=check", "hydra.run.dir=x", "--cfg"]) == ["mode=check", "hydra.run.dir=x", *NOWHERE, "--cfg"]


def test_the_command_checks_says_so_and_leaves_nothing(rlhf_train, tmp_path):
    done = rlhf_train(*SMALL, "mode=check", "hydra.run.dir=out", "model=micro")
    assert done.returncode == 0, done.stderr
    assert "Written into out" in done.stdout and "all is well" in done.stdout
    assert below(tmp_path) == set()


def test_the_command_ends_with_one_line_and_an_exit_code_where_the_step_fails(rlhf_train, tmp_path):
    path = {
        "PYTHONPATH": f"{tmp_path / 'python'}:{Path(__file__).resolve().parents[1]}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = rlhf_train(*SMALL, "mode=check", "reward=function", "reward.function=broken_reward:broken", env=path)
    assert done.returncode == 1 and "LookupError: no such grade" in done.stderr
    assert "Traceback" not in done.stderr and "rlhf.resume" not in done.stderr
    assert below(tmp_path) == set()


@pytest.mark.parametrize("mode", ["check", pytest.param("train", marks=pytest.mark.slow)])
def test_a_folder_in_which_a_run_trains_is_told_before_any_data_are_read(rlhf_train, tmp_path, mode):
    (tmp_path / "run").mkdir()
    missing = ("task=jsonl", "task.path=none_such.jsonl")
    told = ("hydra.run.dir=run", "hydra.output_subdir=null", f"mode={mode}")
    unread = "task.path: cannot read"
    assert unread in rlhf_train(*missing, *told, env={LIGHT: "1"}).stderr
    with alone(tmp_path / "run"):
        done = rlhf_train(*missing, *told, env={LIGHT: "1"})
    assert done.returncode == 1 and re.search(r"another process trains in \S*run: end it", done.stderr), done.stderr
    assert unread not in done.stderr and "Traceback" not in done.stderr


ODD_TASK = "task=odd", "task=odd (odd_parts:odd): its gold function fails on '': ZeroDivisionError: division by zero"
ODD_REWARD = "reward=odd", "reward=odd (odd_parts:reward_of_its_own): its check fails: KeyError: 'no such grade'"


@pytest.mark.parametrize(
    ("mode", "chosen", "said"),
    [
        ("check", *ODD_TASK),
        ("train", *ODD_REWARD),
        pytest.param("train", *ODD_TASK, marks=pytest.mark.slow),
        pytest.param("check", *ODD_REWARD, marks=pytest.mark.slow),
    ],
)
def test_a_part_of_somebody_s_that_raises_oddly_is_told_in_one_line(rlhf_train, tmp_path, mode, chosen, said):
    (tmp_path / "odd_parts.py").write_text(ODD)
    done = rlhf_train("experiment=smoke", "plugins=[odd_parts]", "reward=verifier", chosen, f"mode={mode}")
    assert done.returncode == 1 and said in done.stderr
    assert "Traceback" not in done.stderr


def test_whatever_a_look_at_the_task_raises_is_one_line_of_the_check(compose_run, tmp_path, monkeypatch):
    def odd(config):
        raise LookupError("a look\nthat fails")

    monkeypatch.setattr("rlhf.train.look", odd)
    with pytest.raises(RunError, match=r"^the check failed \(task and reward\): LookupError: a look that fails "):
        _check(compose_run(*SMALL), tmp_path / "run", "run")
