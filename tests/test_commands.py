"""Every command in the README and docs/ is decided here: run for real in a short form, or composed, with the reason.

Commands of one run after the other share a folder, in which FOLDER and RUN_DIR stand for the run that they need.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from forked import LIGHT
from hydra import compose, initialize_config_dir

from rlhf.compose import checked_evaluation
from rlhf.report import main as report
from rlhf.sweep import main as sweep
from transfer.bench.cli import main as bench

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAIN, EVALUATE = "python -m rlhf.train ", "python -m rlhf.evaluate "

SHORT = (
    "transfer=local logger=jsonl model.layers=1 task.held_out=8 sft.steps=1 steps=1 "
    "prompts_per_step=4 samples_per_prompt=2 updates_per_step=1 rollout.max_new_tokens=4"
)
FILE = SHORT.replace(" model.layers=1", "")  # of a checkpoint
MODEL = "reward.prompts=8 reward.steps=1"
FEW = ["--senders", "http", "--repeats", "1"]
VLLM = "a vLLM: tests/gpu and tests/rollout/test_vllm.py run it"
COMPARE = "python -m tests.benchmarks.compare_trl_gpu "
TRL_GPU = "a GPU, vLLM and TRL: tests/benchmarks/test_compare_trl_gpu.py runs it with --dry"
GSM8K = "needs the hub: tests/test_math_rewards.py has rows of its form"
RANKS = "several ranks: tests/ranks/test_ranks_runs.py runs them, but shorter"
SHARDS = "two ranks: tests/ranks/test_sharded_runs.py runs it, but shorter"
PACKAGE = "a package that is not among those of the tests"

RUN: dict[str, str] = {  # command -> what makes it short
    f"{TRAIN}algo=rloo task=reverse": f"{SHORT} {MODEL} hydra.run.dir=run",
    f"{TRAIN}task=jsonl task.path=examples/preferences.jsonl optim.lr=1e-4 steps=30 rollout.max_new_tokens=64": (
        f"{SHORT} {MODEL}"
    ),
    f"{TRAIN}task=jsonl task.path=examples/answers.jsonl 'task.system=\"Be brief: say one word.\"' "
    "reward=verifier sft.steps=30": SHORT,
    f"{TRAIN}experiment=checkpoint model.path=FOLDER_OR_HUB_NAME task=arithmetic": FILE,
    f"{TRAIN}algo=dpo": f"{SHORT} algo.prompts=32 samples_per_prompt=8 prompts_per_step=1",
    f"{TRAIN}experiment=verifier_only task=arithmetic": SHORT,
    f"{TRAIN}experiment=from_scratch algo=ppo": f"{SHORT} algo.critic_warmup_steps=0",
    f"{TRAIN}experiment=overoptimisation": f"{SHORT} {MODEL}",
    f"{TRAIN}evaluate.samples=8 evaluate.k=[1,4,8]": f"{SHORT} {MODEL}",
    f"{EVALUATE}model.path=FOLDER/policy": "task.held_out=8 rollout.max_new_tokens=4",
    f"{EVALUATE}model.path=FOLDER/policy rollout.top_p=0.95 rollout.temperature=0.6": (
        "task.held_out=8 rollout.max_new_tokens=4"
    ),
    f"{TRAIN}evaluate.top_p=0.95 evaluate.temperature=0.6": f"{SHORT} {MODEL}",
    f"{TRAIN}'rollout.stop=[aa]'": f"{SHORT} {MODEL}",
    f"{TRAIN}experiment=checkpoint model.path=FOLDER_OR_HUB_NAME task=arithmetic model.lora.rank=16 "
    "optim.lr=1e-4": FILE,
    f"{TRAIN}task=jsonl task.path=examples/conversations.jsonl reward=function "
    "reward.function=examples.reward_functions:brevity rollout.max_new_tokens=64": SHORT,
    f"{TRAIN}reward=sum 'reward.parts={{right: {{kind: verifier}}, short: {{kind: function, function: "
    "examples.reward_functions:brevity, weight: 0.1}}'": SHORT,
    f"{TRAIN}experiment=guess": f"{SHORT} rollout.max_new_tokens=2",
    f"{TRAIN}experiment=calculator": SHORT,
    f"{TRAIN}experiment=number_line": f"{SHORT} rollout.max_new_tokens=2",
    f"{TRAIN}experiment=agent": SHORT.replace("task.held_out=8", "task.held_out=2"),
    f"{TRAIN}experiment=smoke 'profile.steps=[3,4]'": f"{SHORT} steps=4".replace("transfer=local ", ""),
    "python -m rlhf.resume FOLDER": "",
    "python -m rlhf.resume RUN_DIR": "",
    "python -m rlhf.resume RUN_DIR steps=200": "steps=2",
}
TABLES = {  # of runs and sweeps that are there, and of a policy's tensors
    "python -m transfer.bench --shapes model.safetensors --only ipc-arena,raw --json report.json",
    "python -m rlhf.report outputs/DATE/TIME",
    "python -m rlhf.report outputs/algorithms",
    "python -m rlhf.report RUN_DIR ANOTHER --to outputs/compared",
    "python -m rlhf.sweep outputs/algorithms",
    "python -m rlhf.sweep outputs/algorithms --by step_ms",
}
CLASS = "a class of the user's: tests/environments runs some"
DATA = "data of the user's: tests/test_data_sets.py and tests/test_data_options.py read such"

COMPOSED: dict[str, str] = {  # command -> why it is not run here
    f"{TRAIN}-m experiment=smoke transfer=local seed=0,1 hydra.sweep.dir=outputs/seeds": (
        "each job imports torch anew: tests/test_sweep.py runs such sweeps"
    ),
    f"{TRAIN}--help": "tests/test_train_cli.py runs it",
    f"{TRAIN}mode=check": "tests/preflight/test_check.py runs it",
    f"{TRAIN}experiment=checkpoint model.path=FOLDER_OR_HUB_NAME task=arithmetic trainer=replicas": RANKS,
    f"{TRAIN}trainer=replicas": RANKS,
    f"{TRAIN}trainer=replicas trainer.ranks=2": RANKS,
    f"{TRAIN}trainer=replicas mode=check": RANKS,
    f"{TRAIN}trainer=sharded trainer.ranks=2": SHARDS,
    f"{TRAIN}trainer=sharded trainer.ranks=2 transfer=gloo": SHARDS,
    f"{TRAIN}trainer=sharded trainer.ranks=2 rollout=vllm rollout.sleep_level=1": VLLM,
    f"{TRAIN}-m experiment=from_scratch algo=grpo,ppo,dr_grpo,rloo,reinforce_pp,reinforce_pp_baseline,dapo,gspo,"
    "cispo,sapo seed=0,1,2 transfer=local": "thirty jobs: tests/test_learning.py runs them, but shorter",
    f"{TRAIN}algo=rloo seed=3 --cfg job": "composing is all that it does",
    f"{TRAIN}-m transfer=ipc,disk transfer/sender=http,ray experiment=smoke": "tests/test_sweep.py runs it",
    f"{TRAIN}-m experiment=smoke algo=grpo,rloo,ppo seed=0,1,2 hydra.sweep.dir=outputs/algorithms": (
        "nine jobs: tests/test_sweep.py runs smaller sweeps, tests/test_end_to_end.py every algorithm"
    ),
    f"{TRAIN}experiment=smoke transfer=disk transfer/sender=ray rollout.workers=2": "tests/test_end_to_end.py runs it",
    f"{TRAIN}reward=model reward.path=FOLDER_OR_HUB_NAME task=jsonl task.path=examples/conversations.jsonl": (
        "needs a reward model of others: tests/test_pretrained_rewards.py makes some"
    ),
    f"{TRAIN}task=hf task.path=FOLDER_OR_HUB_NAME 'task.columns={{prompt: question}}' task.held_out_split=test "
    "task.longest_prompt=512": DATA,
    f"{TRAIN}task=hf task.path=rows.parquet 'task.split=\"train[:1000]\"' task.held_out_path=held_out.csv "
    "'task.template={enable_thinking: false}'": DATA,
    f"{TRAIN}task=environment task.factory=package.module:Class task.path=rows.jsonl reward=verifier": CLASS,
    f"{TRAIN}task=environment 'task.tools=[package.module:function]' task.path=rows.jsonl reward=verifier": CLASS,
    f"{TRAIN}task=agent task.command=\"'python my_agent.py'\" task.path=rows.jsonl reward=verifier": (
        "an agent of the user's: tests/agents/test_agent_runs.py runs such"
    ),
    f"{TRAIN}reward=http reward.url=http://127.0.0.1:8000/score": "needs a server: tests/test_rewards_http.py runs it",
    f"{TRAIN}reward=judge reward.url=http://127.0.0.1:8000/v1/chat/completions reward.model=NAME": (
        "needs a server: tests/test_judge.py runs it"
    ),
    f"{TRAIN}task=hf task.path=openai/gsm8k task.name=main task.prompt_column=question "
    "'task.answer_after='\"'\"'####'\"'\"'' reward=math model=hf model.path=FOLDER_OR_HUB_NAME": GSM8K,
    f"{TRAIN}task=hf task.path=openai/gsm8k task.name=main task.prompt_column=question "
    "'task.answer_after='\"'\"'####'\"'\"'' reward=verifier model=hf model.path=FOLDER_OR_HUB_NAME": GSM8K,
    f"{TRAIN}experiment=verifier_only task=reasoning_gym task.name=chain_sum 'task.options={{max_terms: 2}}'": (
        "needs an optional package: tests/test_reasoning_gym.py runs it"
    ),
    f"{TRAIN}experiment=smoke 'logger=[console,jsonl,wandb,trackio]' logger.wandb.mode=offline": (
        "needs optional packages: tests/monitor/test_loggers.py runs them"
    ),
    f"{TRAIN}-m experiment=smoke hydra/sweeper=optuna hydra.sweeper.n_trials=20 hydra.sweeper.n_jobs=1 "
    "hydra.sweeper.direction=maximize objective=gold 'optim.lr=interval(1e-4,1e-2)' "
    "hydra.sweep.dir=outputs/lr": PACKAGE,
    f"{TRAIN}experiment=gpu_smoke": VLLM,
    f"{TRAIN}rollout=vllm model.heads=2 'rollout.engine_args={{gpu_memory_utilization: 0.4}}'": VLLM,
    f"{TRAIN}rollout=vllm 'transfer.sender.url=[http://127.0.0.1:8000]' model=hf model.path=FOLDER": VLLM,
}
ELSEWHERE: dict[str, str] = {  # command -> who runs it
    "python3 -m venv .venv && . .venv/bin/activate && pip install -e . && python -m rlhf.train": (
        "tests/test_end_to_end.py trains the default run, .ci/run installs"
    ),
    "python3 -m venv .venv && . .venv/bin/activate && pip install -e '.[dev]' && pytest -n 2": ".ci/run runs it",
    "torchrun --nproc-per-node 2 -m rlhf.train trainer=replicas": "tests/ranks/test_ranks_runs.py, but shorter",
    "torchrun --nproc-per-node 8 -m rlhf.train trainer=replicas model.path=FOLDER": RANKS,
    f"{TRAIN}trainer=sharded trainer.ranks=16 trainer.hosts=2 trainer.address=auto transfer/sender=ray "
    "rollout.workers=16": "tests/ranks/test_ray_hosts.py, with two ranks",
    f"{TRAIN}rollout.ahead.lag=2 rollout.ahead.order=free rollout.in_flight=keep algo.correction=tis": (
        "tests/ahead/test_free_runs.py"
    ),
    f"{TRAIN}rollout.ahead.lag=1 algo.correction=tis": "tests/ahead/test_exact.py, with smaller runs",
    f"{TRAIN}algo.correction=tis rollout.batch_invariant=true rollout.workers=2": "tests/ahead/test_exact.py, as above",
    "python -m rlhf.scale RUN_DIR 4": "a run that goes on: tests/test_scale.py",
    "python -m rlhf.scale RUN_DIR --join http://127.0.0.1:8000": "a worker that runs already: tests/test_scale.py",
    "python -m transfer.doctor": "tests/transfer/test_doctor.py",
    "python -m transfer.doctor --quick": "tests/transfer/test_doctor.py",
    "python -m transfer.bench": "tests/transfer/test_bench.py, with fewer rounds",
    "python -m transfer.bench --shapes qwen2.5-0.5b --senders http": "tests/transfer/test_bench.py, with small shapes",
    "python -m tests.fuzz --count 100000 --seed 0": "tests/fuzz/test_hostile_input.py",
    f"{COMPARE}--shapes qwen2.5-0.5b --work outputs/trl --json outputs/0.5b.json": TRL_GPU,
    f"{COMPARE}--shapes qwen2.5-1.5b --work outputs/trl --json outputs/1.5b.json": TRL_GPU,
    f"{COMPARE}--shapes qwen2.5-7b --steps 2 --prompts 16 --json outputs/7b.json": TRL_GPU,
    f"{COMPARE}--parts ours --ours 'small=tokens_per_microbatch=8192,optim.master_weights=false'": TRL_GPU,
    f"{COMPARE}--dry": "tests/benchmarks/test_compare_trl_gpu.py",
    "python -m rlhf.train plugins=[my_parts] task=count task.most=5": "tests/test_plugins.py",
    "pip install hydra-optuna-sweeper hydra-joblib-launcher": PACKAGE,
    "pip install vllm": VLLM,
    "VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --logprobs-mode processed_logprobs "
    """--weight-transfer-config '{"backend": "rlhf_ipc"}'""": VLLM,
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def words(command: str) -> list[str]:
    """As the shell takes them, but for its own operators."""
    return shlex.split(command, comments=True)


def same(command: str) -> tuple[str, ...]:
    """What a command is, however it is quoted and whatever its comment says."""
    return tuple(words(command))


def commands() -> Iterator[tuple[str, str]]:
    """(page, command) for every line of every block of shell commands."""
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", "").splitlines():
                if words(line):
                    yield page.name, line


def test_every_command_of_the_docs_is_run_or_composed_and_none_is_left_over_here():
    found = {same(command): f"{page}: {command}" for page, command in commands()}
    decided = [same(command) for table in (RUN, TABLES, COMPOSED, ELSEWHERE) for command in table]
    assert len(decided) == len(set(decided)), "a command is decided twice"
    undecided = [text for key, text in found.items() if key not in decided]
    assert not undecided, f"say in {Path(__file__).name} how these are tested: {undecided}"
    assert not set(decided) - found.keys(), "no page has these any more"
    assert len(found) > 35


def test_a_block_of_another_kind_does_not_hide_commands():
    for page in PAGES:
        fences = re.findall(r"^```(\w*)$", page.read_text(), re.MULTILINE)
        assert set(fences) <= {"bash", "python", "toml", "yaml", ""} and fences[1::2] == [""] * (len(fences) // 2), (
            page.name
        )


def overrides_of(command: str) -> list[str]:
    """Of a training or an evaluation, but for what is said to Hydra; of each sweep the first job."""
    given = [word for word in words(command)[3:] if not word.startswith(("-", "hydra")) and word != "job"]
    given = [re.sub(r"interval\(([^,]+),.*\)", r"\1", word) for word in given]
    first = [word if "{" in word or "[" in word else word.partition(",")[0] for word in given]
    return [word.replace("FOLDER_OR_HUB_NAME", "FOLDER") for word in first]


@pytest.mark.parametrize("command", [command for command in [*RUN, *COMPOSED] if "rlhf.resume" not in command])
def test_every_run_and_evaluation_of_the_docs_composes_as_it_stands(compose_run, command):
    overrides = overrides_of(command)
    if command.startswith(EVALUATE):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            assert checked_evaluation(compose("evaluate", overrides)).task
    else:
        assert compose_run(*overrides).steps >= 1


def test_the_choice_that_the_docs_add_composes(tmp_path, rlhf_train):
    (text,) = blocks(ROOT / "docs" / "configuration.md", "yaml")
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "small.yaml").write_text(text)
    done = rlhf_train("--config-dir", "mine", "model=small", "--cfg", "job", env={LIGHT: "1"})
    model = yaml.safe_load(done.stdout)["model"]
    assert (model["layers"], model["hidden"], model["heads"], model["architecture"]) == (3, 96, 6, "qwen3")


def test_the_session_in_the_docs_moves_weights(tmp_path, monkeypatch):
    session, one_shot = blocks(ROOT / "docs" / "transfer.md", "python")
    monkeypatch.chdir(tmp_path)
    exec(compile(session, "docs/transfer.md", "exec"), {})
    compile(one_shot, "docs/transfer.md", "exec")  # tests/rollout/test_one_shot.py runs the same two lines


# --- run, one after the other, in processes that need not import torch again ------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder from which examples are found, with what the commands leave there."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.fixture(scope="module")
def ran(place):
    """`ran(command, short)`: run it in `place`; all that it said, once it has ended with code 0."""

    def run(command: str, short: str) -> str:
        text = re.sub(r"FOLDER_OR_HUB_NAME", "run/policy", command)
        text = re.sub(r"\b(FOLDER|RUN_DIR)\b", "run", text)
        python, _, module, *given = words(text)
        assert python == "python"
        process = [sys.executable, "-m", module, *given, *short.split()]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{place}"}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(process, cwd=place, env=environment, timeout=300, check=False, **pipes)
        assert done.returncode == 0, f"{command}: exit code {done.returncode}: {done.stdout[-3000:]}"
        return done.stdout

    return run


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_runs_of_the_docs_run_in_a_short_form(place, ran):
    for command, short in RUN.items():
        said = ran(command, short)
        assert "Traceback" not in said, f"{command}: {said}"
    assert json.loads((place / "run" / "summary.json").read_text())["status"] == "finished"
    finished = [json.loads(path.read_text())["status"] for path in place.glob("outputs/*/*/summary.json")]
    runs = [command for command in RUN if command.startswith(TRAIN)]
    assert finished == ["finished"] * (len(runs) - 1)  # one of them is `run`
    assert list(place.glob("outputs/*/*/profile/step-3-worker-0.json.gz"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_tables_and_reports_of_the_docs_are_made_of_runs_that_are_there(place, ran, monkeypatch, capsys):
    for seed in ("0", "1"):  # as a sweep leaves them
        ran(f"{TRAIN}experiment=smoke seed={seed} hydra.run.dir=outputs/seeds/{seed}", SHORT)
    monkeypatch.chdir(place)
    (place / "model.safetensors").symlink_to("outputs/seeds/0/policy/model.safetensors")
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the benchmark's handlers are for its own process
    for command in sorted(TABLES):
        made = re.sub(r"outputs/DATE/TIME|RUN_DIR", "outputs/seeds/1", command)
        made = re.sub(r"ANOTHER|outputs/algorithms", "outputs/seeds", made)
        module, *given = words(made)[2:]
        call, short = {"rlhf.report": (report, []), "rlhf.sweep": (sweep, []), "transfer.bench": (bench, FEW)}[module]
        call([*given, *short])
    said = capsys.readouterr().out
    assert said.count("report.html") == 3 and said.count("2 job(s): outputs/seeds/summary.md") == 2
    assert (place / "outputs" / "compared" / "report.html").stat().st_size > 10_000
    (timed,) = json.loads((place / "report.json").read_text())["models"]
    assert {"raw-http", "ipc-arena-view-digest-http"} < {row["way"] for row in timed["rows"]}
