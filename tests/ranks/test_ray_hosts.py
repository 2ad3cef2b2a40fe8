"""Ranks that a Ray starts on its hosts, two nodes of this machine: placed, ended, with the numbers of one process."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress

import psutil
import pytest
import ray
import torch
from hydra.errors import CompactHydraException
from rank_runs import GONE_S, Runs
from ray.cluster_utils import Cluster
from test_ranks_runs import WITHOUT_A_WORD, assert_as_of_one, runs  # noqa: F401

from rlhf.ranks.ray_hosts import VISIBLE, Host, Hosts, _see
from rlhf.rollout.ray_workers import _on_host
from rlhf.rollout.spec import WorkerSpec
from rlhf.run import run
from rlhf.shell.ending import RunError
from transfer.agreement.wire import TransferError
from transfer.worker.ray_start import joined_ray

NODE = {"num_cpus": 3, "object_store_memory": 80 * 2**20}
whole_runs = [pytest.mark.slow, pytest.mark.usefixtures("default_signals"), pytest.mark.timeout(600)]


def of_runs(test):
    for mark in whole_runs:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def cluster():
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    made = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False, "temp_dir": folder})
    made.add_node(**NODE)
    yield made
    made.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def ranks_in(cluster):
    """The processes of ranks that are below the Ray's."""
    of_nodes = [kind for node in cluster.list_all_nodes() for kind in node.all_processes.values()]
    found = []
    for pid in [each.process.pid for kind in of_nodes for each in kind]:
        with suppress(psutil.Error):
            found += psutil.Process(pid).children(recursive=True)
    return [each for each in found if is_rank(each)]


def is_rank(process):
    """Of a process that may have ended meanwhile, or is a zombie."""
    with suppress(psutil.Error):
        return "rlhf.beside" in " ".join(process.cmdline())
    return False


@pytest.fixture(scope="module")
def of_one(tmp_path_factory):
    """The numbers and digests of one process, also with two workers."""
    made = Runs(tmp_path_factory.mktemp("one"))
    ended = made.train("rollout.workers=2")
    assert ended.code == 0, ended.errors
    return made.numbers(), made.digests()


def overrides(cluster, *words):
    return (
        *("trainer=sharded", "trainer.ranks=2", "trainer.hosts=2", f"trainer.address={cluster.address}"),
        *("transfer/sender=ray", "rollout.workers=2", *words),
    )


@of_runs
def test_hosts_that_hold_all_rows_each_have_the_numbers_of_one_process_and_workers_of_each_serve_them(
    cluster,
    runs,  # noqa: F811
    of_one,
):
    ended = runs.train(*overrides(cluster))
    assert ended.code == 0, ended.errors
    assert_as_of_one(runs, of_one)
    ended.assert_nothing_is_left()
    assert ranks_in(cluster) == []
    assert (runs.folder / "run/rank-1.log").exists()
    journals = [(runs.folder / f"run/journal/worker-{index}.jsonl").read_text() for index in (0, 1)]
    assert all(digest in journal for digest in runs.digests().values() for journal in journals)


@of_runs
def test_a_rank_of_another_host_that_is_killed_ends_the_run_in_one_line_and_a_resume_goes_on(
    cluster,
    runs,  # noqa: F811
    of_one,
):
    killed = []

    def kill_once_it_learns():
        if killed or not (runs.folder / "run/checkpoints").is_dir() or not list(runs.folder.glob("run/checkpoints/0*")):
            return
        (rank,) = ranks_in(cluster)
        rank.kill()
        killed.append(time.monotonic())

    words = overrides(cluster)
    ended = runs.train(*words, meanwhile=kill_once_it_learns)
    assert ended.code == 1 and killed and time.monotonic() - killed[0] < GONE_S, ended.errors
    assert any(WITHOUT_A_WORD in line for line in ended.lines), ended.errors
    assert "Traceback" not in ended.errors
    ended.assert_nothing_is_left()
    assert ranks_in(cluster) == []
    resumed = runs.resume()
    assert resumed.code == 0, resumed.errors
    assert_as_of_one(runs, of_one)


@of_runs
def test_hosts_for_which_the_ray_has_no_room_are_said_with_what_each_needs(cluster, runs, monkeypatch):  # noqa: F811
    (runs.folder / "mine.py").write_text(
        (runs.folder / "mine.py").read_text() + "\nimport rlhf.ranks.ray_hosts\nrlhf.ranks.ray_hosts.PLACED_S = 8.0\n"
    )
    ended = runs.train(*overrides(cluster, "trainer.ranks=3", "trainer.hosts=3"))
    assert ended.code == 1 and "has no room for trainer.hosts=3 hosts, this one among them, with 2 CPUs free" in (
        " ".join(ended.errors.split())
    ), ended.errors
    assert "Traceback" not in ended.errors
    ended.assert_nothing_is_left()


@pytest.mark.slow
def test_what_a_host_cannot_do_is_told_in_one_line_and_not_as_ray_s_traceback(cluster, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    with joined_ray(cluster.address, 1, 60.0):
        actor = ray.remote(Host).options(num_cpus=1).remote()
        said = rf"\Aa host of the trainer in the Ray: FileNotFoundError: .*'{nowhere}' \(folders and the program must"
        with pytest.raises(RunError, match=said):
            object.__new__(Hosts)._answers([actor.start.remote(nowhere, nowhere, {})])


def test_a_run_whose_hosts_are_not_there_leaves_what_an_earlier_one_has_written(compose_run, tmp_path):
    config = compose_run("experiment=smoke", "trainer=sharded", "trainer.ranks=2", "trainer.address=127.0.0.1:1")
    written = [tmp_path / name for name in ("metrics.jsonl", "summary.json", "checkpoints/00000003/manifest.json")]
    for path in written:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    with pytest.raises(TransferError, match=r"the Ray at trainer.address=127.0.0.1:1 cannot be used: nothing answers"):
        run(config, tmp_path)
    assert all(path.read_text() == "{}" for path in written)


def test_a_process_that_has_gpus_already_cannot_be_given_others(monkeypatch):
    monkeypatch.setenv(VISIBLE, "4,5")
    _see("2,3")
    assert os.environ[VISIBLE] == "2,3"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    _see("2,3")
    with pytest.raises(
        RunError, match=r"CUDA_VISIBLE_DEVICES=2,3\), and .* \(4,5\): start each run of the sweep by itself"
    ):
        _see("4,5")


def test_each_worker_is_told_of_the_memory_and_the_gpus_of_its_own_host():
    hosts = object.__new__(Hosts)
    hosts._actors, hosts.gpus = [None, None], [["0", "1"], ["4", "7"]]
    endpoint = {"sockets": ["a", "b"], "of_hosts": [["a", "b"], ["c", "d"]]}
    told = WorkerSpec(architecture={"model_type": "qwen3"}, endpoint=endpoint)
    found = [_on_host(told, index, ["0,1", "1,0", "0,1", "1,0"], hosts) for index in range(4)]
    assert [each.endpoint["sockets"] for each in found] == [["a", "b"], ["c", "d"]] * 2
    assert [each.endpoint["host"] for each in found] == [0, 1, 0, 1]
    assert [each.visible for each in found] == [["0,1"], ["4,7"], ["1,0"], ["7,4"]]
    hosts.gpus = [["0"], ["5"]]
    assert [_on_host(told, index, [], hosts).visible for index in range(4)] == [["0"], ["5"]] * 2, (
        "which none has to choose"
    )
    hosts.gpus = [[], []]
    assert [_on_host(told, index, [], hosts).visible for index in range(4)] == [[]] * 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trainer.ranks=3 trainer.hosts=2", r"trainer.ranks must be a multiple of trainer.hosts.*\(got 3 and 2\)"),
        ("trainer.ranks=2 trainer.hosts=0", r"trainer.hosts must be at least 1"),
        ("trainer.address=auto", "trainer.ranks must be a number where a Ray starts them"),
        ("trainer.ranks=2 trainer.address=ray://host:1", "trainer.address must be auto or like 127.0.0.1:6379"),
        ("trainer.ranks=2 trainer.gpus=[0,0]", r"trainer.gpus must name different GPUs, from 0 \(got \[0, 0\]\)"),
        ("trainer.ranks=4 trainer.hosts=2 trainer.gpus=[0]", r"trainer.gpus must name 2, one for each rank of a host"),
        ("trainer.ranks=2 trainer.address=host:99999", "trainer.address must be auto or like 127.0.0.1:6379"),
        ("trainer.ranks=2 trainer.gpus=[0,1] model.device=cpu", "trainer.gpus is for ranks on GPUs: leave it out"),
        (
            "trainer=replicas trainer.ranks=2 trainer.hosts=2 trainer.address=auto transfer/sender=ray "
            "rollout.workers=2",
            "transfer=ipc has whole weights in the first host's memory alone, and workers are on trainer.hosts=2",
        ),
        (
            "trainer=replicas trainer.ranks=2 trainer.hosts=2 trainer.address=auto transfer/sender=ray "
            "rollout.workers=2 transfer=gloo",
            "the others cannot connect to transfer.host=127.0.0.1: set it to an address of this host",
        ),
        (
            "trainer.ranks=2 trainer.hosts=2 trainer.address=auto rollout.workers=2 rollout.gpus=[0]",
            r"rollout.gpus must name 2: 1 for each of 2 workers \(got \[0\]\)",
        ),
        (
            "trainer.ranks=2 trainer.hosts=2 trainer.address=auto rollout.workers=2 rollout.gpus=[0,1] "
            "transfer/sender=ray",
            r"must name 1: 1 for each of 1 workers of a host, of trainer.hosts=2 \(got \[0, 1\]\)",
        ),
        (
            "trainer.ranks=2 trainer.address=auto transfer/sender=ray transfer.sender.address=host:1",
            "leave out transfer.sender.address",
        ),
        (
            "trainer.ranks=2 trainer.hosts=2 trainer.address=auto transfer=disk",
            r"over ranks of several hosts travel by transfer=ipc, to workers on each: choose it \(got disk\)",
        ),
    ],
)
def test_hosts_that_cannot_be_are_refused_in_one_line(compose_run, words, said):
    with pytest.raises(CompactHydraException, match=said):
        compose_run("experiment=smoke", "trainer=sharded", *words.split())
