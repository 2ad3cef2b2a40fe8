"""Resume: a run that was stopped and goes on ends with every bit and every number of one that was not."""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import LIGHT
from omegaconf import OmegaConf
from sizes import in_ci, in_full

from rlhf import resume
from rlhf import train as train_cli
from rlhf.checkpoint.keeper import FOLDER
from rlhf.checkpoint.store import MANIFEST, Store
from rlhf.config import ReverseTaskConfig
from rlhf.monitor.heartbeat import Heartbeat
from rlhf.monitor.metrics import Recorder
from rlhf.run import run
from rlhf.shell.ending import RunError, alone
from transfer.config import Take

ROOT = Path(__file__).resolve().parent.parent
TASK = ("task.held_out=16", "task.prompts=256")
SMALL = ("experiment=smoke", "logger=jsonl", "transfer=local", *TASK, "sft.steps=10", "prompts_per_step=4")
MEASURED = ("seconds/", "transfer/", "tokens_per_second")  # how long things took, and what messages weighed
OWN = ("state.json", "rows.jsonl", "config.json", "adapter/adapter_config.json")  # hold such numbers, or the folder

pytestmark = pytest.mark.usefixtures("default_signals")


class Killed(BaseException):
    """As sudden as SIGKILL: nothing handles it."""


@pytest.fixture
def train(compose_run, tmp_path, monkeypatch):
    """`train("algo=ppo", name="a", killed_at=3)`: the folder; step `killed_at` is the first that is not recorded."""

    def trained(*overrides: str, name: str, killed_at: int = 0, resume: bool = False) -> Path:
        plain = {each: getattr(Recorder, each) for each in ("step", "learned")}

        def dying(each):
            def method(record, step, *rest):
                if step == killed_at:
                    raise Killed
                return plain[each](record, step, *rest)

            return method

        with monkeypatch.context() as patch:
            for each in plain:
                patch.setattr(Recorder, each, dying(each))
            if not killed_at:
                run(compose_run(*overrides), tmp_path / name, overrides, resume)
                return tmp_path / name
            with pytest.raises(Killed):
                run(compose_run(*overrides), tmp_path / name, overrides, resume)
        random.seed(os.urandom(8))  # another process would not have these either
        return tmp_path / name

    return trained


def numbers(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(MEASURED)} for row in rows]


def state(folder: Path) -> dict[str, object]:
    """All that a run ends with: the hash of every tensor's file of its last checkpoint, and what else is there."""
    store = Store(folder / FOLDER)
    path = store.path(store.newest())
    files = json.loads((path / MANIFEST).read_text())["files"]
    told = json.loads((path / "state.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    kept = ("reward_model_", "pairs", "steps", "gold_", "kl_", "alarm/")
    return {
        "files": {name: file["sha256"] for name, file in files.items() if name not in OWN},
        "told": {name: told[name] for name in ("step", "version", "attributes", "random", "samples")},
        "metrics": numbers(folder),
        "samples": (folder / "samples.jsonl").read_text() if (folder / "samples.jsonl").exists() else "",
        "summary": {name: value for name, value in summary.items() if name.startswith(kept)},
    }


@pytest.mark.parametrize(
    "algo",
    [
        "algo=grpo algo.kl_target=0.01 algo.kl_horizon=50 updates_per_step=2",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in (
                "algo=ppo algo.critic_warmup_steps=1 optim.schedule=cosine",
                "algo=grpo algo.ref_decay=0.5 model.dtype=bfloat16",
                "algo=dapo reward=model reward.prompts=32 reward.steps=5",
                "algo=dpo algo.prompts=64 transfer=ipc transfer.staging=live",
                "algo=grpo model.lora.rank=2 optim.lr=0.01",
            )
        ),
    ],
)
def test_a_run_that_was_killed_ends_with_the_bits_and_numbers_of_one_that_was_not(train, algo):
    choice = (*SMALL, *algo.split(), "checkpoint.every=2")
    whole = state(train(*choice, name="whole"))
    train(*choice, name="killed", killed_at=4)
    folder = train(*choice, name="killed", resume=True)
    assert any(name.endswith("-optimizer.safetensors") for name in whole["files"])
    assert len(whole["metrics"]) == 6 + 3 and whole["told"]["step"] == 6
    assert state(folder) == whole


# --- the command line -------------------------------------------------------------------------------------------------


class Commands:
    """Command lines in one folder, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, module: str, *arguments: str) -> int:
        """The process's id."""
        options = {"cwd": self.folder, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "start_new_session": True}
        with (self.folder / "output").open("a") as output:
            options |= {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen([sys.executable, "-m", module, *arguments], **options)
        return self.process.pid

    def ended(self) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(200)

    def said(self) -> str:
        return (self.folder / "output").read_text()


@pytest.fixture
def commands(tmp_path):
    made = Commands(tmp_path)
    yield made
    made.process.kill()
    made.process.wait(60)


def stopped(commands: Commands, pid: int, signum: int, rows: int, delay: float) -> int:
    """Send the signal `delay` seconds after the run has logged so many rows; the exit code."""
    path, deadline = commands.folder / "run" / "metrics.jsonl", time.monotonic() + 90
    while not path.exists() or path.read_bytes().count(b"\n") < rows:
        assert time.monotonic() < deadline, commands.said()
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(pid, signum)
    return commands.ended()


RUN = (*SMALL, "steps=12", "evaluate_every=4", "checkpoint.every=3")
KILL, STOPS = [signal.SIGKILL], [signal.SIGTERM, signal.SIGINT]
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 75, signal.SIGINT: 130}
FEW = [("grpo", "http", 3 * KILL), ("grpo", "ray", KILL), ("ppo", "http", STOPS)]
ALL = [(algo, sender, n * KILL) for algo in ("grpo", "ppo") for sender in ("http", "ray") for n in (1, 3)]


@pytest.mark.parametrize("harm", [*map(in_ci, FEW), *map(in_full, ALL)])
def test_after_signals_at_random_moments_a_resumed_run_is_the_uninterrupted_one(train, commands, harm):
    algo, sender, signals = harm
    choice = (*RUN, f"algo={algo}", *(["algo.critic_warmup_steps=1"] if algo == "ppo" else ["algo.kl_target=0.01"]))
    whole = state(train(*choice, name="whole"))
    draw = random.Random()
    seed = draw.randrange(2**32)
    print(f"seed {seed}")
    draw.seed(seed)
    moments = sorted(draw.sample(range(1, 13), len(signals)))
    command = ("rlhf.train", *choice, "transfer=ipc", f"transfer/sender={sender}", "hydra.run.dir=run")
    for rows, signum in zip(moments, signals, strict=True):
        pid = commands.start(*command)
        code = stopped(commands, pid, signum, rows, draw.uniform(0.0, 0.2))
        assert code == CODES[signum], commands.said()
        assert signum == signal.SIGKILL or Store(commands.folder / "run" / FOLDER).newest() is not None
        command = ("rlhf.resume", "run")
    commands.start(*command)
    assert commands.ended() == 0, commands.said()
    assert state(commands.folder / "run") == whole


# --- the configuration ------------------------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path):
    """`started("steps=5", ...)`: a folder in which Hydra has noted such a run."""

    def noted(*overrides: str) -> Path:
        (tmp_path / ".hydra").mkdir()
        for name, text in _notes(*overrides).items():
            (tmp_path / ".hydra" / f"{name}.yaml").write_text(text)
        return tmp_path

    return noted


@functools.cache
def _notes(*overrides: str) -> dict[str, str]:
    config, choices = resume._compose(overrides)
    hydra = {"hydra": {"runtime": {"choices": choices | {"experiment": "smoke", "hydra/launcher": "basic"}}}}
    told = {"config": config, "hydra": hydra, "overrides": list(overrides)}
    return {name: OmegaConf.to_yaml(OmegaConf.create(node)) for name, node in told.items()}


def rewritten(folder: Path, file: str, change) -> None:
    """One of a run's files under `.hydra/`, as another version would have written it."""
    path = folder / ".hydra" / f"{file}.yaml"
    told = OmegaConf.to_container(OmegaConf.load(path))
    change(told)
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(told)))


def test_a_resumed_run_has_its_own_dials_and_those_given_now_which_are_named_and_kept(started, capsys):
    folder = started("experiment=smoke", "algo=ppo", "seed=7")
    config, replayed = resume.composed(folder, [])
    assert (config.seed, config.steps, config.algo.name) == (7, 6, "ppo") and capsys.readouterr().out == ""
    assert replayed == ["experiment=smoke", "algo=ppo", "seed=7"]
    config, _ = resume.composed(folder, ["steps=9", "optim.lr=0.01", "task=reverse"])
    assert (config.steps, config.optim.lr, type(config.task)) == (9, 0.01, ReverseTaskConfig)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "other dials from here on: optim.lr is 0.01 (was 0.0002), steps is 9 (was 6), task is reverse (was sort)"
    ]
    config, replayed = resume.composed(folder, [])
    assert config.steps == 9 and replayed[-3:] == ["steps=9", "optim.lr=0.01", "task=reverse"]
    assert capsys.readouterr().out == ""


def test_a_run_whose_defaults_have_changed_is_refused_with_the_names_of_the_keys(started):
    folder = started("experiment=smoke")
    rewritten(folder, "config", lambda told: told.update(prompts_per_step=16, shuffle=None))
    with pytest.raises(ValueError, match=r"prompts_per_step is 8 \(was 16\), shuffle is gone \(was None\); say by"):
        resume.composed(folder, ["steps=9"])
    rewritten(folder, "config", lambda told: told.pop("shuffle"))
    config, _ = resume.composed(folder, ["prompts_per_step=16"])
    assert config.prompts_per_step == 16, "who says which is meant may go on"


@pytest.mark.parametrize(
    ("older", "new"),
    [
        pytest.param(lambda told: told.pop("seed"), "seed=0", marks=pytest.mark.slow),
        (lambda told: (told.pop("objective"), told["optim"].pop("eps")), "objective=None, optim.eps=1e-08"),
        pytest.param(lambda told: told.pop("profile"), "profile.steps=[]", marks=pytest.mark.slow),
        pytest.param(lambda told: told.update(profile={}), "profile.steps=[]", marks=pytest.mark.slow),
        (lambda told: told.pop("transfer"), "transfer.sender.start_timeout_s=120.0, "),  # a group of the default run
    ],
)
def test_a_key_that_is_new_since_the_run_began_is_said_once_where_it_has_its_default(started, capsys, older, new):
    folder = started("experiment=smoke")
    rewritten(folder, "config", older)
    rewritten(folder, "hydra", lambda told: new.startswith("transfer") and told["hydra"]["runtime"]["choices"].clear())
    config, _ = resume.composed(folder, [])
    said = capsys.readouterr().out
    assert config.steps == 6 and said.startswith(f"new since the run began: {new}") and said.count("\n") == 1
    resume.composed(folder, ["steps=7"])
    assert capsys.readouterr().out == "other dials from here on: steps is 7 (was 6)\n"


@pytest.mark.parametrize(
    ("older", "refused"),
    [
        (lambda told: told.pop("steps"), r"steps is 6 \(was not there\)"),  # 60 by default
        (lambda told: told.update(profile=None), r"profile is gone \(was None\), profile.steps is \[\] \(was not"),
        (lambda told: told["logger"].pop("jsonl"), r"logger.jsonl is {} \(was not there\)"),
    ],
)
def test_a_key_that_is_new_and_has_not_its_default_or_stands_in_no_schema_is_refused(started, older, refused):
    folder = started("experiment=smoke")
    rewritten(folder, "config", older)
    with pytest.raises(ValueError, match=f"than its overrides compose now: {refused}"):
        resume.composed(folder, [])


def test_a_key_that_is_left_to_the_run_by_now_goes_on_where_it_chooses_what_the_run_had(started, capsys):
    folder = started("experiment=smoke")
    rewritten(folder, "config", lambda told: told["transfer"].update(take="view"))
    config, _ = resume.composed(folder, [])
    assert config.transfer.take is Take.view and capsys.readouterr().out == ""
    rewritten(folder, "config", lambda told: told["transfer"].update(take="copy"))
    with pytest.raises(ValueError, match=r"transfer.take is auto \(was copy\)"):
        resume.composed(folder, [])
    config, _ = resume.composed(folder, ["transfer.take=copy"])
    assert config.transfer.take is Take.copy


def test_another_default_choice_is_refused_by_its_group_even_if_all_keys_are_the_same(started, capsys):
    folder = started("experiment=smoke", "transfer/sender=ray")

    def otherwise(told) -> None:
        told["hydra"]["runtime"]["choices"] |= {"task": "reverse", "transfer/sender": "http", "gone": "x"}
        told["hydra"]["runtime"]["choices"].pop("optim")

    rewritten(folder, "hydra", otherwise)
    with pytest.raises(ValueError, match=r"compose now: task is sort \(was reverse\); say by overrides"):
        resume.composed(folder, [])
    config, _ = resume.composed(folder, ["task=reverse"])
    assert type(config.task) is ReverseTaskConfig and capsys.readouterr().out == "other dials from here on: none\n"
    resume.composed(folder, ["experiment=verifier_only"])  # has another model, among others
    assert "model is tiny (was micro)" in capsys.readouterr().out
    resume.composed(folder, [])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "code", "screen"),
    [
        (".", 1, ". is no folder of a run: it has no .hydra/overrides.yaml"),
        pytest.param("run steps=0", 1, "steps must be at least 1 (got 0)", marks=pytest.mark.slow),
        ("run steps=2", 1, "step 6 is done already: steps must be at least that (got 2)"),
        pytest.param(
            "run task=jsonl task.path=nowhere", 1, "task.path: cannot read nowhere from ", marks=pytest.mark.slow
        ),
        ("run stepz=4", 1, "Could not override 'stepz'"),
        pytest.param(
            "run transfer.slots=4 transfer=disk", 1, "that key belongs to the ipc transfer", marks=pytest.mark.slow
        ),
        ("steps=4", 2, "python -m rlhf.resume RUN_DIR"),
        ("--help", 0, "python -m rlhf.resume RUN_DIR"),
    ],
)
def test_a_mistake_answers_at_once_and_changes_nothing(started, tmp_path, arguments, code, screen):
    folder = started("experiment=smoke").rename(tmp_path.parent / f"{tmp_path.name}-run")
    tmp_path.mkdir()
    folder = folder.rename(tmp_path / "run")
    (folder / "checkpoints" / "00000006").mkdir(parents=True)
    before = (folder / ".hydra" / "overrides.yaml").read_text()
    command = [sys.executable, "-m", "rlhf.resume", *arguments.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), LIGHT: "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, screen in done.stdout + done.stderr) == (code, True), done.stdout + done.stderr
    assert "Traceback" not in done.stderr and (folder / ".hydra" / "overrides.yaml").read_text() == before


def test_a_key_of_what_the_run_has_chosen_is_not_said_to_be_another_choices(started, tmp_path):
    folder = started("experiment=smoke", "task=jsonl", "task.path=nowhere.jsonl")
    (folder / "checkpoints" / "00000001").mkdir(parents=True)
    command = [sys.executable, "-m", "rlhf.resume", str(folder), "task.prompt_column=question"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), LIGHT: "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1 and "task.path: cannot read nowhere.jsonl" in done.stderr, done.stderr
    assert "belongs to" not in done.stderr


def test_a_run_that_is_finished_is_left_alone_and_more_steps_go_on(compose_run, started, monkeypatch, capsys):
    folder = started(*SMALL, "steps=1")
    run(compose_run(*SMALL, "steps=1"), folder, [*SMALL, "steps=1"])
    before = numbers(folder)
    monkeypatch.setattr(sys, "argv", ["rlhf.resume", str(folder)])
    monkeypatch.setattr(train_cli, "terminate_as_interrupt", lambda: None)
    resume.main()
    assert f"finished already: {folder}" in capsys.readouterr().out and numbers(folder) == before
    monkeypatch.setattr(sys, "argv", ["rlhf.resume", str(folder), "steps=2"])
    resume.main()
    assert numbers(folder)[:2] == before[:2] and [row["step"] for row in numbers(folder)] == [0, 1, 2, 2]
    assert json.loads((folder / "summary.json").read_text())["overrides"] == [*SMALL, "steps=1", "steps=2"]


def test_a_checkpoint_that_does_not_verify_gives_way_to_the_one_before_and_without_any_the_run_is_refused(train):
    choice = (*SMALL, "steps=4", "checkpoint.every=2")
    folder = train(*choice, name="run")
    whole = state(folder)
    store = Store(folder / FOLDER)
    (store.path(4) / "reference.safetensors").write_bytes(b"")
    assert state(train(*choice, name="run", resume=True)) == whole and store.damaged == {}
    for step in store.steps():
        (store.path(step) / "state.json").unlink()
    with pytest.raises(RunError, match=r"no checkpoint in .* verifies"):
        train(*choice, name="run", resume=True)


@pytest.mark.parametrize(
    "command",
    [
        "rlhf.train experiment=smoke steps=3 hydra.run.dir=0",
        pytest.param("rlhf.train -m experiment=smoke steps=3 hydra.sweep.dir=.", marks=pytest.mark.slow),
        "rlhf.resume 0 steps=3",
    ],
)
def test_the_dials_of_a_run_that_is_going_on_are_not_written_over_by_one_that_is_refused(started, tmp_path, command):
    started("experiment=smoke", "steps=300")
    (tmp_path / "0").mkdir()
    kept = (tmp_path / ".hydra").rename(tmp_path / "0" / ".hydra") / "overrides.yaml"
    before = kept.read_text()
    with alone(tmp_path / "0"):
        done = subprocess.run(
            [sys.executable, "-m", *command.split()],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1 and "another process trains in" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and kept.read_text() == before


def test_weights_that_an_earlier_process_has_left_in_the_runs_folder_do_not_pile_up(train, tmp_path):
    left, theirs = tmp_path / "run" / "weights", ["README.md", "model-00001-of-00002.safetensors"]
    left.mkdir(parents=True)
    for start in ({"killed_at": 2}, {"resume": True}):
        ours = [f"{name}.{kind}" for name in ("00000007-00000057", "00000012") for kind in ("json", "safetensors")]
        for name in (*ours, *theirs):
            (left / name).touch()
        train(*SMALL, "steps=2", "checkpoint.every=1", name="run", **start)
        assert sorted(path.name for path in left.iterdir()) == sorted(theirs)


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_anew(train, tmp_path):
    (tmp_path / "run" / FOLDER / ".writing-dead").mkdir(parents=True)
    choice = (*SMALL, "steps=1")
    assert state(train(*choice, name="run", resume=True)) == state(train(*choice, name="other"))


def test_two_processes_do_not_train_in_one_folder(train, tmp_path):
    (tmp_path / "run").mkdir()
    with alone(tmp_path / "run"), pytest.raises(RunError, match=r"another process trains in .*run: end it"):
        train(*SMALL, name="run")
    with alone(tmp_path / "run"):  # and the lock is given back
        pass


def test_a_full_disk_costs_samples_and_the_status_but_no_step_and_what_is_lost_at_the_end_is_one_line(
    compose_run, tmp_path, monkeypatch, capsys
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Recorder, "_samples", full)
    monkeypatch.setattr(Heartbeat, "write", full)
    run(compose_run(*SMALL, "steps=2", "logger=[console,jsonl]"), tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 2
    assert capsys.readouterr().out.count("samples.jsonl ends here, and the run goes on") == 1
    monkeypatch.setattr("rlhf.assembly.outcome.write_summary", full)
    with pytest.raises(RunError, match=r"^the disk is full .*: make room, then go on with python -m rlhf\.resume "):
        run(compose_run(*SMALL, "steps=2"), tmp_path)
    monkeypatch.undo()
    run(compose_run(*SMALL, "steps=2"), tmp_path, resume=True)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"


REFUSED = {
    ("model.hidden=64", "steps=6"): "holds another model than model names",
    ("algo=ppo", "steps=6"): "does not hold what this run trains (it has no critic.safetensors): resume it with",
    ("steps=3",): "step 4 is done already: steps must be at least that (got 3)",
    ("steps=x",): "Value 'x' of type 'str' could not be converted to Integer",
}


@pytest.mark.parametrize(
    "refused", [[("algo=ppo", "steps=6")], pytest.param(list(REFUSED), marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_a_resume_that_is_refused_changes_nothing_and_the_plain_one_goes_on(commands, refused):
    begin = ("rlhf.train", *SMALL, "steps=4", "checkpoint.every=2", "hydra.run.dir=run")
    commands.start(*begin)
    assert commands.ended() == 0, commands.said()
    hydra, notes = commands.folder / "run" / ".hydra", ("overrides.yaml", "config.yaml", "hydra.yaml")
    before = {name: (hydra / name).read_text() for name in notes}
    (commands.folder / "run" / "summary.json").unlink()
    for overrides in refused:
        commands.start("rlhf.resume", "run", *overrides)
        assert commands.ended() == 1 and REFUSED[overrides] in commands.said() and "Traceback" not in commands.said()
        assert {name: (hydra / name).read_text() for name in notes} == before
    commands.start("rlhf.resume", "run")
    assert commands.ended() == 0, commands.said()
    commands.start("rlhf.resume", "run", "steps=5")
    assert commands.ended() == 0 and "- steps=5" in (hydra / "overrides.yaml").read_text()
