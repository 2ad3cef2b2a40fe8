"""Unmodified vLLM servers of each dialect, as vllm_fake.py has them, get whole versions or stay paused."""

import base64
import pickle
import threading
import time
from contextlib import ExitStack

import pytest
import torch
from vllm_fake import DIES, DIES_AFTER, HANGS, IS_LATE, RESTARTS, FakeVllm

from transfer.agreement.wire import RemoteError, TransferError
from transfer.config import InFlight
from transfer.engine.handles import Exporter
from transfer.engine.inert_pickle import loads
from transfer.vllm import stock_payload, stock_server
from transfer.vllm.stock import Dialect, StockIpc, StockServer, UpdatePolicy, update

OLD, NEW, NEWEST = "0.24.0", "0.32.0", "0.33.1"
STEPS = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
WHOLE = ["/pause", *STEPS, "/resume"]
ASKED = {"prompt": [[1, 2], [3]], "seeds": [5, 2**63 + 6], "n": 2, "max_tokens": 6, "temperature": 1.0}
ASKED |= {"stop_token_ids": [49], "logprobs": 0, "return_token_ids": True}


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(4, 6, generator=generator)
    return {
        "plain": torch.randn(30, 7, generator=generator),
        "half": torch.randn(5, 5, generator=generator).bfloat16(),
        "odd": torch.arange(13, dtype=torch.uint8) + seed,
        "after odd": torch.randn(3, generator=generator, dtype=torch.float64),
        "transposed": torch.randn(6, 4, generator=generator).t(),
        "scalar": torch.tensor(0.5 + seed),
        "empty": torch.empty(0, 3),
        "tied": shared,
        "tied too": shared,
        "leaf": torch.nn.Parameter(torch.randn(4, generator=generator)),
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name].detach()) for name in one)


@pytest.fixture
def serve():
    """`serve("0.24.0") -> (fake, opened client)`, with a short deadline for one route; none serves a mixture."""
    with ExitStack() as stack:

        def served(version=NEWEST, *, opened=True, impatient="", payload=None, policy=None, **fake_arguments):
            fake = stack.enter_context(FakeVllm(version, weights=weights(), **fake_arguments))
            server = StockServer(fake.url, 30.0, payload, policy or UpdatePolicy())
            ask = server.routes._ask
            server.routes._ask = lambda method, path, body, timeout_s: ask(
                method, path, body, 0.3 if impatient and path.startswith(impatient) else timeout_s
            )
            stack.callback(lambda: check(fake))
            stack.callback(server.close)
            if opened:
                server.open(weights())
                fake.calls.clear()
            return fake, server

        yield served


def check(fake):
    assert not fake.served_mixture


@pytest.fixture(params=[OLD, NEW, NEWEST])
def version(request):
    return request.param


# --- agreement --------------------------------------------------------------------------------------------------------


def test_the_dialect_is_found_out(serve, version):
    _, server = serve(version)
    assert server.dialect is (Dialect.v24 if version == OLD else Dialect.v33)


def test_opening_says_to_each_dialect_what_it_knows(serve, version):
    fake, server = serve(version, opened=False)
    server.open(weights())
    assert fake.body("/init_weight_transfer_engine") == {"init_info": {} if version == OLD else {"packed": False}}
    assert ("GET", "/get_world_size?include_dp=true", None) in fake.calls


@pytest.mark.parametrize("unknown", ["0.28.1", "dev", "1.0"])
def test_a_server_of_an_unknown_dialect_is_refused_with_what_it_says(serve, unknown):
    fake, server = serve(unknown, opened=False)
    fake.old = True
    if unknown != "0.28.1":  # neither does its version tell, nor /weight_info
        fake.faults["/weight_info"] = 404
    with pytest.raises(TransferError, match=f"which dialect .*/weight_info answers 404, /version says {unknown}"):
        server.open(weights())
    assert fake.paths() == []


def test_a_version_that_contradicts_the_routes_is_refused(serve):
    fake, server = serve(NEWEST, opened=False)
    fake.version = "0.24.0"
    with pytest.raises(TransferError, match=r"/weight_info answers 200, /version says 0\.24\.0"):
        server.open(weights())


def test_a_server_without_the_routes_for_developers_is_told_how_to_get_them(serve, version):
    _, server = serve(version, opened=False, dev_mode=False)
    with pytest.raises(TransferError, match="VLLM_SERVER_DEV_MODE=1"):
        server.open(weights())


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(TransferError, match=r"vLLM \(http://127\.0\.0\.1:9\): health: no connection"):
        StockServer("http://127.0.0.1:9").open(weights())


def test_a_server_without_weight_transfer_says_so_at_opening(serve, version):
    _, server = serve(version, opened=False, backend=None)
    with pytest.raises(TransferError, match=r"init_weight_transfer_engine: .*Weight transfer not configured"):
        server.open(weights())


def test_a_server_with_more_ranks_than_handles_is_refused_at_opening(serve):
    fake, server = serve(opened=False, world_size=2)
    with pytest.raises(TransferError, match=r"2 ranks, handles would be made for 1: StockIpc\(gpus="):
        server.open(weights())
    assert fake.paths() == []
    with pytest.raises(ValueError, match="different ones"):
        StockIpc(gpus=[0, 0])


# --- updates ----------------------------------------------------------------------------------------------------------


def test_an_update_brings_every_byte_in_one_pass_through_the_routes(serve, version):
    fake, server = serve(version)
    update([server], weights(1).items(), 1)
    assert same(fake.weights, weights(1))
    assert fake.paths() == WHOLE and not fake.paused and not fake.mixture
    assert server.version == 1
    update([server], weights(2).items(), 2)
    assert same(fake.weights, weights(2))


def test_the_messages_of_an_update_are_exactly_those_of_the_dialect(serve, version):
    fake, server = serve(version)
    update([server], weights(1).items(), 42)
    assert fake.calls[0] == ("GET", "/is_sleeping", None)
    assert fake.calls[1] == ("POST", "/pause?mode=abort&clear_cache=true", None)
    assert fake.body("/start_weight_update") == ({"is_checkpoint_format": True} if version == OLD else None)
    assert fake.body("/finish_weight_update") == (None if version == OLD else {"weight_version": "42"})
    assert fake.body("/resume") is None
    message = fake.body("/update_weights")
    assert list(message) == ["update_info"]
    info = message["update_info"]
    assert list(info) == ["names", "dtype_names", "shapes", "ipc_handles_pickled"]
    assert info["names"] == list(weights())
    assert info["dtype_names"][:3] == ["float32", "bfloat16", "uint8"]
    assert info["shapes"][:1] == [[30, 7]] and info["shapes"][5:7] == [[], [0, 3]]
    raw = base64.b64decode(info["ipc_handles_pickled"], validate=True)
    handles = pickle.loads(raw)  # noqa: S301 - as vLLM reads it; it is our own
    assert handles == loads(raw)
    assert [list(map(type, handle)) for handle in handles] == [[str]] * len(weights())


@pytest.mark.parametrize("in_flight", InFlight)
def test_the_policy_decides_how_it_is_paused(serve, in_flight):
    fake, server = serve(policy=UpdatePolicy(in_flight=in_flight, clear_cache=False))
    update([server], weights(1).items(), 1)
    assert ("POST", f"/pause?mode={in_flight.value}&clear_cache=false", None) in fake.calls


def changed(**tensors):
    return {name: tensor for name, tensor in (weights(1) | tensors).items() if tensor is not None}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (changed(plain=None), "missing: plain"),
        (changed(surprise=torch.ones(2)), "unexpected: surprise"),
        (changed(plain=torch.ones(30, 8)), r"shape: plain is \(30, 8\), not \(30, 7\)"),
        (changed(plain=torch.ones(30, 7).half()), "dtype: plain is float16, not float32"),
        (changed(half=torch.full((5, 5), float("nan")).bfloat16()), "half has values that are not finite"),
        (changed(leaf=torch.full((4,), float("-inf"))), "leaf has values that are not finite"),
        (changed(plain=torch.ones(30, 7).to_sparse()), "plain"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_the_server_is_told_anything(serve, wrong, reason):
    fake, server = serve()
    with pytest.raises(TransferError, match=reason):
        update([server], wrong.items(), 1)
    assert fake.calls == []
    update([server], weights(1).items(), 1)


def test_a_name_that_comes_twice_is_refused(serve):
    fake, server = serve()
    with pytest.raises(TransferError, match="plain comes twice"):
        update([server], [*weights().items(), ("plain", torch.ones(30, 7))], 1)
    assert fake.calls == []


def test_values_are_not_looked_at_where_the_policy_says_so(serve):
    fake, server = serve(policy=UpdatePolicy(finite=False))
    update([server], changed(leaf=torch.full((4,), float("inf"))).items(), 1)
    assert fake.weights["leaf"].isinf().all()


def test_another_backend_has_words_of_its_own(serve, version):
    class Ours:
        reloads = True

        def init_info(self, dialect, world_size):
            return {"dialect": dialect.value, "ranks": world_size}

        def update_info(self, weights, version):
            return {"version": version, "where": {"tensors": len(weights)}}

        def release(self):
            released.append(True)

    released = []
    fake, server = serve(version, backend="rlhf_ipc", payload=Ours(), world_size=2)
    update([server], weights(1).items(), 7)
    assert fake.infos[0] == {"dialect": server.dialect.value, "ranks": 2}
    assert fake.infos[1] == {"version": 7, "where": {"tensors": len(weights())}}
    assert released and fake.paths() == WHOLE


def test_weights_on_several_gpus_are_refused_unless_each_ranks_gpu_is_named(serve, monkeypatch):
    class OnTwoGpus(Exporter):
        def add(self, name, tensor, receivers=1):
            return [
                {f"GPU {name == 'odd'}": fields} for handle in super().add(name, tensor) for fields in handle.values()
            ]

    monkeypatch.setattr(stock_payload, "Exporter", OnTwoGpus)
    fake, server = serve()
    with pytest.raises(TransferError, match="on 2 GPUs: name one a rank"):
        update([server], weights(1).items(), 1)
    assert fake.calls == []


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_a_server_that_fails_in_a_step_is_kept_paused_until_an_update_succeeds(serve, version, step):
    fake, server = serve(version)
    update([server], weights(1).items(), 1)
    fake.calls.clear()
    fake.faults[step] = 500
    with pytest.raises(TransferError) as failure:
        update([server], weights(2).items(), 2)
    said = str(failure.value)
    assert server.name in said and f"{step[1:]}: planted in {step} (status 500)" in said and "version 2" in said
    assert "kept paused" in said
    assert fake.paused and "/resume" not in fake.paths()
    with pytest.raises(TransferError, match=f"stays paused: {step[1:]} of version 2 failed"):
        server.resume()
    with pytest.raises(RemoteError, match="503"):
        server.complete(ASKED)
    assert fake.paths() == WHOLE[: 2 + STEPS.index(step)]
    if step == STEPS[2]:  # vLLM never ends an update that it could not finish
        with pytest.raises(TransferError, match=r"already active.*kept paused"):
            update([server], weights(3).items(), 3)
        assert fake.paused
        fake.updating = False
    update([server], weights(3).items(), 3)
    assert not fake.paused and same(fake.weights, weights(3))
    assert server.complete(ASKED)["choices"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("fault", [HANGS, IS_LATE])
def test_a_step_that_is_not_answered_in_time_is_not_repeated(serve, step, fault):
    fake, server = serve(OLD, impatient=step)
    fake.faults[step] = fault
    with pytest.raises(TransferError, match=rf"{step[1:]}: no answer within 0\.3 s; it is kept paused"):
        update([server], weights(1).items(), 1)
    assert fake.paths() == WHOLE[: 2 + STEPS.index(step)]
    assert fake.paused


def test_a_finish_whose_answer_is_lost_counts_where_the_server_says_the_version(serve):
    fake, server = serve(NEWEST, impatient="/finish_weight_update")
    fake.faults["/finish_weight_update"] = IS_LATE
    update([server], weights(1).items(), 1)
    assert server.version == 1 and not fake.paused and fake.paths() == WHOLE
    fake.faults["/finish_weight_update"] = HANGS
    with pytest.raises(TransferError, match="finish_weight_update: no answer"):
        update([server], weights(2).items(), 2)
    assert fake.paused and server.broken


def test_a_label_that_the_server_had_before_proves_nothing(serve):
    fake, server = serve(NEWEST, impatient="/finish_weight_update")
    update([server], weights(1).items(), 1)
    fake.faults["/finish_weight_update"] = HANGS
    with pytest.raises(TransferError, match="finish_weight_update: no answer"):
        update([server], weights(2).items(), 1)
    assert fake.paused


@pytest.mark.parametrize("step", ["/pause", *STEPS])
@pytest.mark.parametrize("fault", [DIES, DIES_AFTER])
def test_a_server_that_dies_in_a_step_ends_the_update_with_its_name(serve, step, fault):
    fake, server = serve()
    fake.faults[step] = fault
    with pytest.raises(TransferError, match=rf"vLLM \(.*{step[1:]}: (the connection|no connection)"):
        update([server], weights(1).items(), 1)
    assert fake.dead and server.version is None
    with pytest.raises(RemoteError, match="503"):
        server.complete(ASKED)


def test_a_server_that_was_started_anew_in_mid_update_is_paused_again(serve):
    fake, server = serve()
    fake.faults["/start_weight_update"] = RESTARTS
    with pytest.raises(TransferError, match=r"start_weight_update must be called before.* it is kept paused"):
        update([server], weights(1).items(), 1)
    assert fake.paused and fake.paths()[-1] == "/pause"


@pytest.mark.parametrize("fault", [HANGS, IS_LATE, 500])
def test_a_pause_that_fails_leaves_the_server_sampling_its_old_weights(serve, fault):
    fake, server = serve(impatient="/pause")
    update([server], weights(1).items(), 1)
    fake.calls.clear()
    fake.faults["/pause"] = fault
    with pytest.raises(TransferError, match="version 2: pause failed"):
        update([server], weights(2).items(), 2)
    assert not fake.paused and not set(STEPS) & set(fake.paths())
    assert same(fake.weights, weights(1)) and server.complete(ASKED)["choices"]


def test_a_resume_is_asked_about_before_it_counts_as_failed(serve):
    fake, server = serve(impatient="/resume")
    fake.faults["/resume"] = IS_LATE
    update([server], weights(1).items(), 1)
    fake.faults["/resume"] = HANGS
    with pytest.raises(TransferError, match="its weights are whole, version 2: resume it"):
        update([server], weights(2).items(), 2)
    assert server.version == 2 and fake.paths().count("/resume") == 2
    server.resume()
    assert not fake.paused


def test_pickled_handles_that_the_server_does_not_allow_leave_it_paused(serve, version):
    fake, server = serve(version, insecure=False)
    with pytest.raises(TransferError, match=r"VLLM_ALLOW_INSECURE_SERIALIZATION=1.*kept paused"):
        update([server], weights(1).items(), 1)
    assert fake.paused


def test_a_server_in_somebody_elses_update_is_not_resumed(serve, version):
    fake, server = serve(version)
    fake.updating = fake.mixture = True
    with pytest.raises(TransferError, match="already active"):
        update([server], weights(1).items(), 1)
    assert fake.paused and "/update_weights" not in fake.paths()


def test_the_questions_after_a_failure_have_a_deadline_of_their_own(serve, monkeypatch):
    monkeypatch.setattr(stock_server, "ASK_S", 0.3)
    fake, server = serve(impatient="/start_weight_update")
    fake.faults |= {"/start_weight_update": HANGS, "/is_paused": HANGS}
    with pytest.raises(TransferError, match="does not say whether it is paused"):
        update([server], weights(1).items(), 1)


# --- asleep, or paused by others --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fell", ["asleep", "paused"])
def test_a_server_that_sleeps_or_was_paused_by_others_is_not_updated(serve, version, fell):
    fake, server = serve(version)
    setattr(fake, fell, {"weights", "kv_cache"} if fell == "asleep" else True)
    with pytest.raises(TransferError, match=r"it sleeps, or others have paused it.*POST /wake_up"):
        update([server], weights(1).items(), 1)
    assert fake.paths() == [] and not fake.dead
    with pytest.raises(TransferError, match="it sleeps, or others have paused it"):
        StockServer(fake.url).open(weights())


def test_an_update_of_a_sleeping_server_would_kill_it(serve):
    fake, server = serve()
    fake.asleep = {"weights"}
    server.start()
    with pytest.raises(RemoteError, match="connection"):
        server.send({"names": []})
    assert fake.dead


def test_a_server_that_an_earlier_trainer_left_paused_is_taken_over_by_a_whole_update(serve, version):
    fake, first = serve(version)
    fake.faults["/update_weights"] = 500
    with pytest.raises(TransferError):
        update([first], weights(1).items(), 1)
    second = StockServer(fake.url, policy=UpdatePolicy(found_paused=True))
    second.open(weights())
    with pytest.raises(TransferError, match="stays paused: an earlier trainer"):
        second.resume()
    update([second], weights(2).items(), 2)
    assert not fake.paused and same(fake.weights, weights(2))
    second.close()


def test_weights_wake_up_are_updated_and_the_rest_wakes_up(serve, version):
    fake, server = serve(version)
    server.sleep(level=2)
    with pytest.raises(TransferError, match="its weights are asleep"):
        update([server], weights(1).items(), 1)
    with pytest.raises(TransferError, match="would resume it, and sleep"):
        server.wake_up()
    server.wake_up(["weights"])
    fake.calls.clear()
    update([server], weights(1).items(), 1)
    assert fake.paths() == STEPS and fake.paused  # it is stopped until the cache is there
    server.wake_up(["kv_cache"])
    assert not fake.paused and not fake.asleep
    assert server.complete(ASKED)["choices"]
    update([server], weights(2).items(), 2)
    assert not fake.paused


def test_a_light_sleep_keeps_the_weights(serve, version):
    fake, server = serve(version)
    update([server], weights(1).items(), 1)
    server.sleep(level=1)
    server.wake_up()
    assert not fake.paused and server.version == 1 and server.complete(ASKED)["choices"]


def test_a_server_that_failed_in_an_update_is_not_woken_into_sampling(serve):
    fake, server = serve()
    fake.faults["/update_weights"] = 500
    with pytest.raises(TransferError):
        update([server], weights(1).items(), 1)
    with pytest.raises(TransferError, match="would resume it"):
        server.wake_up()
    assert fake.paused


def test_the_prefix_cache_is_reset_or_that_fails(serve, version):
    fake, server = serve(version)
    server.reset_prefix_cache()
    assert fake.paths() == ["/reset_prefix_cache"]
    fake.updating = True
    if version != OLD:
        with pytest.raises(TransferError, match="prefix cache is in use"):
            server.reset_prefix_cache()


# --- several servers --------------------------------------------------------------------------------------------------


def test_several_servers_of_both_dialects_get_one_version_together(serve):
    fakes, servers = zip(*[serve(version) for version in (OLD, NEW, NEWEST)], strict=True)
    update(servers, weights(1).items(), 1)
    assert all(same(fake.weights, weights(1)) and not fake.paused for fake in fakes)
    assert [server.version for server in servers] == [1, 1, 1]


def test_if_one_of_several_fails_all_wait_and_the_next_update_resumes_them(serve):
    (good, one), (bad, other) = serve(), serve(OLD)
    bad.faults["/update_weights"] = 500
    with pytest.raises(TransferError, match=rf"{bad.url}.*kept paused.*{good.url}\) has it and is kept paused, too"):
        update([one, other], weights(1).items(), 1)
    assert good.paused and bad.paused and not good.mixture and "/finish_weight_update" not in bad.paths()
    for server in (one, other):
        with pytest.raises(TransferError, match="stays paused"):
            server.resume()
        with pytest.raises(RemoteError, match="503"):
            server.complete(ASKED)
    update([one, other], weights(2).items(), 2)
    assert not good.paused and not bad.paused and same(good.weights, bad.weights)


def test_if_one_of_several_cannot_be_paused_the_others_go_on(serve):
    (good, one), (bad, other) = serve(), serve()
    bad.asleep = {"weights"}
    with pytest.raises(TransferError, match=bad.url):
        update([one, other], weights(1).items(), 1)
    assert not good.paused and not set(STEPS) & {*good.paths(), *bad.paths()}


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_completions_come_as_our_own_worker_gives_them(serve, version):
    _, server = serve(version)
    update([server], weights(1).items(), 1)
    choices = server.complete(ASKED)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    for choice in choices:
        ids = choice["token_ids"]
        assert choice["weight_versions"] == [[1, len(ids)]]
        assert len(choice["logprobs"]["token_logprobs"]) == len(ids)
        assert choice["finish_reason"] == ("stop" if ids[-1] == 49 else "length")
    assert server.complete(ASKED)["choices"] == choices
    first = server.complete({**ASKED, "prompt": ASKED["prompt"][:1], "seeds": ASKED["seeds"][:1]})["choices"]
    assert first == choices[:2] and choices[0] != choices[1]


def test_a_completion_is_asked_for_without_the_servers_own_sampling_defaults(serve):
    fake, server = serve()
    update([server], weights(1).items(), 1)
    fake.calls.clear()
    server.complete({**ASKED, "prompt": [[1, 2]], "seeds": [2**63 + 6]})
    assert fake.body("/v1/completions") == {
        **{"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
        **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "ignore_eos": True},
        **{"prompt": [1, 2], "seed": 6, "n": 2, "max_tokens": 6, "temperature": 1.0, "stop_token_ids": [49]},
        **{"logprobs": 0, "return_token_ids": True},
    }


def test_what_is_cut_off_is_asked_for_in_place_of_the_whole_distribution(serve):
    fake, server = serve()
    update([server], weights(1).items(), 1)
    fake.calls.clear()
    server.complete({**ASKED, "prompt": [[1, 2]], "seeds": [6], "top_p": 0.9, "min_p": 0.1})
    asked = fake.body("/v1/completions")
    assert (asked["top_p"], asked["top_k"], asked["min_p"]) == (0.9, 0, 0.1)


def test_greedy_samples_are_taken_once_and_given_n_times(serve, version):
    fake, server = serve(version)
    update([server], weights(1).items(), 1)
    fake.calls.clear()
    choices = server.complete({**ASKED, "temperature": 0})["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3] and len(fake.paths()) == 2
    assert choices[0]["token_ids"] == choices[1]["token_ids"] != choices[2]["token_ids"]


def test_a_server_samples_nothing_before_a_version_has_arrived_unless_it_has_loaded_one(serve):
    fake, server = serve()
    with pytest.raises(RemoteError, match="no version of the weights has arrived yet") as failure:
        server.complete(ASKED)
    assert failure.value.status == 503 and fake.paths() == []
    server.open(weights(), version=4)
    assert server.complete(ASKED)["choices"][0]["weight_versions"][0][0] == 4


def test_a_server_that_was_started_again_is_found_out_by_the_label_of_its_weights(serve):
    fake, server = serve()
    update([server], weights(1).items(), 1)
    fake.label = "default"
    with pytest.raises(RemoteError, match="its weights are called 'default', not '1'") as failure:
        server.complete(ASKED)
    assert failure.value.status == 503 and "/v1/completions" not in fake.paths()


def test_samples_during_which_the_version_changed_count_as_cut_short(serve):
    fake, server = serve(NEW, policy=UpdatePolicy(in_flight=InFlight.keep))
    update([server], weights(1).items(), 1)
    server.pause()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(server.complete(ASKED)))
    thread.start()
    while fake.paths().count("/v1/completions") < 2:
        time.sleep(0.01)
    update([server], weights(2).items(), 2)
    thread.join(10)
    assert {choice["finish_reason"] for choice in answers[0]["choices"]} == {"abort"}


@pytest.mark.parametrize(
    "nonsense", [{}, {"choices": []}, {"choices": [{"index": 0}, {"index": 1}]}, {"choices": "none"}]
)
def test_an_answer_that_makes_no_sense_is_refused(serve, monkeypatch, nonsense):
    _, server = serve()
    update([server], weights(1).items(), 1)
    monkeypatch.setattr(server.routes, "post", lambda *_: nonsense)
    with pytest.raises(RemoteError, match="the answer makes no sense"):
        server.complete(ASKED)


def test_what_vllm_refuses_about_a_completion_reaches_the_caller_in_its_words(serve):
    fake, server = serve()
    update([server], weights(1).items(), 1)
    fake.faults["/v1/completions"] = 400
    with pytest.raises(RemoteError, match=r"v1/completions: planted in /v1/completions \(status 400\)"):
        server.complete(ASKED)
