"""transfer.staging=live with transfer.take=view: the weights of workers are the trainer's own memory."""

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu_trainer import train, weights_of
from history import check
from worker_process import OddModel, PlainModel, fingerprint, in_process, plain, worker_processes

from transfer import make_receiver, make_transfer
from transfer.agreement import wire
from transfer.agreement.journal import Journal
from transfer.agreement.manifest import Manifest
from transfer.agreement.protocol import Phase
from transfer.backends.make import make_intake, make_publisher
from transfer.config import HttpSenderConfig, InFlight, IpcConfig, SenderConfig, Staging, Take, Verify
from transfer.memory.digest import digest_of
from transfer.trainer.senders.direct import DirectSender
from transfer.trainer.senders.http import HttpSender
from transfer.trainer.session import Session
from transfer.worker.plain_worker import PlainSpec
from transfer.worker.process import WorkerProcess

DIGEST, OFF, FULL = (
    IpcConfig(sender=HttpSenderConfig(timeout_s=20.0), staging=Staging.live, take=Take.view, verify=verify)
    for verify in (Verify.digest, Verify.off, Verify.full)
)
QUICK = IpcConfig(sender=SenderConfig(timeout_s=1.0), staging=Staging.live, take=Take.view)
OTHERS = [
    IpcConfig(sender=SenderConfig(timeout_s=20.0)),
    IpcConfig(sender=SenderConfig(timeout_s=20.0), staging=Staging.live, take=Take.copy),
]


class Worker:
    """A plain worker behind HTTP, and the way to talk to it."""

    def __init__(self, process, sender, url, token):
        self.process, self.sender, self.url, self.token = process, sender, url, token

    def holds(self):
        """Version and digest of what it serves."""
        return self.sender.call("completions", {})

    def refuses(self):
        """Whether it serves nothing, and says so."""
        try:
            self.holds()
        except wire.RemoteError as error:
            return error.status == 503 and "no weights to serve" in error.reason
        return False

    def phase(self):
        return self.sender.call("status", {})["phase"]

    def kill(self):
        os.kill(self.process.pid, 9)


@contextmanager
def http_workers(folder, endpoint, weights, count=2, restarts=0):
    """Plain workers behind HTTP, each a process of its own."""

    def connected(process):
        def again():
            return url() if process.restarted() else None

        def url():
            return f"http://127.0.0.1:{process.port(time.monotonic() + 60)}"

        first = url()
        sender = stack.enter_context(closing(HttpSender(first, token, process.name, 20.0, again)))
        return Worker(process, sender, first, token)

    token = secrets.token_hex(16)
    with ExitStack() as stack:
        started = []
        for index in range(count):
            spec = PlainSpec(
                manifest=Manifest.of(weights).to_json(),
                endpoint=dict(endpoint),
                token=token,
                journal=str(folder / f"worker-{index}.jsonl"),
            )
            log = folder / f"worker-{index}.log"
            process = WorkerProcess(f"worker {index}", "transfer.worker.plain_worker", spec.to_json(), log, restarts)
            started.append(stack.enter_context(process))
        yield [connected(process) for process in started]


@contextmanager
def over_http(folder, weights, config=DIGEST, count=2, restarts=0):
    """An open session to workers behind HTTP."""
    with (
        closing(Journal(folder / "trainer.jsonl")) as journal,
        make_transfer(config, folder, InFlight.wait, journal) as transfer,
        http_workers(folder, transfer.endpoint, weights, count, restarts) as them,
    ):
        transfer.open(weights, [worker.sender for worker in them])
        yield transfer, them


@contextmanager
def through_pipes(folder, policy, config=QUICK, count=2):
    """An open session to worker processes that can be told to fail."""
    with (
        make_transfer(config, folder) as transfer,
        worker_processes(transfer.endpoint, "plain", count, seed=99) as workers,
    ):
        transfer.open(policy.state_dict(keep_vars=True), workers)
        yield transfer, workers


def expected(weights):
    """The digest of the weights in the order of their manifest."""
    return digest_of(weights[entry.name] for entry in Manifest.of(weights).entries)


def learn(policy):
    """A gradient step, in place."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.5).add_(1)


def events(path, op):
    return [event for event in map(json.loads, path.read_text().splitlines()) if event["op"] == op]


# --- what is served, and when -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [DIGEST, OFF, FULL], ids=["digest", "off", "full"])
def test_workers_serve_the_trainers_weights_after_each_push_and_nothing_while_they_change(config, tmp_path):
    policy = OddModel(seed=1)
    weights = policy.state_dict(keep_vars=True)
    with over_http(tmp_path, weights, config) as (transfer, them):
        for version in range(4):
            assert transfer.push(weights) == version
            assert [worker.holds() for worker in them] == [{"version": version, "digest": expected(weights)}] * 2
            transfer.withdraw()
            assert all(worker.refuses() and worker.phase() == "quarantined" for worker in them)
            learn(policy)
            assert all(worker.refuses() for worker in them)
        assert transfer.last.bytes == 0
    assert check(tmp_path)["serve"] == 8
    assert [event["version"] for event in events(tmp_path / "worker-0.jsonl", "withdraw")] == [0, 1, 2, 3]
    assert [event["version"] for event in events(tmp_path / "trainer.jsonl", "withdraw")] == [0, 1, 2, 3]


def test_no_byte_is_copied_as_the_parameters_of_a_worker_in_another_process_are_the_trainers(tmp_path):
    policy = PlainModel(1)
    with through_pipes(tmp_path, policy) as (transfer, workers):
        transfer.push(policy.state_dict())
        transfer.withdraw()
        learn(policy)
        for worker in workers:
            seen = worker.peek()
            assert seen["version"] is None and seen["weights"] == fingerprint(policy.state_dict()), "without a push"
        values = fingerprint(policy.state_dict())
    assert fingerprint(policy.state_dict()) == values, "the parameters outlive the session"


def test_a_completion_that_runs_ends_before_the_weights_may_change(tmp_path):
    policy, module = PlainModel(1), PlainModel(0)
    began, done, order = threading.Event(), threading.Event(), []
    with in_process(DIGEST, tmp_path, module, policy.state_dict(keep_vars=True)) as (transfer, receiver):
        transfer.push(policy.state_dict())

        def complete():
            with receiver.serving() as turn:
                began.set()
                done.wait(20)
                order.append(turn())

        threads = [threading.Thread(target=complete), threading.Thread(target=transfer.withdraw)]
        threads[0].start()
        assert began.wait(20)
        threads[1].start()
        while not receiver._gate.wanted:
            time.sleep(0.01)
        order.append("withdraws")
        assert receiver.version == 0
        done.set()
        for thread in threads:
            thread.join(20)
        assert order == ["withdraws", 0] and receiver.version is None


def test_a_completion_that_does_not_end_in_time_keeps_the_weights_from_being_withdrawn(tmp_path):
    policy, module = PlainModel(1), PlainModel(0)
    with in_process(QUICK, tmp_path, module, policy.state_dict(keep_vars=True)) as (transfer, receiver):
        transfer.push(policy.state_dict())
        with receiver.serving() as turn:
            with pytest.raises(wire.TransferError, match="withdrawing version 0: completions are being generated"):
                transfer.withdraw()
            assert turn() == 0
        transfer.withdraw()
        assert receiver.version is None


# --- the order of things ----------------------------------------------------------------------------------------------


def test_a_push_without_a_withdrawal_since_the_last_one_is_refused_and_says_what_to_do(tmp_path):
    policy = PlainModel(1)
    with through_pipes(tmp_path, policy) as (transfer, workers):
        transfer.push(policy.state_dict())
        learn(policy)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"call withdraw\(\) before the weights are changed, then push\(\)"):
                transfer.push(policy.state_dict())
        transfer.withdraw()
        transfer.withdraw()
        assert transfer.push(policy.state_dict()) == 1
        assert [worker.peek()["weights"] for worker in workers] == [fingerprint(policy.state_dict())] * 2


@pytest.mark.parametrize("config", OTHERS, ids=["arena view", "live copy"])
def test_where_workers_have_memory_of_their_own_a_withdrawal_says_nothing_and_costs_nothing(config, tmp_path):
    policy = PlainModel(1)
    with through_pipes(tmp_path, policy, config) as (transfer, workers):
        transfer.push(policy.state_dict())
        said = [len(worker.log) for worker in workers]
        transfer.withdraw()
        assert [len(worker.log) for worker in workers] == said
        assert all(worker.peek()["version"] == 0 for worker in workers)
        assert transfer.push(policy.state_dict()) == 1


@pytest.mark.parametrize("config", [DIGEST, OFF], ids=["digest", "off"])
def test_weights_that_are_not_finite_are_refused_and_nothing_is_served_until_good_ones_come(config, tmp_path):
    policy = PlainModel(1)
    weights = policy.state_dict(keep_vars=True)
    with over_http(tmp_path, weights, config) as (transfer, them):
        transfer.push(weights)
        transfer.withdraw()
        with torch.no_grad():
            policy.first.bias[2] = float("nan")
        for _ in range(2):
            with pytest.raises(wire.TransferError, match=r"first\.bias has values that are not finite"):
                transfer.push(weights)
            assert all(worker.refuses() for worker in them)
        with torch.no_grad():
            policy.first.bias[2] = 3
        assert transfer.push(weights) == 1
        assert [worker.holds() for worker in them] == [{"version": 1, "digest": expected(weights)}] * 2


def test_after_a_push_that_no_worker_finished_nothing_is_served_and_the_next_one_needs_no_withdrawal(tmp_path):
    policy = PlainModel(1)
    with through_pipes(tmp_path, policy) as (transfer, workers):
        transfer.push(policy.state_dict())
        transfer.withdraw()
        learn(policy)
        workers[1].faults["update_weights"] = "half"
        with pytest.raises(wire.TransferError, match="worker 1: update_weights: staging version 1: a fault"):
            transfer.push(policy.state_dict())
        assert [worker.peek()["version"] for worker in workers] == [None, None]
        assert transfer.push(policy.state_dict()) == 1
        assert [worker.peek()["weights"] for worker in workers] == [fingerprint(policy.state_dict())] * 2


def test_after_a_push_that_one_worker_may_have_finished_the_weights_are_withdrawn_before_the_next(tmp_path):
    policy = PlainModel(1)
    with through_pipes(tmp_path, policy) as (transfer, workers):
        transfer.push(policy.state_dict())
        transfer.withdraw()
        learn(policy)
        workers[1].faults |= {"finish_weight_update": "deaf"}
        with pytest.raises(wire.TransferError, match="finishing version 1 failed: worker 1"):
            transfer.push(policy.state_dict())
        assert [worker.peek()["version"] for worker in workers] == [1, None]
        with pytest.raises(ValueError, match=r"call withdraw\(\)"):
            transfer.push(policy.state_dict())
        transfer.withdraw()
        assert [worker.peek()["version"] for worker in workers] == [None, None]
        learn(policy)
        assert transfer.push(policy.state_dict()) == 2
        assert [worker.peek()["weights"] for worker in workers] == [fingerprint(policy.state_dict())] * 2


def test_a_worker_that_does_not_answer_a_withdrawal_is_an_error_that_names_it(tmp_path):
    policy = PlainModel(1)
    with through_pipes(tmp_path, policy) as (transfer, workers):
        transfer.push(policy.state_dict())
        workers[1].faults["withdraw_weights"] = "deaf"
        with pytest.raises(wire.TransferError, match="withdrawing version 0 failed: worker 1: withdraw_weights: no an"):
            transfer.withdraw()
        assert [worker.peek()["version"] for worker in workers] == [None, 0]
        with pytest.raises(ValueError, match=r"call withdraw\(\)"):
            transfer.push(policy.state_dict())
        transfer.withdraw()
        assert transfer.push(policy.state_dict()) == 1


def test_an_update_that_comes_late_does_not_bring_a_withdrawn_version_back(tmp_path):
    policy, module = PlainModel(1), PlainModel(0)
    with in_process(OFF, tmp_path, module, policy.state_dict(keep_vars=True)) as (transfer, receiver):
        transfer.push(policy.state_dict())
        transfer.withdraw()
        late = {"epoch": 1, "version": 0, "where": {"slot": 0}, "finish": True}
        with pytest.raises(wire.Refused, match="version 0 was withdrawn: its memory has changed since"):
            receiver.start_weight_update(late)
        assert receiver.phase is Phase.QUARANTINED
        transfer.push(policy.state_dict())
        assert receiver.withdraw_weights({"epoch": 1, "version": 0}) == {"phase": "ready"}, "this one is late, too"
        assert receiver.version == 1


def test_bytes_that_change_during_a_push_are_seen_and_not_served(tmp_path):
    policy, module = PlainModel(1), PlainModel(0)

    class Meddler(DirectSender):
        def call(self, verb, body, timeout_s=None):
            if verb == "finish_weight_update":
                learn(policy)
            return super().call(verb, body, timeout_s)

    with make_transfer(DIGEST, tmp_path) as transfer:
        receiver = make_receiver(transfer.endpoint, module)
        transfer.open(policy.state_dict(keep_vars=True), [Meddler(receiver, "worker 0")])
        with pytest.raises(wire.TransferError, match="the live weights have the digest xxh3"):
            transfer.push(policy.state_dict())
        assert receiver.phase is Phase.QUARANTINED


# --- who comes, and who goes ------------------------------------------------------------------------------------------


def test_a_worker_that_is_started_again_gets_its_weights_until_they_are_withdrawn(tmp_path):
    policy = PlainModel(1)
    weights = policy.state_dict(keep_vars=True)
    with over_http(tmp_path, weights, restarts=2) as (transfer, them):
        transfer.push(weights)
        them[0].kill()
        assert transfer.recover(them[0].sender)
        assert [worker.holds() for worker in them] == [{"version": 0, "digest": expected(weights)}] * 2
        transfer.withdraw()
        them[0].kill()
        assert not transfer.recover(them[0].sender), "the bytes of version 0 may be others already"
        learn(policy)
        assert transfer.push(weights) == 1
        assert [worker.holds() for worker in them] == [{"version": 1, "digest": expected(weights)}] * 2
    assert check(tmp_path)["rejoin"] == 2


def test_a_worker_that_has_died_need_not_hear_of_the_withdrawal(tmp_path):
    policy = PlainModel(1)
    weights = policy.state_dict(keep_vars=True)
    with over_http(tmp_path, weights, restarts=1) as (transfer, them):
        transfer.push(weights)
        them[1].kill()
        transfer.withdraw()
        assert all(worker.refuses() for worker in them)
        learn(policy)
        assert transfer.push(weights) == 1
        assert [worker.holds() for worker in them] == [{"version": 1, "digest": expected(weights)}] * 2


def test_a_worker_that_dies_after_the_session_could_not_be_opened_again_need_not_hear_of_the_withdrawal(tmp_path):
    policy = PlainModel(1)
    weights = policy.state_dict(keep_vars=True)
    with over_http(tmp_path, weights, restarts=1) as (transfer, them):
        transfer.push(weights)
        with closing(HttpSender("http://127.0.0.1:1", None, "nobody", 1.0)) as nobody:
            with pytest.raises(wire.TransferError, match="asking for the status failed: nobody"):
                transfer.open(weights, [*(worker.sender for worker in them), nobody])
            them[1].kill()
            transfer.withdraw()
            assert all(worker.refuses() for worker in them)
        learn(policy)
        transfer.open(weights, [worker.sender for worker in them])
        assert transfer.push(weights) == 1
        assert [worker.holds() for worker in them] == [{"version": 1, "digest": expected(weights)}] * 2


def test_a_session_that_is_opened_again_moves_the_weights_and_workers_serve_on_until_its_first_push(tmp_path):
    policy = PlainModel(1)
    with through_pipes(tmp_path, policy) as (transfer, workers):
        transfer.push(policy.state_dict())
        old = fingerprint(policy.state_dict())
        transfer.open(policy.state_dict(keep_vars=True), workers)
        learn(policy)
        assert [worker.peek() | {"descriptors": 0} for worker in workers] == [
            {"version": 0, "weights": old, "descriptors": 0}
        ] * 2
        assert transfer.push(policy.state_dict()) == 1
        assert [worker.peek()["weights"] for worker in workers] == [fingerprint(policy.state_dict())] * 2


def test_a_trainer_that_was_replaced_is_told_so_before_it_changes_what_workers_may_still_serve(tmp_path):
    mine, theirs, module = PlainModel(1), PlainModel(2), PlainModel(0)
    with make_transfer(QUICK, tmp_path) as old, make_transfer(QUICK, tmp_path) as new:
        receiver = make_receiver({**old.endpoint, "socket": new.endpoint["socket"]}, module)
        receiver._intake._socket = old.endpoint["socket"]
        senders = [DirectSender(receiver, "worker 0")]
        old.open(mine.state_dict(keep_vars=True), senders)
        old.push(mine.state_dict())
        receiver._intake._socket = new.endpoint["socket"]  # workers that outlive a trainer find the next one there
        new.open(theirs.state_dict(keep_vars=True), senders)
        assert fingerprint(module.state_dict()) == fingerprint(plain(1)) and receiver.version == 0
        with pytest.raises(wire.TransferError, match=r"withdrawing version 0 failed: worker 0: .*an older trainer's"):
            old.withdraw()
        assert new.push(theirs.state_dict()) == 1 and receiver.version == 1
        assert fingerprint(module.state_dict()) == fingerprint(plain(2))
        new.withdraw()
        assert receiver.version is None


def main():
    """A trainer that is to be killed: pushes to the worker at an address, and trains on."""
    folder, name, url, token = sys.argv[1:]
    from transfer.memory import descriptors

    descriptors.secrets = SimpleNamespace(token_hex=lambda _: name)  # where the worker was told to ask
    weights = weights_of(1)
    with make_transfer(DIGEST, Path(folder)) as transfer:
        transfer.open(weights, [HttpSender(url, token, "worker 0", 20.0)])
        transfer.push(weights)
        print(json.dumps({"pushed": expected(weights)}), flush=True)
        sys.stdin.readline()
        transfer.withdraw()
        print(json.dumps({"changed": train(weights)}), flush=True)
        sys.stdin.readline()


def test_a_trainer_that_is_killed_after_it_withdrew_leaves_workers_that_refuse(tmp_path):
    name = secrets.token_hex(16)
    endpoint = {"backend": "ipc", "staging": "live", "take": "view", "socket": f"\0transfer-{name}"}
    paths = os.pathsep.join(map(str, Path(__file__).parents[:3]))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with http_workers(tmp_path, endpoint, weights_of(1), count=1) as [worker]:
        command = [sys.executable, __file__, str(tmp_path), name, worker.url, worker.token]
        with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, **pipes) as process:
            try:
                pushed = json.loads(process.stdout.readline())["pushed"]
                assert worker.holds() == {"version": 0, "digest": pushed}
                print(file=process.stdin, flush=True)
                assert json.loads(process.stdout.readline())["changed"] != pushed
                assert worker.refuses()
            finally:
                process.kill()
        assert worker.refuses() and worker.phase() == "quarantined"


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "/tmp/socket", "\0dbus", f"\0transfer-{'0' * 31}", f"\0transfer-{'0' * 33}", 1, None]
)
def test_the_word_beside_gpu_memory_is_looked_for_at_a_trainers_socket_alone(name):
    intake = make_intake({"backend": "ipc", "staging": "live", "take": "copy", "socket": ""})
    with pytest.raises(wire.Refused, match=r"where\.mark has a value that is not allowed"):
        intake.prepare(Manifest.of(weights_of(1)), {"slots": 1, "handle": "0" * 128, "mark": name}, torch.device("cpu"))


def test_completions_that_span_an_update_are_refused_as_weights_are_gone_before_they_change(tmp_path):
    with pytest.raises(ValueError, match=r"rollout\.in_flight must be wait or abort \(got keep\)"):
        Session(make_publisher(DIGEST, tmp_path), DIGEST, InFlight.keep, Journal())


def test_a_worker_of_another_dtype_is_told_which_tensors_differ(tmp_path):
    with (
        make_transfer(QUICK, tmp_path) as transfer,
        worker_processes(transfer.endpoint, "plain", seed=1, dtype=torch.bfloat16) as workers,
        pytest.raises(ValueError, match=r"dtype: first\.bias is float32, not bfloat16"),
    ):
        transfer.open(PlainModel(1).state_dict(keep_vars=True), workers)


def test_a_worker_on_another_device_is_told_which_setting_to_change(tmp_path):
    with make_transfer(QUICK, tmp_path) as transfer:
        receiver = make_receiver(transfer.endpoint, PlainModel(0))
        receiver._landing.device = torch.device("cuda", 0)  # as if its module were there
        with pytest.raises(ValueError, match=r"transfer\.take=view needs .* use transfer\.take=copy"):
            transfer.open(PlainModel(1).state_dict(keep_vars=True), [DirectSender(receiver, "worker 0")])


if __name__ == "__main__":
    main()
