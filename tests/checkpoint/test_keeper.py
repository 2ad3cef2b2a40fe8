"""The state of a run on the disk: what is saved, when, and that nothing which goes wrong there stops the training."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickletools
import signal
import time
import weakref
from contextlib import contextmanager

import pytest
import safetensors.torch
import torch
from nth_fault import Nth, failing, no_space
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from rlhf.checkpoint.keeper import FOLDER, Keeper, Saved
from rlhf.checkpoint.resumable import resumable
from rlhf.checkpoint.state import optimizer_tensors, weights_of
from rlhf.checkpoint.store import Store
from rlhf.learning.learner import Learner
from rlhf.models.policy import make_policy, reload
from rlhf.models.saving import save_model
from rlhf.models.tokenizer import make_tokenizer
from rlhf.models.value import Head, value_model
from rlhf.rollout.hf import evaluating
from rlhf.shell.ending import RESUMABLE, STOPS, TERMINATED, RunError, terminate_as_interrupt

pytestmark = pytest.mark.usefixtures("default_signals")


class Record:
    """What a keeper asks of a run's recorder."""

    def __init__(self) -> None:
        self.rows = [{"step": 0, "eval/gold": 0.5}]
        self.alarms: list[str] = []

    def position(self) -> tuple[int, int]:
        return len(self.rows), 0

    def alarm(self, name: str, line: str) -> None:
        self.alarms.append(f"{name}: {line}")

    @contextmanager
    def time(self, phase):
        yield


class Session:
    """What a keeper asks of a transfer."""

    epoch = 1


@pytest.fixture
def make_keeper(compose_run, tmp_path):
    """`make_keeper("algo=ppo", ...)`: a keeper and a learner, whose every weight is told by `touch`."""

    def made(*overrides: str, saved: Saved | None = None, seed: int = 1) -> tuple[Keeper, Learner]:
        config = compose_run("model=micro", "algo=ppo", "checkpoint.every=1", "steps=100000", *overrides)
        tokenizer = make_tokenizer(config.model, "abc", chat=False)
        policy = make_policy(config.model, tokenizer, seed)
        if saved is not None:
            reload(policy, saved.path / "policy")
        learner = Learner(policy, copy.deepcopy(policy), value_model(policy, Head.token), config)
        store = Store(tmp_path / FOLDER)
        write = lambda folder: save_model(policy, tokenizer, folder / "policy")  # noqa: E731
        return Keeper(store, config, Record(), Session(), write, time.monotonic(), saved), learner

    return made


def touch(learner: Learner, value: float) -> None:
    """As a step would: all weights and all that the optimisers hold get this value."""
    learner.steps += 1
    for module, optimizer in learner.state().optimizers.values():
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for tensors in (weights_of(module), optimizer_tensors(module, optimizer)):
            for tensor in tensors.values():
                tensor.data.fill_(value)


def loaded(make_keeper, keeper: Keeper) -> tuple[int, set[float]]:
    """The step that the loader returns, and all values of the learner that goes on from there."""
    newest = keeper.store.newest()
    assert newest is not None
    other, learner = make_keeper(saved=Saved.of(keeper.store.path(newest)), seed=2)
    assert other.begin(learner, newest) == newest == learner.steps
    tensors = [*weights_of(learner.policy).values(), *(t for _, each in learner.state().files() for t in each.values())]
    reference = [id(tensor) for tensor in weights_of(learner.reference).values()]
    return newest, {float(v) for t in tensors if id(t) not in reference for v in t.detach().unique()}


@contextmanager
def all_failing(nth: Nth, patch):
    """`failing`, and the writers that are no Python: safetensors leaves half a file, tokenizers raise as they do."""
    serialize, save_tokenizer = safetensors.torch.serialize_file, PreTrainedTokenizerBase.save_pretrained

    def write_tensors(tensors, path, *rest, **options):
        serialize(tensors, path, *rest, **options)
        os.truncate(path, os.path.getsize(path) // 2)
        try:
            nth("safetensors")
        except OSError as error:
            raise SafetensorError("I/O error: No space left on device (os error 28)") from error
        serialize(tensors, path, *rest, **options)

    def write_tokenizer(tokenizer, *rest, **options):
        try:
            nth("tokenizer")
        except OSError as error:
            raise Exception("No space left on device (os error 28)") from error
        return save_tokenizer(tokenizer, *rest, **options)

    with patch.context() as inner, failing(nth):
        inner.setattr(safetensors.torch, "serialize_file", write_tensors)
        inner.setattr(PreTrainedTokenizerBase, "save_pretrained", write_tokenizer)
        yield


@pytest.mark.slow
def test_whatever_fails_in_a_save_the_loader_returns_k_or_k_minus_1_and_training_goes_on(make_keeper, monkeypatch):
    keeper, learner = make_keeper()
    keeper.begin(learner, 0)
    names: set[str] = set()
    for n in range(1, 200):
        step, nth = 2 * n - 1, Nth(n, no_space)
        touch(learner, float(step))
        with all_failing(nth, monkeypatch):
            keeper.reached(step, step)
        names |= set(nth.names)
        newest, saved = keeper.store.newest(), not keeper.record.alarms
        assert newest == step or (newest == step - 1 and not saved)
        assert len(keeper.record.alarms) <= 1 and all("No space left" in line for line in keeper.record.alarms)
        if n % 10 == 1:  # the state itself, not only its hashes
            assert loaded(make_keeper, keeper) == (newest, {float(newest)})
        keeper.record.alarms.clear()
        touch(learner, float(step + 1))
        keeper.reached(step + 1, step + 1)
        assert keeper.store.newest() == step + 1 and not keeper.record.alarms
        if not nth.came:
            break
    assert n > 60 and {"safetensors", "tokenizer", "write", "fsync", "rename"} < names
    print(f"{n - 1} calls failed, one after the other")


def test_a_state_that_is_not_finite_is_never_saved_and_removes_no_good_one(make_keeper):
    keeper, learner = make_keeper("checkpoint.keep=1")
    keeper.begin(learner, 0)
    touch(learner, 1.0)
    keeper.reached(1, 1)
    for broken, where in ((learner.critic.score.weight, "critic"), (next(learner.policy.parameters()), "policy")):
        broken.data[0] = float("nan")
        touched = learner.steps = learner.steps + 1
        keeper.reached(touched, touched)
        assert keeper.store.steps() == [1] == [keeper.store.newest()]
        assert f"step {touched} is not saved ({where}: " in keeper.record.alarms[-1]
    assert loaded(make_keeper, keeper) == (1, {1.0})
    touch(learner, 4.0)
    keeper.reached(4, 4)
    assert keeper.store.steps() == [4] and len(keeper.record.alarms) == 2


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(make_keeper, tmp_path):
    small = tmp_path / FOLDER
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=2m none {small}"):
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        keeper, learner = make_keeper("checkpoint.keep=1")
        keeper.begin(learner, 0)
        for step in range(1, 4):
            touch(learner, float(step))
            keeper.reached(step, step)
        room = os.statvfs(small)
        with (small / "ballast").open("wb") as file:
            file.write(bytes(room.f_bavail * room.f_frsize - 150_000))
        touch(learner, 4.0)
        keeper.reached(4, 4)
        assert len(keeper.record.alarms) == 1 and "step 4 is not saved" in keeper.record.alarms[0]
        assert "o space left" in keeper.record.alarms[0] and keeper.store.steps() == [3]
        assert loaded(make_keeper, keeper) == (3, {3.0})
        (small / "ballast").unlink()
        touch(learner, 5.0)
        keeper.reached(5, 5)
        assert loaded(make_keeper, keeper) == (5, {5.0})
    finally:
        os.system(f"umount {small}")


def test_the_newest_and_the_best_are_kept_and_a_better_evaluation_saves_a_state_that_was_not_due(make_keeper):
    keeper, learner = make_keeper("checkpoint.every=2", "checkpoint.keep=2")
    keeper.begin(learner, 0)
    for step, gold in enumerate((0.1, 0.9, 0.3, 0.9, 0.2, 0.1), start=1):
        learner.steps = step
        keeper.reached(step, step)
        keeper.judge({"eval/reward": -gold, "eval/gold": gold})
    assert keeper.store.steps() == [2, 4, 6] and keeper.store.best().step == 2
    learner.steps = 7
    keeper.reached(7, 7)
    keeper.judge({"eval/gold": 1.0})
    assert keeper.store.steps() == [6, 7] and keeper.store.best().step == 7
    other, learner = make_keeper("checkpoint.every=2", "checkpoint.keep_best=false")
    learner.steps = 8
    other.begin(learner, 8)
    other.judge({"eval/gold": 2.0})
    assert other.store.best().step == 7


def test_a_checkpoint_has_a_policy_that_transformers_loads_and_no_pickle(make_keeper):
    keeper, learner = make_keeper()
    keeper.begin(learner, 0)
    folder = keeper.store.path(0)
    files = {path.name for path in folder.iterdir()}
    tensors = {"reference.safetensors", "critic.safetensors"}
    assert files == {"policy", "manifest.json", "state.json", "rows.jsonl", "config.json", *tensors}, (
        "no step was taken"
    )
    touch(learner, 1.0)
    keeper.reached(1, 1)
    made = {path.name for path in keeper.store.path(1).iterdir()} - files
    assert made == {"policy-optimizer.safetensors", "critic-optimizer.safetensors"}
    model = AutoModelForCausalLM.from_pretrained(folder / "policy")
    assert AutoTokenizer.from_pretrained(folder / "policy").encode("abc") and model.num_parameters() > 0
    for path in [path for path in keeper.store.folder.rglob("*") if path.is_file()]:
        with pytest.raises(ValueError):
            list(pickletools.genops(path.read_bytes()))
    told = json.loads((folder / "config.json").read_text())
    assert told["algo"]["advantage"] == "gae" and told["checkpoint"]["every"] == 1


def test_a_checkpoint_of_another_model_is_refused_in_one_line(make_keeper):
    keeper, learner = make_keeper()
    keeper.begin(learner, 0)
    with pytest.raises(ValueError, match=r"holds another model than model names"):
        make_keeper("model.hidden=64", saved=Saved.of(keeper.store.path(0)))
    other, learner = make_keeper()
    other.saved = Saved.of(keeper.store.path(0))
    learner.critic.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"does not hold what this run trains .*extra\.weight"):
        other.begin(learner, 0)


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def handlers():
    """Signals as the command line handles them, and all handlers put back."""
    before = {signum: signal.getsignal(signum) for signum in (*STOPS, signal.SIGINT)}
    terminate_as_interrupt()
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", [*STOPS, signal.SIGINT])
def test_a_signal_between_two_steps_saves_the_state_at_once(make_keeper, handlers, capsys, signum):
    keeper, learner = make_keeper("checkpoint.every=100")
    keeper.begin(learner, 0)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped, resumable(keeper.store), keeper:
        with keeper.changing():
            touch(learner, 1.0)
            keeper.reached(1, 1)
        os.kill(os.getpid(), signum)
        time.sleep(5)
    assert loaded(make_keeper, keeper) == (1, {1.0})
    assert isinstance(stopped.value, KeyboardInterrupt) or stopped.value.code == RESUMABLE == 75
    assert capsys.readouterr().err.startswith("step 1 is saved: go on with python -m rlhf.resume ")


def test_a_signal_while_the_policy_itself_samples_saves_all_of_the_state(make_keeper, handlers):
    keeper, learner = make_keeper("checkpoint.every=100")
    keeper.begin(learner, 0)
    with pytest.raises(SystemExit), keeper:
        with keeper.changing():
            touch(learner, 1.0)
            keeper.reached(1, 1)
        with evaluating(learner.policy):  # as a worker in this process does, in a thread that goes on
            os.kill(os.getpid(), signal.SIGTERM)
            keeper.__exit__(SystemExit, SystemExit(143), None)
    assert loaded(make_keeper, keeper) == (1, {1.0})


@pytest.mark.parametrize("signum", [*STOPS, signal.SIGINT])
def test_a_signal_while_the_state_changes_waits_for_the_end_of_the_step_and_saves_that(make_keeper, handlers, signum):
    keeper, learner = make_keeper("checkpoint.every=100")
    keeper.begin(learner, 0)
    with pytest.raises((SystemExit, KeyboardInterrupt)), keeper, keeper.changing():
        os.kill(os.getpid(), signum)
        time.sleep(0.01)
        touch(learner, 1.0)
        keeper.reached(1, 1)
    assert loaded(make_keeper, keeper) == (1, {1.0})


def test_a_second_signal_does_not_wait_and_saves_nothing_that_is_half_changed(make_keeper, handlers):
    keeper, learner = make_keeper("checkpoint.every=100")
    keeper.begin(learner, 0)
    with pytest.raises(SystemExit) as stopped, resumable(keeper.store), keeper, keeper.changing():
        touch(learner, 1.0)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        keeper.reached(1, 1)
    assert keeper.store.steps() == [0] and stopped.value.code == RESUMABLE


def test_without_any_checkpoint_sigterm_keeps_its_own_exit_code(make_keeper, handlers):
    keeper, learner = make_keeper("checkpoint.every=0")
    with pytest.raises(SystemExit) as stopped, resumable(keeper.store), keeper:
        keeper.begin(learner, 0)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert stopped.value.code == TERMINATED and not keeper.store.folder.exists()


def test_an_error_that_explains_itself_saves_the_state_before_it_too(make_keeper):
    keeper, learner = make_keeper("checkpoint.every=100")
    keeper.begin(learner, 0)
    with pytest.raises(RunError, match="the server is gone"), keeper:
        touch(learner, 1.0)
        keeper.reached(1, 1)
        raise RunError("the server is gone")
    assert loaded(make_keeper, keeper) == (1, {1.0})


def test_once_a_keeper_is_gone_nothing_holds_what_it_has_kept(make_keeper):
    keeper, learner = make_keeper()
    keeper.begin(learner, 0)
    held = weakref.ref(learner)
    del keeper, learner
    gc.collect()
    assert held() is None
