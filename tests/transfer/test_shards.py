"""A trainer of several ranks: what they hold reaches workers as if one process had pushed it, or fails in all alike."""

import os

import pytest
import torch
from rank_processes import Decoder, Worker, trained, trainer
from shared_memory import left_in_shared_memory
from worker_process import in_process

from transfer import make_receiver, make_transfer
from transfer.agreement.manifest import Manifest
from transfer.backends.shards import endpoint_of_host
from transfer.config import (
    CollectiveConfig,
    DiskConfig,
    HandlesConfig,
    HttpSenderConfig,
    IpcConfig,
    LocalConfig,
    SenderConfig,
    Staging,
    Take,
    Verify,
    check_takes_shards,
)

SENDER = SenderConfig(timeout_s=20.0)
COPY = IpcConfig(sender=SENDER, take=Take.copy)
VIEW = IpcConfig(sender=SENDER, take=Take.view)


def pushed_by_one(seed, tied, folder, steps=0, dtype=torch.float32):
    """The digest of a version that one process has pushed."""
    module, received = Decoder(seed, tied), Decoder(99, tied, dtype)
    trained(module, steps)
    with in_process(COPY, folder, received, module.state_dict()) as (transfer, receiver):
        transfer.push(module.state_dict())
        return receiver.status()["digest"]


# --- what arrives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ranks, tied, dtype", [(2, True, torch.float32), (3, False, torch.float32), (3, True, torch.bfloat16)]
)
def test_shards_arrive_as_if_one_process_had_pushed_also_in_a_worker_that_was_started_again(
    ranks, tied, dtype, tmp_path
):
    with trainer(ranks, tmp_path, seed=1, tied=tied) as ours:
        assert sum(ours.call("rows", name="layers.0.k_proj.weight")) == 2
        endpoints = ours.call("make", config=COPY)
        assert len(endpoints[0]["sockets"]) == ranks and all(each == endpoints[0] for each in endpoints)
        wanted = Manifest.of(Decoder(0, tied, dtype).state_dict())
        with Worker(endpoints[0], tmp_path, wanted) as worker:
            ours.call("open", url=worker.url)
            for version in range(3):
                pushed = ours.call("push")
                assert [each[0] for each in pushed] == [version] * ranks and len({each[1:] for each in pushed}) == 1
                expected = pushed_by_one(1, tied, tmp_path / str(version), version, dtype)
                assert worker.status()["digest"] == expected and worker.serves() == (version, expected)
                ours.call("withdraw")
                ours.call("train")
            url = worker.restart()
            assert worker.status()["version"] is None
            assert ours.outcomes("recover", of=[0], url=url) == [("gives", True)], "no other rank takes part"
            assert worker.serves() == (2, expected)
            assert {each[0] for each in ours.call("push")} == {3}
            assert worker.serves() == (3, pushed_by_one(1, tied, tmp_path / "3", 3, dtype))
            assert ours.outcomes("recover", of=[1], url=url)[0][0] == "raises"


@pytest.mark.slow
def test_workers_of_each_host_read_the_rows_of_its_own_ranks_which_hold_all_of_them(tmp_path):
    with trainer(4, tmp_path, hosts=2, seed=1, tied=True) as ours:
        told = ours.call("make", config=COPY)[0]
        endpoints = [endpoint_of_host(told, host) for host in (0, 1)]
        sockets = [each["sockets"] for each in endpoints]
        assert [len(each) for each in sockets] == [2, 2] and len({*sockets[0], *sockets[1]}) == 4
        wanted, folders = Manifest.of(Decoder(0, True).state_dict()), [tmp_path / str(host) for host in (0, 1)]
        for folder in folders:
            folder.mkdir()
        with Worker(endpoints[0], folders[0], wanted) as here, Worker(endpoints[1], folders[1], wanted) as there:
            ours.call("open", url=f"{here.url} {there.url}")
            for version in range(2):
                ours.call("push")
                expected = version, pushed_by_one(1, True, tmp_path / f"one {version}", version)
                assert here.serves() == there.serves() == expected
                ours.call("withdraw")
                ours.call("train")
            ours.call("push")
            ours.call("spoil", rank=3, name="layers.0.k_proj.weight")
            for error in ours.errors("push"):
                assert "layers.0.k_proj.weight" in error, "of any host's rank"


def test_ranks_of_several_hosts_that_do_not_hold_all_rows_on_each_are_refused(tmp_path):
    with trainer(2, tmp_path, seed=1, tied=True) as ours:
        ours.call("say_hosts", hosts=2)
        ours.call("make", config=COPY)
        assert all("2 hosts with all rows each" in error for error in ours.errors("open", url=""))


@pytest.mark.parametrize("ranks, tied, dtype", [(2, True, torch.bfloat16), (3, False, torch.float32)])
def test_shards_arrive_by_files_of_which_each_rank_writes_its_own_rows(ranks, tied, dtype, tmp_path):
    files = tmp_path / "files"
    with trainer(ranks, tmp_path, seed=1, tied=tied) as ours:
        endpoint = ours.call("make", config=DiskConfig(sender=SENDER, path=str(files), keep=1))[0]
        with Worker(endpoint, tmp_path, Manifest.of(Decoder(0, tied, dtype).state_dict())) as worker:
            ours.call("open", url=worker.url)
            for version in range(3):
                pushed = ours.call("push")
                assert [each[0] for each in pushed] == [version] * ranks and len({each[1:] for each in pushed}) == 1
                assert worker.serves() == (version, pushed_by_one(1, tied, tmp_path / str(version), version, dtype))
                ours.call("withdraw")
                ours.call("train")
            names = sorted(path.name for path in files.glob("*.*") if not path.name.startswith("."))
            rows = [f"00000001-00000002-{rank:05d}-of-{ranks:05d}.safetensors" for rank in range(1, ranks + 1)]
            assert [name for name in names if "-00000002" in name] == [*rows, "00000001-00000002.json"]
            assert len(names) <= 2 * (ranks + 1), "older versions go with all of their files"
            assert max(path.stat().st_size for path in files.glob("*.safetensors")) < 1500 + 4 * sum(
                tensor.numel() for tensor in Decoder(0, tied).state_dict().values()
            ), "no file has all rows"
            url = worker.restart()
            assert ours.outcomes("recover", of=[0], url=url) == [("gives", True)]
            assert worker.serves()[0] == 2
            ours.call("spoil", rank=1, name="lm_head.weight")
            assert "has values that are not finite" in texts(ours.errors("push"))
            assert worker.serves()[0] == 2 and not list(files.glob("*-00000003*")), "nothing of what failed stays"


def test_a_file_of_a_rank_that_is_damaged_or_another_is_refused(tmp_path):
    from transfer.backends.disk import DiskIntake, rows_name, write_file
    from transfer.backends.disk_shards import read_rows

    manifest = Manifest.of({"w": torch.zeros(5, 2), "n": torch.zeros(3)})
    of_ranks = ({"w": torch.ones(3, 2), "n": torch.ones(3)}, {"w": torch.ones(2, 2)})
    one, two = (write_file(tmp_path, rows_name(1, 4, rank, 2), rows) for rank, rows in enumerate(of_ranks))
    files = [{"bytes": size, "xxh3_128": found} for size, found in (one, two)]
    held = read_rows(str(tmp_path), (1, 4), files, manifest, ["n"])
    assert [sorted(each) for each in held] == [["n", "w"], ["w"]]
    with pytest.raises(ValueError, match="is damaged"):
        read_rows(str(tmp_path), (1, 4), [files[0], {**files[1], "xxh3_128": files[0]["xxh3_128"]}], manifest, ["n"])
    with pytest.raises(ValueError, match="rank 0 holds other rows"):
        read_rows(str(tmp_path), (1, 4), files, manifest, [])
    intake = DiskIntake({"folder": str(tmp_path)})
    intake.prepare(manifest, {"ranks": 2, "whole": ["n"]}, torch.device("cpu"))
    for where in ({"epoch": 1, "bytes": 3, "xxh3_128": "a"}, {"epoch": 1, "files": files[:1]}):
        with pytest.raises(ValueError, match=r"where\.files must be 2"):
            intake.stage(4, where)
    with pytest.raises(ValueError, match=r"where\.whole names tensors"):
        intake.prepare(manifest, {"ranks": 2, "whole": ["m"]}, torch.device("cpu"))


@pytest.mark.parametrize("verify", [Verify.off, Verify.full])
def test_a_worker_has_every_rank_s_rows_to_the_bit_and_messages_stay_small(verify, tmp_path):
    config = IpcConfig(sender=SENDER, take=Take.copy, verify=verify)
    with trainer(3, tmp_path, seed=3, tied=False) as ours:
        ours.call("make", config=config)
        ours.call("open_here")
        assert len(ours.call("differing")[0]) > 10
        for _ in range(3):
            ours.call("push")
            assert ours.call("differing") == [[]] * 3
            ours.call("train")
            assert len(ours.call("differing")[0]) > 10
        told = ours.call("control_bytes")
        assert 0 < told[0] < 3 * 400 and told == [told[0]] * 3


def test_whole_tensors_that_all_ranks_have_are_written_by_the_first_alone(tmp_path):
    with trainer(2, tmp_path, sharded=False, seed=1, tied=True) as ours:
        endpoint = ours.call("make", config=VIEW)[0]
        with Worker(endpoint, tmp_path, Manifest.of(Decoder(0, True).state_dict())) as worker:
            ours.call("open", url=worker.url)
            for version in range(3):
                assert [each[0] for each in ours.call("push")] == [version] * 2
                assert worker.serves() == (version, pushed_by_one(1, True, tmp_path / str(version), version))
                ours.call("withdraw")
                ours.call("train")


# --- what fails, in all ranks alike -----------------------------------------------------------------------------------


def texts(errors):
    """The errors' texts, of which all are one, without their types."""
    found = {error.partition(": ")[2] for error in errors}
    assert len(found) == 1, errors
    assert all(error.startswith("TransferError: ") for error in errors[1:]), errors
    return found.pop()


def test_a_value_that_is_not_finite_in_one_rank_alone_fails_the_push_in_all_and_nothing_is_sent(tmp_path):
    with trainer(3, tmp_path, seed=1, tied=False) as ours:
        endpoint = ours.call("make", config=COPY)[0]
        with Worker(endpoint, tmp_path, Manifest.of(Decoder(0, False).state_dict())) as worker:
            ours.call("open", url=worker.url)
            ours.call("push")
            before = worker.serves()
            ours.call("spoil", rank=2, name="lm_head.weight")
            ours.call("spoil", rank=1, name="layers.1.down_proj.weight")
            said = texts(ours.errors("push"))
            assert said == ("version 1: layers.1.down_proj.weight has values that are not finite; nothing was sent"), (
                "the first by name, as for one process"
            )
            assert worker.serves() == before
            ours.call("build", sharded=True, seed=5, tied=False)
            assert {each[0] for each in ours.call("push")} == {1}
            assert worker.serves() == (1, pushed_by_one(5, False, tmp_path / "one"))


def test_a_worker_that_is_gone_fails_the_push_in_all_ranks(tmp_path):
    with trainer(2, tmp_path, seed=1, tied=True) as ours:
        endpoint = ours.call("make", config=COPY)[0]
        assert "no connection" in texts(ours.errors("open", url="http://127.0.0.1:1"))
        with Worker(endpoint, tmp_path, Manifest.of(Decoder(0, True).state_dict())) as worker:
            ours.call("open", url=worker.url)
            ours.call("push")
        said = texts(ours.errors("push"))
        assert "worker 0" in said and "version 1" in said
        assert "at least one worker (got no senders)" in texts(ours.errors("open", url=""))


def test_ranks_that_hold_other_tensors_are_refused_in_all(tmp_path):
    with trainer(2, tmp_path, seed=1, tied=True) as ours:
        endpoint = ours.call("make", config=COPY)[0]
        with Worker(endpoint, tmp_path, Manifest.of(Decoder(0, True).state_dict())) as worker:
            ours.call("forget", rank=1, name="layers.0.q_norm")
            said = texts(ours.errors("open", url=worker.url))
            assert said == "rank 1: it has other weights than the first rank: layers.0.q_norm"
            ours.call("build", sharded=True, seed=1, tied=True)
            ours.call("open", url=worker.url)
            ours.call("forget", rank=1, name="layers.0.q_norm")
            assert "rank 1: " in texts(ours.errors("push"))
            ours.call("build", sharded=True, seed=1, tied=False)
            assert "embed_tokens.weight is no longer tied to" in texts(ours.errors("push"))
            ours.call("build", sharded=False, seed=1, tied=True)
            assert "opened with shards" in texts(ours.errors("push"))
            assert worker.status()["version"] is None


@pytest.mark.parametrize(
    "config, said",
    [
        (VIEW, "transfer.take must be copy (got view)"),
        (IpcConfig(sender=SENDER, staging=Staging.live, take=Take.copy), "transfer.staging must be arena (got live)"),
    ],
    ids=["view", "live"],
)
def test_shards_are_refused_by_transfers_that_do_not_take_them(config, said, tmp_path):
    with trainer(2, tmp_path, seed=1, tied=True) as ours:
        ours.call("make", config=config)
        assert said in texts(ours.errors("open", url="http://127.0.0.1:1"))


def test_which_transfers_take_shards_is_known_without_a_trainer():
    check_takes_shards(COPY)
    check_takes_shards(DiskConfig(sender=SENDER))
    check_takes_shards(CollectiveConfig(sender=SENDER))
    refused = {
        "handles": HandlesConfig(sender=HttpSenderConfig(url=["http://127.0.0.1:1"])),
        "local": LocalConfig(),
    }
    for name, config in refused.items():
        with pytest.raises(ValueError, match=rf"transfer must be ipc \(got {name}\)"):
            check_takes_shards(config)


def test_a_rank_that_is_killed_ends_the_push_in_the_others_and_leaves_nothing_and_the_worker_keeps_its_version(
    tmp_path,
):
    before = set(os.listdir("/dev/shm"))
    with trainer(3, tmp_path, seed=1, tied=True) as ours:
        endpoint = ours.call("make", config=COPY)[0]
        with Worker(endpoint, tmp_path, Manifest.of(Decoder(0, True).state_dict())) as worker:
            ours.call("open", url=worker.url)
            ours.call("push")
            served = worker.serves()
            ours.call("train")
            ours.kill(1)
            ours.begin("push", 0)
            ours.begin("push", 2)
            first = ours.outcome(0)
            again = ours.outcomes("push", of=[0])[0]
            ours.kill(0)  # as a trainer ends that cannot go on
            for kind, said in (first, again, ours.outcome(2)):
                assert kind == "raises" and said.startswith("TransferError") and "have lost each other" in said
            assert worker.serves() == served
            ours.kill(2)
            assert worker.serves() == served
    assert left_in_shared_memory(before, 5.0) == set()


# --- DTensors elsewhere -----------------------------------------------------------------------------------------------


@pytest.fixture
def dtensor(tmp_path):
    """One over a single rank, which is this process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda tensor, dim=0: distribute_tensor(tensor, mesh, [Shard(dim)])
    dist.destroy_process_group()


def test_the_plan_for_dtensors_is_that_of_the_whole_tensors_and_knows_tied_ones(dtensor):
    whole = {"a": torch.zeros(3, 2), "b": torch.zeros(3, 2), "c": torch.zeros(3, 2)}
    shards = {name: dtensor(tensor) for name, tensor in whole.items()}
    shards["d"] = shards["a"].detach()
    assert Manifest.of(shards) == Manifest.of({**whole, "d": whole["a"]})


@pytest.mark.parametrize("config", [COPY, VIEW, DiskConfig(sender=SENDER), LocalConfig()])
def test_a_trainer_of_one_process_is_told_to_send_whole_tensors(config, dtensor, tmp_path):
    module = Decoder(1, tied=False)
    weights = module.state_dict()
    sharded = {**weights, "lm_head.weight": dtensor(weights["lm_head.weight"])}
    said = r"lm_head.weight is a DTensor, of which each rank holds a part: .*transfer.full_weights"
    with pytest.raises(ValueError, match=said), in_process(config, tmp_path / "a", Decoder(2, False), sharded):
        pass
    with in_process(config, tmp_path / "b", Decoder(2, False), weights) as (transfer, _):
        with pytest.raises(ValueError, match=said):
            transfer.push(sharded)
        assert transfer.push(weights) == 0


def test_a_worker_whose_module_is_sharded_is_refused(dtensor, tmp_path):
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(dtensor(torch.zeros(3, 2)))
    with (
        make_transfer(COPY, tmp_path) as transfer,
        pytest.raises(ValueError, match=r"weight is a DTensor.*must hold whole tensors"),
    ):
        make_receiver(transfer.endpoint, module)


def test_shards_of_other_dimensions_are_refused_with_their_placement(dtensor):
    from transfer.backends.rank_rows import check_placements

    check_placements({"w": dtensor(torch.zeros(4, 2))}, 0, 1, 1)
    with pytest.raises(ValueError, match=r"w must be sharded on dim 0 over the 1 ranks.*Shard\(dim=1\)"):
        check_placements({"w": dtensor(torch.zeros(4, 2), 1)}, 0, 1, 1)
    with pytest.raises(ValueError, match=r"w must be sharded on dim 0 over the 2 ranks"):
        check_placements({"w": dtensor(torch.zeros(4, 2))}, 0, 2, 1)
