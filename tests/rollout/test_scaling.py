"""A run's workers become more, and fewer, between two steps: who is asked when, and what is said of what goes wrong."""

from __future__ import annotations

import os
import re

import pytest

from rlhf.rollout.begun import Begun
from rlhf.rollout.scaling import Hooks, Scaling
from rlhf.shell import scale_files
from rlhf.shell.scale_files import Request
from transfer.agreement.wire import RemoteError, TransferError

SMALL = ("prompts_per_step=4", "task.held_out=4")


class FakeSender:
    def __init__(self, name):
        self.name, self.serving, self.version = name, 0, None

    def call(self, verb, body, timeout_s=None):
        assert verb == "status"
        if self.serving is None:
            raise RemoteError(self.name, verb, 0, "no answer")
        return {"serving": self.serving, "version": self.version}


class FakeWorkers:
    """As Workers; a worker is up once its number is in `up`, and cannot be begun at the number `none_from`."""

    def __init__(self, count):
        self.up, self.dead, self.none_from, self.ended = set(range(count)), set(), 100, []
        self.begun = []
        self._senders = [self.connect(self.begin(), 0) for _ in range(count)]

    def senders(self):
        return self._senders

    def asked(self):
        return [begun for sender in self._senders for begun in self.begun if begun.sender is sender]

    def begin(self):
        index = len(self.begun)
        if index >= self.none_from:
            raise OSError("no process can be started")
        begun = Begun(index, lambda _: FakeSender(f"worker {index}"), lambda: index in self.up)
        self.begun.append(begun)
        return begun

    def begin_at(self, url, token):
        self.up.add(len(self.begun))
        return self.begin()

    def deadline(self):
        return float("inf")

    def connect(self, begun, deadline):
        if begun.index in self.dead:
            raise TransferError(f"worker {begun.index} died while it started; run/worker.log ends:\na\nb")
        begun.sender = begun.connect(deadline)
        return begun.sender

    def end(self, begun):
        self.ended.append(begun.index)
        self.begun.remove(begun)


class FakeTransfer:
    """As a session, which notes who is in it; `serves`: whether newcomers have a version at once."""

    def __init__(self):
        self.members, self.serves, self.refused = [], True, set()

    def join(self, sender):
        if sender.name in self.refused:
            raise TransferError(f"{sender.name}: no")
        self.members.append(sender.name)
        return self.serves

    def leave(self, sender):
        self.members = [name for name in self.members if name != sender.name]


class Run:
    """A run with fake workers; `answer` is what is heard of its last request."""

    def __init__(self, folder, config, count=1):
        self.folder, self.workers, self.transfer = folder, FakeWorkers(count), FakeTransfer()
        self.said, self.counts, self.tried = [], [], []
        hooks = Hooks(self.said.append, self.counts.append, self.try_out)
        self.scaling = Scaling(folder, config, self.workers, self.transfer, hooks)

    def try_out(self, new, old):
        self.tried.append((new.name, old.name))
        if new.serving == "odd":
            raise RuntimeError("its log-probs differ")

    def ask(self, **what):
        self.request = Request(**what)
        scale_files.post(self.folder, self.request)
        self.scaling.look()

    @property
    def answer(self):
        heard = scale_files.heard(self.folder, self.request)
        return None if heard is None else (heard.state, heard.line)

    @property
    def names(self):
        return [sender.name for sender in self.workers.senders()]


@pytest.fixture
def run(tmp_path, compose_run):
    return lambda *overrides, count=1: Run(tmp_path, compose_run(*SMALL, *overrides), count)


def test_newcomers_are_asked_as_each_comes_up_and_the_answer_comes_when_all_are(run):
    run = run()
    run.ask(workers=3)
    assert run.answer == ("going", "1 worker now, 2 coming up") and run.names == ["worker 0"]
    run.workers.up.add(2)
    run.scaling.look()
    assert run.names == ["worker 0", "worker 2"] and run.transfer.members == ["worker 2"]
    assert run.tried == [("worker 2", "worker 0")]
    assert run.answer == ("going", "2 workers now, 1 coming up") and run.counts == [2]
    run.workers.up.add(1)
    run.scaling.look()
    assert run.answer == ("done", "3 workers now, 1 before") and run.counts == [2, 3]
    assert run.said == ["rlhf scale: 3 workers now, 1 before"]
    run.ask(workers=3)
    assert run.answer == ("done", "3 workers now, as before") and run.counts == [2, 3]


def test_one_that_leaves_is_asked_no_more_at_once_and_ends_when_it_samples_nothing(run):
    run = run(count=3)
    busy, last = run.workers.senders()[1:]
    busy.serving, last.serving = 5, None
    run.ask(workers=1)
    assert run.names == ["worker 0"] and run.workers.ended == [2], "one that does not answer samples nothing"
    assert run.answer == ("going", "1 worker now, 1 leaving once they have sampled")
    run.scaling.look()
    assert run.workers.ended == [2]
    busy.serving = 0
    run.scaling.look()
    assert run.workers.ended == [2, 1] and run.answer == ("done", "1 worker now, 3 before") and run.counts == [1]


def test_one_that_has_to_wait_for_the_next_version_is_asked_after_the_next_step(run):
    run = run()
    run.transfer.serves = False
    run.workers.up.add(1)
    run.ask(workers=2)
    assert run.names == ["worker 0"] and run.transfer.members == ["worker 1"]
    assert run.answer == ("going", "1 worker now, 1 waiting for the next version")
    run.scaling.look()
    assert run.names == ["worker 0"], "no push has brought it one"
    run.workers.begun[1].sender.version = 7
    run.scaling.look()
    assert run.names == ["worker 0", "worker 1"] and run.answer == ("done", "2 workers now, 1 before")


def test_newcomers_that_fail_are_named_and_ended_and_the_others_stay(run):
    run = run()
    run.workers.up |= {1, 2, 3}
    run.workers.dead.add(1)
    run.transfer.refused.add("worker 2")
    run.ask(workers=4)
    assert run.names == ["worker 0", "worker 3"] and run.workers.ended == [1, 2]
    line = "2 workers now, 1 before; worker 1 died while it started; run/worker.log; worker 2: no"
    assert run.answer == ("failed", line)


def test_a_newcomer_that_samples_otherwise_than_the_others_is_sent_away(run, monkeypatch):
    run = run()
    plain = run.workers.connect

    def odd(begun, deadline):
        sender = plain(begun, deadline)
        sender.serving = "odd"
        return sender

    monkeypatch.setattr(run.workers, "connect", odd)
    run.workers.up.add(1)
    run.ask(workers=2)
    assert run.names == ["worker 0"] and run.transfer.members == [] and run.workers.ended == [1]
    assert run.answer == ("failed", "1 worker now, as before; its log-probs differ") and run.counts == []


def test_if_one_of_them_cannot_be_begun_none_is(run):
    run = run()
    run.workers.none_from = 2
    run.ask(workers=4)
    assert run.answer == ("failed", "no process can be started; nothing is changed")
    assert run.workers.ended == [1] and run.names == ["worker 0"]


@pytest.mark.parametrize(
    ("overrides", "what", "line"),
    [
        (["transfer=local"], {"workers": 2}, "transfer=local samples inside the trainer's process: there is one"),
        ([], {"workers": 9}, r"at most 4 workers have anything to do: prompts_per_step=4, task.held_out=4 \(got 9\)"),
        (
            ["transfer=disk", "transfer.sender.url=[http://127.0.0.1:1]"],
            {"workers": 2},
            r"transfer.sender.url names 1 workers, and this run starts none \(got 2\): .* --join URL",
        ),
        (
            ["rollout.gpus=[1]", "model.device=cuda"],
            {"workers": 2},
            r"rollout.gpus=\[1\] names the GPUs of 1 workers \(got 2\)",
        ),
        ([], {"urls": ["http://127.0.0.1:1"]}, "transfer=ipc shares memory only with workers that this run starts"),
        (["transfer=local"], {"urls": ["http://127.0.0.1:1"]}, "transfer=local samples inside the trainer's process"),
        (["transfer=disk"], {"urls": ["ftp://a"]}, "must be like http://127.0.0.1:8000"),
        (
            ["transfer=disk", "rollout=vllm"],
            {"urls": ["http://a"]},
            r"a vLLM server .*=ipc or handles \(got disk\)",
        ),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_changed(run, overrides, what, line):
    run = run(*overrides)
    run.ask(**what)
    state, said = run.answer
    assert state == "failed" and said.endswith("; nothing is changed") and "\n" not in said
    assert re.search(line, said), said
    assert run.names == ["worker 0"] and run.workers.ended == []


def test_a_worker_that_runs_already_joins_by_its_url(run):
    run = run("transfer=disk")
    run.ask(urls=["http://127.0.0.1:1"], token="t")
    assert run.answer == ("done", "2 workers now, 1 before") and run.transfer.members == ["worker 1"]


def test_a_second_request_waits_until_the_first_is_done(run):
    run = run()
    run.ask(workers=2)
    first = run.request
    run.ask(workers=1)
    assert run.answer is None and scale_files.waiting(run.folder)
    run.workers.up.add(1)
    run.scaling.look()
    assert scale_files.heard(run.folder, first).line == "2 workers now, 1 before"
    run.scaling.look()
    assert run.answer == ("done", "1 worker now, 2 before")


def test_whoever_has_asked_hears_that_the_run_has_ended(run):
    run = run()
    run.ask(workers=2)
    run.scaling.close()
    assert run.answer == ("failed", "the run has ended meanwhile")
    run.ask(workers=2)
    run.ask(workers=1)
    run.scaling.close()
    assert run.answer == ("failed", "the run has ended meanwhile") and not scale_files.waiting(run.folder)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"workers": 0}', '{"workers": true}', '{"id": "a"}', '{"id": "a", "workers": 2, "more": 1}']
)
def test_what_is_no_request_is_a_warning_and_is_gone(run, text):
    run = run()
    path = run.folder / scale_files.REQUEST
    path.write_text(text)
    run.scaling.look()
    assert len(run.said) == 1 and run.said[0].startswith(f"warning: {path} is no request: ")
    assert not path.exists() and run.names == ["worker 0"]


def test_a_link_is_not_followed_and_nobody_else_can_read_a_request(run, tmp_path):
    run = run()
    (tmp_path / "elsewhere").write_text('{"id": "a", "workers": 2}')
    (tmp_path / scale_files.REQUEST).symlink_to(tmp_path / "elsewhere")
    run.scaling.look()
    assert run.said and not os.path.lexists(tmp_path / scale_files.REQUEST)
    scale_files.post(tmp_path, Request(urls=["http://127.0.0.1:1"], token="t"))
    assert (tmp_path / scale_files.REQUEST).stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", scale_files.REQUEST]


def test_where_files_have_no_links_a_request_is_renamed_into_its_place(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError("no links")

    monkeypatch.setattr(os, "link", link)
    scale_files.post(tmp_path, Request(workers=2))
    with pytest.raises(FileExistsError):
        scale_files.post(tmp_path, Request(workers=3))
    assert scale_files.taken(tmp_path).workers == 2 and not list(tmp_path.iterdir())


def test_a_look_without_a_request_costs_next_to_nothing(run, monkeypatch):
    run = run()
    monkeypatch.setattr(scale_files, "taken", lambda folder: pytest.fail("there is none"))
    for _ in range(100):
        run.scaling.look()
    assert run.said == []
