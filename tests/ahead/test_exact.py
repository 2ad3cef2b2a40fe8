"""`rollout.ahead.lag=1`: a step is sampled while the one before is learned from, with the same numbers in every run."""

from __future__ import annotations

import json
import threading
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from hydra.errors import CompactHydraException
from small import SMALL

from rlhf.ahead.exact import Exact, read
from rlhf.ahead.kept import FILE
from rlhf.gather import Gather
from rlhf.shell.ending import RunError
from rlhf.types import Completion, Prompt, Rollouts

OWN = ("steps=5", "rollout.ahead.lag=1")
MIXED = "task.max_length=14"  # prompts of lengths that are padded to several widths
MEASURED = ("seconds/", "transfer/", "tokens_per_second", "rollout/sampling_s")
pytestmark = [pytest.mark.usefixtures("default_signals"), pytest.mark.lag(1)]


@pytest.fixture
def train(train_ahead):
    """`train_ahead` with what the runs of this file have."""
    return partial(train_ahead, *OWN)


def numbers(folder: Path, *without: str) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith((*MEASURED, *without))} for row in rows]


def digests(folder: Path) -> dict[int, str]:
    told = map(json.loads, (folder / "journal/trainer.jsonl").read_text().splitlines())
    return {each["version"]: each["digest"] for each in told if each["op"] == "publish"}


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_each_step_is_sampled_by_the_weights_after_the_one_before_the_last_and_a_killed_run_goes_on_with_the_same(
    train,
):
    whole = train(name="whole")
    steps = [row for row in numbers(whole) if "train/loss" in row]
    assert [row["rollout/version"] for row in steps] == [0, 0, 1, 2, 3]
    assert [row["rollout/lag"] for row in steps] == [0, 1, 1, 1, 1]
    assert all(0 < row["train/ess"] <= 1 for row in steps) and steps[-1]["train/ess"] < 1
    killed = train(name="killed", killed_at=4)
    newest = max((killed / "checkpoints").glob("0*"))
    assert newest.name == "00000003" and (newest / FILE).exists()
    train(name="killed", resume=True)
    assert numbers(killed) == numbers(whole) and digests(killed)[5] == digests(whole)[5]


@pytest.mark.slow
def test_how_many_workers_sample_and_how_weights_travel_changes_nothing(train):
    whole = train(MIXED, name="whole")
    for name, overrides in {
        "again": [],
        "files of two": ["rollout.workers=2", "transfer=disk"],
        "views of three": ["rollout.workers=3", "rollout.rows_per_request=5"],
        "copies by Ray of two": ["rollout.workers=2", "transfer.take=copy", "transfer/sender=ray"],
    }.items():
        folder = train(MIXED, *overrides, name=name)
        assert digests(folder) == digests(whole) and numbers(folder) == numbers(whole), name


@pytest.mark.slow
@pytest.mark.lag(0)
def test_a_run_that_waits_for_its_samples_needs_no_more_to_be_the_same_over_any_workers(train):
    overrides = ["rollout.ahead.lag=0", "rollout.batch_invariant=true", MIXED]
    one, two = (train(*overrides, f"rollout.workers={count}", name=str(count)) for count in (1, 2))
    assert digests(one) == digests(two) and numbers(one) == numbers(two)
    assert [row["rollout/lag"] for row in numbers(one) if "train/loss" in row] == [0] * 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["algo.dynamic_sampling=3", "reward=verifier", "samples_per_prompt=8"],
        ["task=guess", "reward=verifier"],
        ["algo=ppo", "algo.critic_warmup_steps=1"],
        ["transfer=disk", MIXED],
    ],
)
def test_runs_of_every_kind_go_on_after_a_kill_with_other_workers_and_the_numbers_of_one_that_was_not_killed(
    train, overrides
):
    whole = train(*overrides, name="whole")
    train(*overrides, "rollout.workers=2", name="killed", killed_at=2)
    train(*overrides, "rollout.workers=3", name="killed", killed_at=4, resume=True)
    killed = train(*overrides, name="killed", resume=True)
    assert numbers(killed) == numbers(whole) and digests(killed)[5] == digests(whole)[5]


# --- what is drawn when -----------------------------------------------------------------------------------------------

PROMPTS = [Prompt(str(number), (number,)) for number in range(6)]
ORDER = [[0, 1], [2, 3], [4, 5]]


class Record:
    """What a recorder hears of."""

    sampled, sampling_s = 0, None

    def __init__(self):
        self.reports = []

    def time(self, phase):
        return threading.Lock()

    def rewarded(self, report):
        self.reports.append(report)


class Worker:
    """A sampler whose answers have the version that is live; it answers when `may` is set."""

    def __init__(self):
        self.version, self.asked, self.may = 0, [], threading.Event()
        self.may.set()

    def sample(self, prompts, *, n, temperature, seed):
        self.asked.append([prompt.ids[0] for prompt in prompts])
        version = self.version
        assert self.may.wait(20)
        rows = [Completion([7], [-0.5], [version], "stop") for _ in prompts for _ in range(n)]
        return Rollouts(list(prompts), rows, ["seven"] * len(rows), list(range(len(prompts))), n)


@pytest.fixture
def ahead(compose_run):
    config, worker, record = compose_run(*SMALL, *OWN, "samples_per_prompt=2"), Worker(), Record()
    gather = Gather(worker, lambda prompts, answers: [1.0] * len(answers), config, record)
    made = Exact(gather, record, PROMPTS, ORDER)
    yield made, worker, record
    worker.may.set()
    made.close()


def test_a_push_waits_until_the_next_step_is_sampled_by_the_weights_before_it(ahead):
    ahead, worker, record = ahead
    ahead(PROMPTS, ORDER[0], 1)
    ahead.settle()
    assert worker.asked == [[0, 1], [2, 3]], "the third is begun when the second is taken"
    worker.version = 1
    worker.may.clear()
    (rollouts, rewards) = ahead(PROMPTS, ORDER[1], 2)
    assert rollouts.version == 0 and rewards == [1.0] * 4 and record.sampled == 8
    pushed = threading.Event()

    def push():
        ahead.settle()
        worker.version = 2
        pushed.set()

    pushing = threading.Thread(target=push)
    pushing.start()
    assert not pushed.wait(0.2)
    worker.may.set()
    pushing.join(20)
    assert ahead(PROMPTS, ORDER[2], 3)[0].version == 1
    ahead.settle()
    assert worker.asked == ORDER, "nothing is drawn after the last step"


def test_what_fails_while_the_next_step_is_sampled_fails_the_run(ahead):
    ahead, worker, _ = ahead
    ahead(PROMPTS, ORDER[0], 1)
    ahead.settle()
    worker.sample = None
    ahead(PROMPTS, ORDER[1], 2)
    with pytest.raises(TypeError):
        ahead.settle()


def test_a_checkpoint_has_the_samples_of_the_step_that_comes_next_and_of_no_other(ahead, tmp_path):
    ahead, worker, _ = ahead
    folders = [tmp_path / str(step) for step in range(4)]
    for folder in folders:
        folder.mkdir()
    ahead.write(folders[0], 0)
    assert read(folders[0], PROMPTS) is None, "the first step is sampled when it begins"
    for step, rows in zip(count(1), ORDER, strict=False):
        expected = ahead(PROMPTS, rows, step)
        ahead.settle()
        ahead.write(folders[step], step)
        if step > 1:
            assert read(folders[step - 1], PROMPTS)[1][0] == expected
    assert read(folders[1], PROMPTS)[0] == 2 and read(folders[3], PROMPTS) is None
    drawn = read(folders[1], PROMPTS)
    other = Exact(ahead._gather, Record(), PROMPTS, ORDER, drawn)
    worker.asked.clear()
    assert other(PROMPTS, ORDER[1], 2) == drawn[1][0]
    other.settle()
    other.close()
    assert worker.asked == [ORDER[2]], "they are not drawn again"


@pytest.mark.parametrize("content", [b"", b"\x08" + bytes(15), b"\x02\0\0\0\0\0\0\0{}", b"\xff" * 40])
def test_samples_of_a_checkpoint_that_are_none_are_told_in_one_line(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(RunError, match="has no samples as a run has them") as caught:
        read(tmp_path, PROMPTS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("algo.correction=off", "choose algo.correction=tis, icepop or sequence"),
        ("rollout.ahead.lag=2", "choose rollout.ahead.lag=1, or rollout.ahead.order=free"),
        ("rollout.ahead.lag=17", r"rollout.ahead.lag must be between 0 and 16 \(got 17\)"),
        ("rollout.ahead.window=3", "choose rollout.ahead.order=free and a lag of 1 or more"),
        ("rollout.ahead.order=free rollout.in_flight=abort", "choose keep, or wait"),
        ("transfer=local", "choose transfer=ipc with staging=arena, or transfer=disk"),
        ("transfer.staging=live", "choose transfer=ipc with staging=arena, or transfer=disk"),
        ("transfer=gloo", "choose transfer=ipc with staging=arena, or transfer=disk"),
        ("rollout=vllm rollout.sleep_level=1", "set rollout.sleep_level=0"),
    ],
)
def test_what_cannot_be_sampled_ahead_is_refused_before_anything_is_made(compose_run, overrides, said):
    with pytest.raises(CompactHydraException, match=said):
        compose_run(*SMALL, *OWN, *overrides.split())
    with pytest.raises(CompactHydraException, match="dpo samples nothing while it learns"):
        compose_run("experiment=smoke", "algo=dpo", "rollout.ahead.lag=1")
