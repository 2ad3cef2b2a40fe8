"""The checker of histories: a real one passes, and each rule is seen to be broken."""

from __future__ import annotations

import copy
import json
import time

import pytest
import torch
from history import check, read

from transfer import make_transfer
from transfer.agreement.journal import Journal
from transfer.agreement.manifest import Manifest
from transfer.agreement.wire import RemoteError
from transfer.config import InFlight, IpcConfig, SenderConfig
from transfer.trainer.senders.direct import DirectSender
from transfer.worker.plain_worker import PlainSpec, PlainWorker

CONFIG = IpcConfig(sender=SenderConfig(timeout_s=20.0))


class Restartable(DirectSender):
    """A worker in this process that can be lost and started again."""

    def __init__(self, spec: PlainSpec, name: str) -> None:
        super().__init__(PlainWorker(spec), name)
        self._spec = spec

    def lose(self) -> None:
        self._worker.close()
        self._worker = PlainWorker(self._spec)


@pytest.fixture(scope="module")
def journals(tmp_path_factory):
    """What two trainers, one after the other, and two workers leave, one of which is started again."""
    folder = tmp_path_factory.mktemp("history")
    weights = {f"w{i}": torch.full((64,), float(i)) for i in range(4)}
    manifest = Manifest.of(weights).to_json()
    notes = Journal(folder / "trainer.jsonl")
    with make_transfer(CONFIG, folder, InFlight.wait, notes) as transfer:
        specs = [
            PlainSpec(manifest=manifest, endpoint=dict(transfer.endpoint), journal=str(folder / f"worker-{i}.jsonl"))
            for i in range(2)
        ]
        workers = [Restartable(spec, f"worker {i}") for i, spec in enumerate(specs)]
        for trainer in range(2):
            transfer.open(weights, workers)
            for step in range(3):
                for tensor in weights.values():
                    tensor.add_(1)
                version = transfer.push(weights)
                assert [worker.call("completions", {})["version"] for worker in workers] == [version] * 2
                notes.write("consume", version=version, oldest=version, seeds=[10 * trainer + step])
            workers[trainer].lose()
            with pytest.raises(RemoteError, match="no weights to serve"):
                workers[trainer].call("completions", {})
            assert transfer.recover(workers[trainer])
            assert workers[trainer].call("completions", {})["version"] == version
    for worker in workers:
        worker._worker.close()
    notes.close()
    return {path.name: list(read(path)) for path in folder.glob("*.jsonl")}


@pytest.fixture
def history(journals, tmp_path):
    """The same again, to be changed: `history.events["worker-0.jsonl"]`, `history.check()`."""
    return Written(copy.deepcopy(journals), tmp_path / "changed")


class Written:
    def __init__(self, events, folder) -> None:
        self.events = events
        self._folder = folder
        folder.mkdir()

    def all(self, op, name="worker-0.jsonl"):
        return [event for event in self.events[name] if event["op"] == op]

    def check(self, **options):
        for name, events in self.events.items():
            (self._folder / name).write_text("".join(json.dumps(event) + "\n" for event in events))
        return check(self._folder, **options)

    def refused(self, rule):
        with pytest.raises(AssertionError, match=rule):
            self.check()


def test_a_real_history_passes_and_is_counted(history):
    counts = history.check()
    assert (counts["open"], counts["publish"], counts["pushed"]) == (2, 6, 6)
    assert (counts["init"], counts["finish"], counts["serve"]) == (2 * 2 + 2, 6 * 2 + 2, 6 * 2 + 2)
    assert counts["consume"] == 6


def test_serving_another_digest_under_a_published_version_is_seen(history):
    history.all("serve")[3]["digest"] = "xxh3:" + "0" * 32
    history.refused("served what was not published")


def test_serving_a_version_that_nobody_published_is_seen(history):
    history.events["trainer.jsonl"].remove(history.all("publish", "trainer.jsonl")[2])
    history.refused("served what was not published")


def test_finishing_what_nobody_published_is_seen(history):
    history.all("finish")[1]["digest"] = "xxh3:" + "0" * 32
    history.refused("finished what was not published")


def test_a_version_that_goes_down_is_seen(history):
    first, *_, last = history.all("serve", "worker-1.jsonl")[:3]
    last["versions"], last["digest"] = first["versions"], first["digest"]
    history.refused("went down from 2")


def test_versions_that_go_down_within_a_completion_are_seen(history):
    history.all("serve")[1]["versions"] = [1, 0, 1]
    history.refused("went down from 1")


def test_finishing_an_older_version_is_seen(history):
    boot = history.all("init")[0]["boot"]
    again = copy.deepcopy(next(e for e in history.all("finish") if e["version"] == 0))
    again["t"] = [e for e in history.events["worker-0.jsonl"] if e["boot"] == boot][-1]["t"] + 1e-6
    history.events["worker-0.jsonl"].append(again)
    history.refused("went down")


def test_a_worker_that_was_started_again_and_serves_less_than_was_pushed_is_seen(history):
    events, older = history.events["worker-0.jsonl"], history.all("finish")[1]
    new = history.all("init")[1]["boot"]
    for event in [e for e in events if e["boot"] == new and e.get("version") == 2]:
        event["version"], event["digest"] = older["version"], older["digest"]
    served = next(e for e in history.all("serve") if e["boot"] == new)
    served["versions"], served["digest"] = [older["version"]], older["digest"]
    history.refused(r"older than epoch and version \(1, 2\)")


def test_a_trainer_that_counts_down_is_seen(history):
    history.all("pushed", "trainer.jsonl")[2]["version"] = 1
    history.refused("the trainer went down")


def test_a_completion_that_began_before_the_push_may_end_after_it_on_older_weights(history):
    first, second = history.all("serve")[:2]
    second["versions"], second["digest"], second["began"] = first["versions"], first["digest"], first["began"]
    history.check()


def test_a_worker_that_serves_before_it_has_staged_anything_is_seen(history):
    served = history.all("serve")[3]
    assert served["boot"] != history.all("serve")[0]["boot"]
    served["t"] = served["began"] = history.all("init")[1]["t"]
    history.refused("served what was not staged")


def test_a_version_that_is_applied_twice_is_seen_unless_an_update_failed_in_between(history):
    done = history.all("finish")[2]
    history.events["worker-0.jsonl"].append({**done, "t": done["t"] + 1e-7})
    history.refused("applied twice")
    failed = {**done, "op": "failed", "t": done["t"] + 0.5e-7, "result": "no memory"}
    history.events["worker-0.jsonl"].append(failed)
    history.check()


def test_a_version_that_is_served_after_it_was_withdrawn_is_seen(history):
    served = history.all("serve", "worker-1.jsonl")[1]
    done = next(e for e in history.all("finish", "worker-1.jsonl") if e["version"] == served["versions"][0])
    withdrawn = {**done, "op": "withdraw", "t": done["t"] + 1e-7}
    history.events["worker-1.jsonl"].append(withdrawn)
    history.refused("served what was withdrawn")
    withdrawn["result"] = "repeat"
    history.check()


def test_a_worker_that_joins_with_a_version_and_serves_an_older_one_is_seen(history):
    first = history.all("serve", "worker-1.jsonl")[0]
    told = {"boot": "t", "who": "trainer", "op": "join", "worker": "worker 1 (http://a)", "epoch": 1}
    history.events["trainer.jsonl"].append({**told, "version": 0, "t": first["began"] - 1e-7})
    history.check()
    history.events["trainer.jsonl"].append({**told, "version": 1, "t": first["began"] - 1e-7})
    history.refused(r"older than epoch and version \(1, 1\)")


def test_a_worker_that_serves_after_it_has_left_is_seen_unless_it_has_joined_again(history):
    second = history.all("serve", "worker-1.jsonl")[1]
    left = {"boot": "t", "who": "trainer", "op": "leave", "worker": "worker 1", "epoch": 1, "version": 0}
    history.events["trainer.jsonl"].append({**left, "t": second["began"] - 1e-7})
    history.refused("served after it had left")
    again = {**history.all("init", "worker-1.jsonl")[0], "t": second["began"] - 1e-8}
    history.events["worker-1.jsonl"].append({**again, "boot": "another"})
    history.check()


def test_a_repeat_is_not_another_application(history):
    done = history.all("finish")[2]
    history.events["worker-0.jsonl"].append({**done, "t": done["t"] + 1e-7, "result": "repeat"})
    history.check()


@pytest.mark.parametrize("op", ["start", "update", "finish"])
def test_a_worker_that_obeys_a_fenced_trainer_is_seen(history, op):
    later = [event for event in history.all(op, "worker-1.jsonl") if event["epoch"] == 2]
    later[0]["epoch"] = 1
    history.refused("obeyed an old trainer")


def test_an_epoch_that_is_taken_twice_is_seen(history):
    history.all("init", "worker-1.jsonl")[1]["epoch"] = 1
    history.refused("took an old trainer")


def test_a_sample_that_is_consumed_twice_is_seen(history):
    first, second = history.all("consume", "trainer.jsonl")[:2]
    second["seeds"] = [*second["seeds"], *first["seeds"]]
    history.refused("consumed a sample twice")


def test_a_sample_that_is_too_old_is_seen_by_the_lag_that_is_allowed(history):
    history.all("consume", "trainer.jsonl")[2]["oldest"] -= 1
    history.refused("consumed too old a sample")
    history.check(lag=1)


def test_where_nobody_remembers_a_trainer_versions_begin_anew_also_under_an_epoch_that_was_taken_after_a_failure(
    tmp_path,
):
    def serves(opened: int, epoch: int, version: int, digest: str) -> None:
        """A trainer, and the only worker, which was just started."""
        trainer, worker = Journal(tmp_path / "trainer.jsonl"), Journal(tmp_path / "worker-0.jsonl")
        trainer.write("open", epoch=opened)
        trainer.write("publish", epoch=epoch, version=version, digest=digest)
        for each in range(1, epoch + 1):
            worker.write("init", epoch=each)
        for op in ("start", "update", "finish"):
            worker.write(op, epoch=epoch, version=version, digest=digest, result="done")
        trainer.write("pushed", epoch=epoch, version=version, digest=digest)
        worker.write("serve", versions=[version], digest=digest, began=time.monotonic())

    serves(opened=1, epoch=2, version=3, digest="a")
    serves(opened=2, epoch=2, version=0, digest="b")
    assert check(tmp_path)["serve"] == 2


def test_only_the_last_line_of_a_killed_writer_may_be_broken(history):
    history.check()
    path = history._folder / "worker-0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    border = next(i for i, line in enumerate(lines) if boot(line) != boot(lines[0]))
    half = lines[3][:40]
    path.write_text("".join([*lines, half]))
    assert check(history._folder) == history.check()
    path.write_text("".join([*lines[:border], half + "\n", *lines[border:]]))
    check(history._folder)
    path.write_text("".join([*lines[:3], half + "\n", *lines[3:]]))
    with pytest.raises(AssertionError, match="broken line"):
        check(history._folder)


def test_who_writes_after_a_killed_writer_begins_a_line_of_its_own(tmp_path):
    path = tmp_path / "worker-0.jsonl"
    for _ in range(2):
        journal = Journal(path)
        journal.write("abort", epoch=1, version=2)
        journal.close()
        with path.open("a") as file:
            file.write('{"t": 1.0, "wh')
    assert [event["op"] for event in read(path)] == ["abort", "abort"]


def boot(line):
    return json.loads(line)["boot"]
