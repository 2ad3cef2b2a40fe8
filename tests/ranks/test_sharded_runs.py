"""Whole runs of ranks that hold shards: the numbers of one process, checkpoints by rank, and ends."""

from __future__ import annotations

import json

import pytest
import torch
from hydra.errors import CompactHydraException
from rank_runs import ASLEEP_S, Runs
from safetensors import safe_open
from safetensors.torch import load_file
from test_ranks_runs import SAID_ANYHOW, SOON_S, WITHOUT_A_WORD, assert_as_of_one, of_one, runs  # noqa: F401

SHARDED = ("trainer=sharded",)
whole_runs = [pytest.mark.slow, pytest.mark.usefixtures("default_signals"), pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("transfer.take=view", r"transfer.take must be copy \(got view\)"),
        ("transfer.staging=live", r"transfer.staging must be arena \(got live\)"),
        ("transfer=local", r"transfer must be ipc \(got local\)"),
        ("model.lora.rank=2", r"set trainer=replicas, or model.lora.rank=0 \(got trainer=sharded and 2\)"),
    ],
)
def test_what_cannot_be_sharded_is_refused_before_anything_is_made(compose_run, override, said):
    with pytest.raises(CompactHydraException, match=said):
        compose_run("trainer=sharded", override)


def of_runs(test):
    for mark in whole_runs:
        test = mark(test)
    return test


@of_runs
def test_two_ranks_with_shards_have_the_numbers_weights_and_policy_of_one_process_and_any_number_goes_on(
    runs,  # noqa: F811
    of_one,  # noqa: F811
    tmp_path_factory,
):
    ended = runs.train(*SHARDED, "trainer.ranks=2", harm="terminate asleep")
    assert ended.code == 75 and ended.seconds < SOON_S, ended.errors
    ended.assert_nothing_is_left()
    newest = max((runs.folder / "run/checkpoints").glob("0*"))
    assert not (newest / "policy").exists()
    rows = {}
    for path in sorted(newest.glob("policy-0000?-of-00002.safetensors")):
        with safe_open(path, framework="pt") as file:
            rows |= {key: rows.get(key, 0) + file.get_slice(key).get_shape()[0] for key in file.keys()}  # noqa: SIM118
            shapes = json.loads(file.metadata()["shapes"])
    assert rows == {key: shape[0] for key, shape in shapes.items()}, "each row once"
    copies = {}
    for words in (["trainer.ranks=2"], ["trainer.ranks=3"], ["trainer=one", "trainer.ranks=1"]):
        copy = Runs(tmp_path_factory.mktemp("resumed"))
        runs.copied_to(copy)
        resumed = copy.resume(*words)
        assert resumed.code == 0, resumed.errors
        assert_as_of_one(copy, of_one)
        resumed.assert_nothing_is_left()
        copies[words[-1]] = load_file(copy.folder / "run/policy/model.safetensors")
    first, *others = copies.values()
    assert all(other.keys() == first.keys() for other in others)
    assert all(torch.equal(other[key], first[key]) for other in others for key in first)


@of_runs
def test_a_run_of_one_process_goes_on_with_shards(runs, of_one):  # noqa: F811
    ended = runs.train("transfer.take=copy", harm="terminate asleep")
    assert ended.code == 75, ended.errors
    resumed = runs.resume("trainer=sharded", "trainer.ranks=2")
    assert resumed.code == 0, resumed.errors
    assert_as_of_one(runs, of_one)


@of_runs
@pytest.mark.parametrize("workers", [1, 2])
def test_shards_that_are_broadcast_change_no_number_also_when_a_worker_is_killed(runs, workers, tmp_path_factory):  # noqa: F811
    one, several = Runs(tmp_path_factory.mktemp("one")), f"rollout.workers={workers}"
    assert one.train(several).code == 0
    ended = runs.train(*SHARDED, "trainer.ranks=2", "transfer=gloo", several, harm="kill-worker")
    assert ended.code == 0, ended.errors
    assert "was started again" in ended.output
    assert_as_of_one(runs, (one.numbers(), one.digests()))
    ended.assert_nothing_is_left()


@of_runs
def test_a_run_whose_ranks_broadcast_goes_on_after_a_rank_was_killed_in_a_push(runs, of_one):  # noqa: F811
    ended = runs.train(*SHARDED, "trainer.ranks=2", "transfer=gloo", harm="pushing kill-rank")
    assert ended.code == 1, ended.errors
    resumed = runs.resume()
    assert resumed.code == 0, resumed.errors
    assert_as_of_one(runs, of_one)
    resumed.assert_nothing_is_left()


@of_runs
@pytest.mark.parametrize("transfer", ["ipc", "gloo"])
@pytest.mark.parametrize("harm", ["kill-rank asleep", "learning kill", "pushing kill-rank"])
def test_a_rank_with_shards_that_is_killed_ends_the_run_with_one_line(runs, harm, transfer):  # noqa: F811
    ended = runs.train(*SHARDED, "trainer.ranks=2", f"transfer={transfer}", harm=harm)
    assert ended.code == 1 and ended.seconds < SOON_S < ASLEEP_S, ended.errors
    (said,) = [line for line in ended.lines if not SAID_ANYHOW.match(line)]
    assert said.endswith(WITHOUT_A_WORD), ended.errors  # a push says what it was at, too
    ended.assert_nothing_is_left()


@of_runs
def test_a_policy_in_bfloat16_is_left_in_bfloat16_with_the_values_of_one_process(rlhf_train, tmp_path):
    words = ("experiment=smoke", "model=micro", "model.dtype=bfloat16", "steps=2", "sft.steps=2", "evaluate_every=2")
    left = []
    for trainer in (("trainer=one",), ("trainer=sharded", "trainer.ranks=2")):
        folder = tmp_path / str(len(left))
        assert rlhf_train(*words, *trainer, f"hydra.run.dir={folder}").returncode == 0
        left.append(load_file(folder / "policy/model.safetensors"))
    assert {tensor.dtype for tensor in left[1].values()} == {torch.bfloat16}
    assert left[0].keys() == left[1].keys() and all(torch.equal(left[0][name], left[1][name]) for name in left[0])
