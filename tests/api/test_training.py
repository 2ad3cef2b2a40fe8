"""`rlhf.train` in a program: its objects are trained, read and called, and the process is afterwards as it was."""

from __future__ import annotations

import asyncio
import builtins
import json
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from programs import ROWS, SMALL, brevity

import rlhf
from rlhf.reports.summary import read_summary

TIMES = ("seconds", "tokens_per_second", "transfer/", "memory", "gpu", "lanes", "rollout/queue")


def numbers(folder):
    """The metrics of a run that do not tell of time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if not name.startswith(TIMES)} for row in lines]


def children():
    """Processes that this one has started and that live."""
    tasks = f"/proc/{os.getpid()}/task"
    return {pid for each in os.listdir(tasks) for pid in open(f"{tasks}/{each}/children").read().split()}


def test_the_policy_is_trained_in_place_and_written(train, policy, tokenizer):
    from transformers import AutoModelForCausalLM

    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    generation, tokenizer.padding_side = policy.generation_config, "right"
    policy.train()
    result = train()
    assert result.policy is policy
    assert policy.training
    assert policy.generation_config is generation
    assert tokenizer.padding_side == "right"
    assert any(not torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    written = AutoModelForCausalLM.from_pretrained(result.policy_folder).state_dict()
    assert all(torch.equal(tensor, written[name]) for name, tensor in policy.state_dict().items())


def test_threads_generators_and_signals_are_afterwards_as_they_were(train, default_signals):
    torch.set_num_threads(2)
    told: list[int] = []
    signal.signal(signal.SIGUSR1, own := lambda *_: told.append(1))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    def telling(prompts, completions, **columns):
        os.kill(os.getpid(), signal.SIGUSR1)
        return brevity(prompts, completions)

    try:
        train("threads=1", rewards=telling)
        assert told
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
        assert {number: signal.getsignal(number) for number in before} == before
        assert signal.getsignal(signal.SIGUSR1) is own
    finally:
        torch.set_num_threads(1)


@pytest.mark.slow
def test_objects_give_the_numbers_of_what_a_configuration_names(train, tmp_path, folder_of_a_policy, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    train()
    words = [f"task.path={tmp_path / 'rows.jsonl'}", f"model.path={folder_of_a_policy}", "model=hf", "task=jsonl"]
    words += ["reward=function", "reward.function=programs:brevity"]
    config = rlhf.compose([each for each in SMALL if each != "task=given"] + words)
    assert rlhf.train(config, folder=tmp_path / "named").policy is None
    assert len(numbers(tmp_path / "run")) == 4
    assert numbers(tmp_path / "named") == numbers(tmp_path / "run")


@pytest.mark.slow
def test_a_run_goes_on_in_a_program_as_if_it_had_never_been_stopped(train, tmp_path, policy, capsys):
    start = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    train("steps=3", folder=tmp_path / "whole")
    whole = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    policy.load_state_dict(start)
    calls: list[int] = []

    def interrupting(prompts, completions, **columns):
        calls.append(len(completions))
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return brevity(prompts, completions)

    before = children()
    with pytest.raises(KeyboardInterrupt):
        train("steps=3", rewards=interrupting)
    assert children() == before
    assert "rlhf.train(..., folder=" in capsys.readouterr().err
    policy.load_state_dict(start)
    assert repr(train("steps=3", resume=True)).startswith("run finished, 3 steps")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in policy.state_dict().items())
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    policy.load_state_dict(start)
    train("steps=3", resume=True)
    assert "finished already" in capsys.readouterr().out
    assert all(torch.equal(tensor, whole[name]) for name, tensor in policy.state_dict().items())


@pytest.mark.slow
def test_other_rows_are_refused_when_a_run_goes_on_and_its_dials_stay(train, tmp_path, capsys):
    train()
    config = (tmp_path / "run" / ".hydra" / "config.yaml").read_text()
    with pytest.raises(rlhf.RunError, match=r"are not those that the run began with: .* \(data\[\d+\]: 'say "):
        train("steps=3", data=ROWS[::-1], resume=True)
    assert (tmp_path / "run" / ".hydra" / "config.yaml").read_text() == config
    train("steps=3", resume=True)
    assert "other dials from here on: steps is 3 (was 2)" in capsys.readouterr().out


@pytest.mark.slow
def test_commands_say_that_a_run_is_a_program_s_and_read_it(train, tmp_path, monkeypatch, capsys):
    import rlhf.report
    import rlhf.resume

    train()
    monkeypatch.setattr("sys.argv", ["rlhf.resume", str(tmp_path / "run")])
    with pytest.raises(SystemExit):
        rlhf.resume.main()
    said = capsys.readouterr().err
    assert "is the run of a Python program, which gave it policy, tokenizer, data, rewards: go on there, with" in said
    assert f"rlhf.train(..., folder='{tmp_path / 'run'}', resume=True)" in said
    monkeypatch.setattr("sys.argv", ["rlhf.report", str(tmp_path / "run")])
    rlhf.report.main()
    assert "programs:brevity" in (tmp_path / "run" / "report.html").read_text()


def test_a_program_does_not_go_on_with_a_run_of_the_command_line(train, tmp_path):
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    for name in ("overrides", "config"):
        (tmp_path / "run" / ".hydra" / f"{name}.yaml").write_text("[]\n")
    with pytest.raises(ValueError, match=r"is the run of a command line: go on with python -m rlhf\.resume"):
        train(resume=True)


async def asynchronous(completions, answer, **columns):
    """In TRL's form, on an event loop of its own."""
    await asyncio.sleep(0)
    return [float(right in text) for text, right in zip(completions, answer, strict=True)]


def test_it_runs_below_a_running_event_loop_and_adds_rewards_up(train):
    async def cell():
        return train(rewards={brevity: 0.5, asynchronous: 2.0})

    result = asyncio.run(cell())
    step = next(row for row in result.metrics if "train/reward" in row)
    parts = {name: value for name, value in step.items() if name.startswith("train/reward/")}
    assert set(parts) == {"train/reward/brevity", "train/reward/asynchronous"}
    assert step["train/reward"] == pytest.approx(
        0.5 * parts["train/reward/brevity"] + 2 * parts["train/reward/asynchronous"]
    )


def test_it_runs_in_another_thread_and_one_at_a_time(train):
    outcome: list[object] = []

    def meanwhile(prompts, completions, **columns):
        if not outcome:
            outcome.append(None)
            with pytest.raises(rlhf.RunError, match="of this process has not ended"):
                train()
        return brevity(prompts, completions)

    thread = threading.Thread(target=lambda: outcome.append(train(rewards=meanwhile)))
    thread.start()
    thread.join(60)
    assert repr(outcome[-1]).startswith("run finished, 2 steps")


@pytest.mark.slow
def test_a_call_that_takes_too_long_costs_its_samples(train):
    def slow(prompts, completions, **columns):
        while True:
            pass

    words = ["reward=given", "reward.timeout_s=0.05", "reward.max_failed=1", "steps=1", "evaluate_every=5"]
    result = train(*words, rewards=slow)
    assert next(row["train/reward_timed_out"] for row in result.metrics if "train/reward_timed_out" in row) == 8


def test_a_notebook_is_shown_lines_without_control_characters(train, monkeypatch, capsys):
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    train("logger=[console]")
    shown = capsys.readouterr().out
    assert "grpo 2/2" in shown
    assert "reward (trained on)" in shown
    assert not set(shown) & {"\x1b", "\r", "\b"}


@pytest.mark.slow
def test_rows_come_from_data_sets_iterables_and_files(train, tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "held.jsonl").write_text('{"prompt": "say 99", "answer": "99"}\n')
    rows = datasets.Dataset.from_list(ROWS)
    for data in (rows, rows.to_iterable_dataset(), ({**row, "n": np.float32(1)} for row in ROWS)):
        result = train("task.held_out=9", data=data, held_out=tmp_path / "held.jsonl")
        assert {row["prompt"] for row in result.samples} <= {row["prompt"] for row in ROWS} | {"say 99"}


def test_a_sum_has_a_place_for_a_program_s_functions(train):
    parts = "reward.parts={mine:{kind:given,weight:0.5},right:{kind:verifier}}"
    result = train("reward=sum", parts)
    assert {"train/reward/mine", "train/reward/right"} <= set(
        next(row for row in result.metrics if "train/reward" in row)
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_policy_goes_to_the_gpu_and_its_worker_gets_it_there(train, policy):
    """And a policy that is there already, in bfloat16."""
    for given in (policy, policy.to("cuda", torch.bfloat16)):
        states = torch.cuda.get_rng_state()
        assert train("transfer=ipc", policy=given).policy.device.type == "cuda"
        assert torch.equal(torch.cuda.get_rng_state(), states)


@pytest.mark.slow
def test_rows_are_those_of_an_environment_s_episodes(tmp_path, monkeypatch):
    rows = [{"prompt": f"{a}*{b}=", "answer": str(a * b)} for a in range(2, 8) for b in range(2, 8)]
    words = ["experiment=calculator", "steps=1", "task.held_out=4", "sft.steps=1", "logger=[]", "transfer=local"]
    words += ["prompts_per_step=2", "samples_per_prompt=2"]
    result = rlhf.train(rlhf.compose(words), folder=tmp_path / "run", data=rows)
    assert {row["prompt"] for row in result.samples}
    assert all(any(each["prompt"] in row["prompt"] for each in rows) for row in result.samples)


@pytest.mark.slow
def test_an_adapter_is_trained_in_the_policy_that_is_given(train, policy):
    pytest.importorskip("peft")
    train("model.lora.rank=2")
    assert any("lora_" in name for name, _ in policy.named_parameters())


def test_a_result_is_that_of_any_run_s_folder(train, tmp_path):
    result = train("logger=[]")
    again = rlhf.Result(tmp_path / "run")
    assert again.metrics == result.metrics
    assert again.summary == result.summary == read_summary(tmp_path / "run")
    assert repr(again) == repr(result)
    assert f"\n  {'reward':<27}{result.summary['reward_start']:8.3f} -> " in repr(result)
    assert repr(rlhf.Result(tmp_path / "none")).startswith("run unfinished, 0 steps")


@pytest.mark.parametrize(
    ("objects", "said"),
    [
        ({"policy": 3}, r"policy= must be a causal LM of transformers \(got int\)"),
        ({"policy": torch.nn.Linear(2, 2)}, r"policy= must be a causal LM of transformers \(got Linear\)"),
        ({"rewards": "x"}, r"rewards= must be a function, a list of them or a dict with weights \(got 'x'\)"),
        ({"rewards": []}, r"rewards= must be a function, a list of them or a dict with weights \(got \[\]\)"),
        ({"rewards": [3]}, r"rewards= must be functions \(got 3\): others are chosen by reward="),
        ({"rewards": lambda a: [1.0]}, r"is called as \(prompts, completions, \*\*columns\)"),
        ({"rewards": {brevity: float("nan")}}, "reward.weights must be finite numbers"),
        ({"data": {"prompt": ["a"]}}, r"data= must be a list of dicts, .* \(got dict\)"),
        ({"data": [1, {"prompt": "a"}]}, r"data\[0\]: must be a dict \(got 1\)"),
        ({"data": [{"prompt": "a"}, {"prompt": object()}]}, r"data\[1\]: JSON cannot have it: <object"),
        ({"data": ROWS[:3]}, "data has 3 different prompts, too few to hold 4 out"),
        ({"data": []}, "data is empty"),
        ({"data": "/none/such.jsonl"}, "data: cannot read /none/such.jsonl"),
        ({"data": None, "held_out": ROWS}, "held_out= are rows beside those of data=: give data="),
        ({"data": None}, r"task=given takes its rows from a Python program, rlhf.train\(config, data=rows\)"),
        ({"resume": True, "folder": None}, "resume=True goes on in a folder: say which by folder="),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(train, tmp_path, objects, said):
    with pytest.raises(ValueError, match=said):
        train(**objects)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["reward=given"], r"reward=given takes its functions from a Python program"),
        (["model=given"], r"model=given takes the policy from a Python program"),
        (["mode=check"], "mode=check is the command line's"),
        (
            ["trainer=replicas", "trainer.ranks=2", "transfer=ipc"],
            "data= are of this process, and the trainer",
        ),
    ],
)
def test_what_a_configuration_asks_of_a_program_is_named(train, words, said):
    with pytest.raises(ValueError, match=said):
        train(*words, policy=None, tokenizer=None, rewards=None)


@pytest.mark.slow
def test_a_policy_that_no_worker_can_make_is_refused(policy, train):
    policy.half()
    with pytest.raises(ValueError, match=r"must have all weights in float32 or in bfloat16 \(got float16\)"):
        train()
    policy.float().model.embed_tokens.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"policy= has 1 weights that do not learn \(model.embed_tokens.weight, ...\)"):
        train()
    policy.requires_grad_(True).config.name_or_path = policy.name_or_path = ""
    with pytest.raises(ValueError, match="its tokenizer must be given"):
        train(tokenizer=None)


@pytest.mark.slow
def test_the_tokenizer_of_the_policy_s_folder_is_taken_where_none_is_given(train, tmp_path, policy):
    start = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    train()
    policy.load_state_dict(start)
    train(tokenizer=None, folder=tmp_path / "other")
    assert numbers(tmp_path / "other") == numbers(tmp_path / "run")


@pytest.mark.slow
def test_pyplot_is_left_to_the_program(train, drawn):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("svg")
    figure = pyplot.figure()
    try:
        assert (train().folder / "curves.png").stat().st_size > 1000
        assert pyplot.get_backend() == "svg"
        assert pyplot.fignum_exists(figure.number)
    finally:
        pyplot.close(figure)
