"""The engine inside vLLM, with a model that loads as vLLM's do; tests/rollout/test_vllm.py has the real one."""

import dataclasses
import sys
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from worker_process import plain

from transfer import make_transfer
from transfer.agreement.journal import Journal
from transfer.agreement.manifest import Manifest
from transfer.agreement.protocol import Phase
from transfer.agreement.shards import local, rows_of
from transfer.agreement.wire import TransferError
from transfer.backends.slots import Slots
from transfer.config import DiskConfig, IpcConfig, SenderConfig, Staging, Take, Verify
from transfer.memory.digest import digest_of
from transfer.memory.regions import slot_bytes, views_of
from transfer.memory.sums import sums_of
from transfer.trainer.senders.direct import DirectSender
from transfer.vllm.described import Described
from transfer.vllm.engine import RlhfIpcEngine
from transfer.vllm.rank import RankWeights
from transfer.vllm.recorder import Unsupported, record
from transfer.vllm.reload import OwnWay as LayerwiseWay
from transfer.vllm.remote import Ranks, RemoteIntake, RemoteLanding
from transfer.vllm.replay import Replay
from transfer.worker.receiver import Receiver

SENDER = SenderConfig(timeout_s=5.0)
ARENA = IpcConfig(sender=SENDER, take=Take.copy)
LIVE = IpcConfig(sender=SENDER, staging=Staging.live, take=Take.copy)


def checkpoint(seed, dtype=torch.float32):
    """Weights as a trainer names them: two that are fused, one that is cut, one that is padded, a tied one, a norm."""
    generator = torch.Generator().manual_seed(seed)

    def made(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    embedding = made(11, 8)
    return {
        "embed.weight": embedding,
        "head.weight": embedding,
        "k.weight": made(4, 8),
        "norm.weight": made(8),
        "o.weight": made(8, 6),
        "q.weight": made(6, 8),
    }


class FusedModel(torch.nn.Module):
    """What vLLM makes of it: q and k in one parameter, a padded embedding, and the half of `o` that is this rank's."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        for name, shape in {"embed": (16, 8), "qk": (10, 8), "o": (8, 3), "norm": (8,)}.items():
            setattr(self, name, torch.nn.Parameter(torch.full(shape, 7.0, dtype=dtype), requires_grad=False))

    def load_weights(self, weights):
        for name, tensor in weights:
            match name:
                case "embed.weight":
                    self.embed.data[:11].copy_(tensor)
                    self.embed.data[11:].fill_(0)
                case "head.weight":
                    continue  # tied
                case "q.weight":
                    self.qk.data.narrow(0, 0, 6).copy_(tensor)
                case "k.weight":
                    self.qk.data.narrow(0, 6, 4).copy_(tensor)
                case "o.weight":
                    self.o.data.copy_(tensor.narrow(1, 3, 3))
                case "norm.weight":
                    self.norm.data.copy_(tensor)
                case _:
                    raise KeyError(name)


class OwnWay:
    """vLLM's reloading, which here is the loader; counts."""

    def __init__(self, model, after=lambda model: None):
        self.model, self.after, self.reloads = model, after, 0

    def load(self, pairs):
        self.model.load_weights(pairs)

    def reload(self, pairs):
        self.reloads += 1
        self.model.load_weights(pairs)
        self.after(self.model)


def loaded(seed, dtype=torch.float32):
    model = FusedModel(dtype)
    model.load_weights(checkpoint(seed).items())
    return dict(model.named_parameters())


def same(model, seed, dtype=torch.float32):
    wanted = loaded(seed, dtype)
    return all(torch.equal(parameter, wanted[name]) for name, parameter in model.named_parameters())


def rpc_of(ranks):
    """What extension.py does in vLLM's workers."""

    def rpc(verb, body):
        answers = []
        for rank in ranks:
            try:
                said = getattr(rank, verb)(**body)
            except (ValueError, OSError, RuntimeError) as error:
                answers.append({"error": str(error)})
                continue
            answers.append({**(said if isinstance(said, dict) else {"digest": said}), "plan": rank.plan})
        return answers

    return rpc


@contextmanager
def session(config, folder, model, own_way=None, weights=None):
    """An open session to an engine with one rank, and the receiver before it."""
    rank = RankWeights(model, torch.device("cpu"), own_way or OwnWay(model))
    ranks = Ranks(rpc_of([rank]))
    weights = checkpoint(0) if weights is None else weights
    with make_transfer(config, folder) as transfer:
        landing = RemoteLanding(Manifest.of(weights), torch.device("cpu"), ranks)
        receiver = Receiver(RemoteIntake(transfer.endpoint, ranks), landing, Journal())
        transfer.open(weights, [DirectSender(receiver, "worker 0")])
        yield transfer, receiver, rank


def put(weights, seed):
    with torch.no_grad():
        for name, tensor in checkpoint(seed).items():
            weights[name].copy_(tensor)


@pytest.mark.parametrize("config", [ARENA, LIVE, dataclasses.replace(LIVE, verify=Verify.off)])
def test_weights_arrive_by_the_loader_first_and_by_recorded_copies_from_then_on(config, tmp_path):
    model, weights = FusedModel(), checkpoint(0)
    own_way = OwnWay(model)
    with session(config, tmp_path, model, own_way, weights) as (transfer, receiver, rank):
        for seed in range(5):
            put(weights, seed)
            assert transfer.push(weights) == seed
            assert same(model, seed) and receiver.version == seed
        assert own_way.reloads == 1, "after one update the loader is not needed any more"
        assert "copies by torch" in rank.plan


def test_files_go_through_the_loader_every_time(tmp_path):
    model, weights = FusedModel(), checkpoint(0)
    own_way = OwnWay(model)
    with session(DiskConfig(sender=SENDER), tmp_path, model, own_way, weights) as (transfer, _, _):
        for seed in range(3):
            put(weights, seed)
            transfer.push(weights)
            assert same(model, seed)
    assert own_way.reloads == 3


def test_a_model_that_is_repacked_after_loading_keeps_its_own_way_and_says_why(tmp_path):
    model, weights = FusedModel(), checkpoint(0)

    def repack(model):
        model.qk.data.copy_(model.qk.data.flip(0))

    own_way = OwnWay(model, repack)
    with session(ARENA, tmp_path, model, own_way, weights) as (transfer, _, rank):
        for seed in range(3):
            put(weights, seed)
            transfer.push(weights)
        assert own_way.reloads == 3
        assert "another form than they come in" in rank.plan


def test_a_tensor_made_from_weights_beside_the_parameters_keeps_the_own_way(tmp_path):
    model, weights = FusedModel(), checkpoint(0)
    model.absorbed = torch.zeros(64, 64)  # as MLA's
    own_way = OwnWay(model)
    with session(ARENA, tmp_path, model, own_way, weights) as (transfer, _, rank):
        transfer.push(weights)
        transfer.push(weights)
        assert own_way.reloads == 2 and "absorbed may be made from weights" in rank.plan


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m.norm.data.add_(m.staged["norm.weight"]), "computes norm"),
        (lambda m: m.norm.data.copy_(m.staged["norm.weight"] + 1), "computes norm"),
        (lambda m: m.norm.data.fill_(m.staged["norm.weight"][0].item()), "reads the value"),
        (lambda m: m.norm.data.copy_(m.staged["norm.weight"].mul_(2)), "changes a weight that it is given"),
        (lambda m: m.norm.data[:4].copy_(m.staged["norm.weight"][:4]), "does not write all of norm"),
        (lambda m: setattr(m.norm, "data", m.staged["norm.weight"]), "gives norm other memory"),
        (lambda m: setattr(m, "norm", torch.nn.Parameter(m.staged["norm.weight"].clone())), "makes norm anew"),
        (lambda m: m.register_parameter("bias", torch.nn.Parameter(m.staged["norm.weight"] * 1)), "makes bias anew"),
        (lambda m: m.register_buffer("scale", m.staged["norm.weight"]), "makes scale anew"),
        (lambda m: setattr(m, "scale", m.staged["norm.weight"]), "makes scale anew"),
        (lambda m: [m.norm.data[s].copy_(m.staged["norm.weight"][s]) for s in (slice(0, 5), slice(4, 8))], "twice"),
    ],
)
def test_a_loader_that_does_more_than_copy_is_refused_with_the_reason(change, why):
    staged = checkpoint(0)
    model = FusedModel()
    model.register_parameter("bias", None)
    held = dict(model.named_parameters())
    before = {name: parameter.clone() for name, parameter in held.items()}
    others = [(name, tensor) for name, tensor in staged.items() if name != "norm.weight"]

    def load():
        model.load_weights(others)
        model.staged = staged
        change(model)

    with pytest.raises(Unsupported, match=why):
        record(model, load, staged.values())
    assert all(torch.equal(parameter, before[name]) for name, parameter in held.items()), "nothing is written"
    assert dict(model.named_parameters()) == held and not hasattr(model, "scale"), "nor made anew"
    assert model.bias is None


def test_a_parameter_that_vllms_loader_adds_is_still_there_after_its_reloading(monkeypatch):
    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
            self.register_parameter("bias", None)

        def load_weights(self, pairs):
            given = dict(pairs)
            self.bias = torch.nn.Parameter(given["bias"].clone(), requires_grad=False)
            self.weight.data.copy_(given["weight"])

    class Layerwise:  # as vLLM 0.32's: every parameter is deleted, and those that were there before are put back
        def initialize_layerwise_reload(self, model):
            self.held = {name: parameter for name, parameter in model._parameters.items() if parameter is not None}

        def finalize_layerwise_reload(self, model, _):
            for name, loaded in [*model.named_parameters()]:
                delattr(model, name)
                if name in self.held:
                    model.register_parameter(name, self.held[name])
                    self.held[name].data.copy_(loaded)

    monkeypatch.setitem(sys.modules, "vllm.model_executor.model_loader.reload", Layerwise())
    model = Head()
    held = model.weight
    for value in (1.0, 2.0):
        pairs = {"weight": torch.full((2,), value), "bias": torch.full((2,), value)}
        LayerwiseWay(model, torch.device("cpu")).reload(pairs.items())
        assert model.weight is held and model.weight.tolist() == model.bias.tolist() == [value] * 2


def test_recording_writes_nothing_and_finds_every_copy():
    staged, model = checkpoint(0), FusedModel()
    found = record(model, lambda: model.load_weights(staged.items()), staged.values())
    assert all(bool((parameter == 7).all()) for parameter in model.parameters())
    assert len(found.copies) == 5 and len(found.constants) == 1


def test_a_loader_that_moves_weights_to_its_device_first_is_recorded_as_one_that_copies_them():
    staged, model, move = checkpoint(0), FusedModel(), torch.ops.aten._to_copy
    found = record(model, lambda: model.load_weights((n, move(t)) for n, t in staged.items()), staged.values())
    assert len(found.copies) == 5
    with pytest.raises(Unsupported, match="computes"):
        wider = lambda: model.load_weights((n, move(t, dtype=torch.float64)) for n, t in staged.items())  # noqa: E731
        record(model, wider, staged.values())


def test_weights_that_are_not_finite_never_reach_the_model(tmp_path):
    model, weights = FusedModel(), checkpoint(0)
    with session(ARENA, tmp_path, model, weights=weights) as (transfer, receiver, _):
        transfer.push(weights)
        weights["norm.weight"][3] = torch.nan
        with pytest.raises(TransferError, match="not finite"):
            transfer.push(weights)
        assert same(model, 0) and receiver.version == 0


def test_copies_that_no_kernel_sees_are_looked_at_where_nobody_has():
    staged, model = checkpoint(0), FusedModel()
    described = Described(Manifest.of(staged))
    load = partial(model.load_weights, [("head.weight", None), *described.tensors.items()])
    found = record(model, load, described.tensors.values())
    replay = Replay(found, described, staged, torch.device("cpu"))
    assert replay.run(with_digest=False, unchecked=True) == (None, True)
    staged["o.weight"][2, 4] = torch.inf
    assert replay.run(with_digest=False, unchecked=True) == (None, False)
    assert replay.run(with_digest=False, unchecked=False) == (None, True), "somebody has looked before"


def as_ranks_hold(weights, ranks):
    """Slots of so many ranks with these weights, what a worker is told of them, and how they are written."""
    manifest = Manifest.of(weights)
    slots = [Slots() for _ in range(ranks)]
    for rank, of_rank in enumerate(slots):
        of_rank.allocate(local(manifest, ranks, rank, ["norm.weight"]), {}, 2)

    def write(slot, seed):
        for name, tensor in checkpoint(seed).items():
            for rank, of_rank in enumerate(slots):
                if name in of_rank.views[slot]:
                    first, end = rows_of(len(tensor), ranks, rank) if name != "norm.weight" else (0, 8 * (rank == 0))
                    of_rank.views[slot][name].copy_(tensor[first:end])

    endpoint = {"backend": "ipc", "staging": "arena", "take": "copy", "socket": slots[0].socket}
    where = {"slots": 2, "ranks": ranks, "whole": ["norm.weight"]}
    return slots, {**endpoint, "sockets": [each.socket for each in slots]}, where, write


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_rows_that_lie_with_several_ranks_are_put_together_for_the_loader_once_and_then_copied_from_there(ranks):
    model, weights = FusedModel(), checkpoint(0)
    own_way = OwnWay(model)
    slots, endpoint, where, write = as_ranks_hold(weights, ranks)
    rank = RankWeights(model, torch.device("cpu"), own_way)
    rank.prepare(endpoint, Manifest.of(weights).to_json(), where)
    for seed in range(4):
        write(seed % 2, seed)
        digest = digest_of(checkpoint(seed)[entry.name] for entry in Manifest.of(checkpoint(seed)).entries)
        assert rank.digest(seed, {"slot": seed % 2}, digest) == digest
        assert rank.copy(seed, {"slot": seed % 2}, False) == {"digest": None, "finite": True, "still": True}
        assert same(model, seed)
        assert rank.live_digest(seed, {"slot": seed % 2}, digest) == digest
    assert own_way.reloads == 1 and "copies by torch" in rank.plan
    model.norm.data[0] += 1
    with pytest.raises(ValueError, match="does not hold what was copied"):
        rank.live_digest(3, {"slot": 1}, digest)
    rank.close()
    for each in slots:
        each.close()


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_ranks_of_an_engine_share_the_sums_of_a_digest_and_the_first_alone_reads_for_another_kind(ranks, count):
    weights = checkpoint(0)
    manifest = Manifest.of(weights)
    slots, endpoint, where, write = as_ranks_hold(weights, ranks)
    write(1, 5)
    engine = [RankWeights(FusedModel(), torch.device("cpu"), None, number, count) for number in range(count)]
    for rank in engine:
        rank.prepare(endpoint, manifest.to_json(), where)
    landing = RemoteLanding(manifest, torch.device("cpu"), Ranks(rpc_of(engine)))
    memory = torch.cat([_bytes_of(of_rank.views[1], manifest, ranks, number) for number, of_rank in enumerate(slots)])
    staged = {"version": 0, "where": {"slot": 1}}
    assert landing.digest(staged, "sums:") == sums_of([memory])
    digest = digest_of(checkpoint(5)[entry.name] for entry in manifest.entries)
    assert landing.digest(staged, digest) == digest
    assert [rank.digest(**staged, like=digest) for rank in engine] == [digest] + [""] * (count - 1)
    for each in [*engine, *slots]:
        each.close()


def _bytes_of(views, manifest, ranks, number):
    """A rank's slot, from its first byte to its last."""
    layout = local(manifest, ranks, number, ["norm.weight"])
    block = torch.zeros(slot_bytes(layout), dtype=torch.uint8)
    for name, view in views_of(block, layout).items():
        view.copy_(views[name])
    return block


def test_rows_of_a_rank_that_are_not_finite_are_not_given_to_the_loader():
    model, weights = FusedModel(), checkpoint(0)
    slots, endpoint, where, write = as_ranks_hold(weights, 2)
    rank = RankWeights(model, torch.device("cpu"), OwnWay(model))
    rank.prepare(endpoint, Manifest.of(weights).to_json(), where)
    write(0, 0)
    slots[1].views[0]["q.weight"][0] = torch.nan
    assert not rank.copy(0, {"slot": 0}, False)["finite"]
    assert all(bool((parameter == 7).all()) for parameter in model.parameters())
    for each in slots:
        each.close()


def test_a_rank_that_fails_in_the_middle_of_a_copy_serves_nothing_until_an_update_succeeds(tmp_path):
    model, weights = FusedModel(), checkpoint(0)
    with session(ARENA, tmp_path, model, weights=weights) as (transfer, receiver, rank):
        transfer.push(weights)
        copy = rank.copy

        def broken(**body):
            copy(**body)
            raise RuntimeError("the GPU has fallen off the bus")

        rank.copy = broken
        put(weights, 1)
        with pytest.raises(TransferError, match="fallen off the bus"):
            transfer.push(weights)
        assert receiver.phase is Phase.QUARANTINED and receiver.version is None
        rank.copy = copy
        transfer.push(weights)
        assert same(model, 1) and receiver.phase is Phase.READY


def test_weights_that_do_not_fit_are_refused_before_any_byte_moves(tmp_path):
    with pytest.raises(ValueError, match=r"shape: .*norm.weight"):
        weights = checkpoint(0)
        with make_transfer(ARENA, tmp_path) as transfer:
            ranks = Ranks(rpc_of([]))
            other = {**checkpoint(0), "norm.weight": torch.zeros(9)}
            landing = RemoteLanding(Manifest.of(other), torch.device("cpu"), ranks)
            receiver = Receiver(RemoteIntake(transfer.endpoint, ranks), landing, Journal())
            transfer.open(weights, [DirectSender(receiver, "worker 0")])


def test_views_are_refused_because_addresses_must_stay(tmp_path):
    model = FusedModel()
    rank = RankWeights(model, torch.device("cpu"), OwnWay(model))
    with (
        make_transfer(IpcConfig(sender=SENDER), tmp_path) as transfer,
        pytest.raises(ValueError, match="take must be copy"),
    ):
        rank.prepare(transfer.endpoint, Manifest.of(plain(0)).to_json(), {})


def test_the_plugin_compares_live_weights_after_it_has_copied_them(tmp_path):
    from transfer.backends.arena import LivePublisher

    model, weights = FusedModel(), checkpoint(0)
    engine = RlhfIpcEngine("config", "parallel", model)
    engine._rank = RankWeights(model, torch.device("cpu"), OwnWay(model))
    publisher = LivePublisher(LIVE)
    try:
        where = publisher.prepare(Manifest.of(weights), weights)
        told = {"endpoint": publisher.endpoint, "manifest": Manifest.of(weights).to_json(), "where": where}
        engine.init_transfer_engine(engine.parse_init_info(told))
        for version in range(2):
            put(weights, version)
            slot, digest = publisher.write(version, weights, (), True)
            engine.receive_weights(engine.parse_update_info({"version": version, "where": slot, "digest": digest}))
            assert same(model, version)
        put(weights, 2)  # after the digest was taken
        with pytest.raises(ValueError, match="the copied weights have the digest"):
            engine.receive_weights(engine.parse_update_info({"version": 2, "where": slot, "digest": digest}))
        with pytest.raises(RuntimeError, match="torn"):
            engine.finish_weight_update()
    finally:
        engine.shutdown()
        publisher.close()


class Config:
    parallel_config = "tensor parallel"
    model_config = "model"


@pytest.mark.parametrize("later", [False, True], ids=["0.24", "later"])
def test_the_plugin_takes_updates_in_both_of_vllms_forms(later, tmp_path):
    from transfer.backends.arena import ArenaPublisher

    model, weights = FusedModel(), checkpoint(0)
    engine = (
        RlhfIpcEngine("config", Config(), torch.device("cpu"), model)
        if later
        else RlhfIpcEngine("config", "parallel", model)
    )
    engine._rank = RankWeights(model, torch.device("cpu"), OwnWay(model))
    manifest = Manifest.of(weights)
    publisher = ArenaPublisher(ARENA)
    try:
        where = publisher.prepare(manifest, weights)
        told = {"endpoint": publisher.endpoint, "manifest": manifest.to_json(), "where": where}
        engine.init_transfer_engine(engine.parse_init_info(told))
        for version in range(3):
            put(weights, version)
            slot, digest = publisher.write(version, weights, (), True)
            info = {"version": version, "where": slot, "digest": digest}
            with torch.device("meta"):  # vLLM's worker has set its GPU as the device of whatever is made without one
                if later:
                    engine.start_weight_update()
                    engine.update_weights(info)
                    engine.finish_weight_update()
                else:
                    parsed = engine.parse_update_info(info)
                    assert parsed.update_kind == "dense"
                    engine.receive_weights(parsed, load_weights=model.load_weights)
            assert same(model, version)
        with pytest.raises(ValueError, match="older than the live 2"):
            engine.receive_weights(engine.parse_update_info({"version": 1, "where": slot}))
        with pytest.raises(ValueError, match="the staged weights have the digest"):
            wrong = digest_of([torch.ones(3)])
            engine.receive_weights(engine.parse_update_info({"version": 3, "where": slot, "digest": wrong}))
        assert same(model, 2)
        engine.finish_weight_update()
        with pytest.raises(ValueError, match="shared memory alone"):
            engine.init_transfer_engine(
                engine.parse_init_info({**told, "endpoint": {"backend": "disk", "folder": "/etc"}})
            )
        engine.init_transfer_engine(engine.parse_init_info(told))  # another trainer, which begins at 0
        engine.receive_weights(engine.parse_update_info({"version": 0, "where": slot, "digest": digest}))
        assert same(model, 2)
    finally:
        engine.shutdown()
        publisher.close()
