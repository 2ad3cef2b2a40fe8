"""How ranks meet: who has the key gets in, nobody else keeps them waiting, and who does not come is named."""

from __future__ import annotations

import contextlib
import multiprocessing.connection as mp
import os
import socket
import threading
import time

import pytest

from rlhf.ranks import meeting as meetings
from rlhf.ranks import star as stars
from rlhf.ranks import starting
from rlhf.ranks.frames import packed
from rlhf.ranks.meeting import _device, met
from rlhf.ranks.place import Invitation, Place
from rlhf.ranks.star import LIFE, TALK, Meeting, Star, join
from rlhf.shell.ending import RunError

KEY = "a key of the test"
PATIENT_S = 60.0
DYING = """
import json, os, sys
from rlhf.ranks.place import Invitation
from rlhf.ranks.star import join

place = json.loads(sys.stdin.readline())["place"]
if place["number"] == 1:
    star = join(Invitation(**place["invitation"]), 1)
    star.talk[0].recv_bytes()  # until the first rank is gone
print("no weights at /models/seven", file=sys.stderr)
os._exit(3)
"""


@pytest.fixture
def meeting():
    with contextlib.closing(Meeting("127.0.0.1", KEY)) as made:
        yield made


@pytest.fixture
def coming(meeting):
    """`coming(1, 2)`: ranks on their way, in threads; their stars, once they are there."""
    stars, threads = {}, []

    def come(*numbers: int) -> dict[int, Star]:
        for number in numbers:
            work = threading.Thread(target=lambda n=number: stars.update({n: join(meeting.invitation, n)}), daemon=True)
            threads.append(work)
            work.start()
        return stars

    yield come
    for thread in threads:
        thread.join(PATIENT_S)
    for star in stars.values():
        star.close()


def all_of(meeting: Meeting, count: int, patience_s: float = PATIENT_S, check=lambda: None) -> Star:
    return meeting.all(count, time.monotonic() + patience_s, check)


def calling(invitation: Invitation) -> socket.socket:
    called = socket.create_connection((invitation.host, invitation.port), PATIENT_S)
    called.settimeout(None)
    return called


def heard(stranger: socket.socket) -> bytes:
    """All that it is told until its connection ends."""
    told = b""
    with contextlib.suppress(ConnectionError):
        while said := stranger.recv(1000):
            told += said
    return told


def test_all_come_in_any_order_and_each_connection_is_the_rank_s_whose_place_it_has(meeting, coming):
    stars = coming(3, 1, 2)
    with contextlib.closing(all_of(meeting, 4)) as first:
        for index, number in enumerate((1, 2, 3)):
            for kind in ("talk", "life"):
                getattr(stars[number], kind)[0].send_bytes(f"{kind} of {number}".encode())
                assert getattr(first, kind)[index].recv_bytes() == f"{kind} of {number}".encode()
        first.talk[1].send_bytes(b"to 2")
        assert stars[2].talk[0].recv_bytes() == b"to 2"


def test_who_has_not_come_is_named(meeting, coming):
    coming(2)
    with pytest.raises(TimeoutError, match=r"of the trainer's 5 ranks these have not come: 1, 3, 4"):
        all_of(meeting, 5, patience_s=1.5)


def test_a_rank_without_its_second_connection_has_not_come(meeting):
    with contextlib.closing(mp.Connection(calling(meeting.invitation).detach())) as half:
        waiting = threading.Thread(target=lambda: (mp.answer_challenge(half, KEY.encode()), named(half, [TALK, 1])))
        waiting.start()
        with pytest.raises(TimeoutError, match=r"have not come: 1$"):
            all_of(meeting, 2, patience_s=1.0)
        waiting.join(PATIENT_S)


def named(connection: mp.Connection, name: object) -> None:
    mp.deliver_challenge(connection, KEY.encode())
    connection.send_bytes(packed(name))


def test_a_mute_stranger_and_one_that_dribbles_hold_nobody_up(meeting, coming, monkeypatch):
    monkeypatch.setattr(stars, "HANDSHAKE_S", 3600.0)
    with contextlib.ExitStack() as strangers:
        mute = [strangers.enter_context(calling(meeting.invitation)) for _ in range(20)]
        for n, each in enumerate(mute):
            each.sendall(b"\0\0\1\0"[: n % 5])  # the length of a message that never comes
        time.sleep(0.2)  # they are first in line
        coming(1, 2)
        with contextlib.closing(all_of(meeting, 3, patience_s=20)) as first:
            assert len(first.talk) == len(first.life) == 2


def test_a_stranger_is_shown_the_door_once_it_has_had_its_time(meeting, monkeypatch):
    monkeypatch.setattr(stars, "HANDSHAKE_S", 0.3)
    with calling(meeting.invitation) as mute, calling(meeting.invitation) as slow:

        def dribble() -> None:
            with contextlib.suppress(ConnectionError):
                slow.send(b"\1")

        with pytest.raises(TimeoutError):
            all_of(meeting, 2, patience_s=1.5, check=dribble)
        assert all(b"#CHALLENGE#" in heard(each) for each in (mute, slow)), "and then the connection ended"


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\0\0\0\5right"], ids=repr)
def test_a_stranger_without_the_key_does_not_get_in(meeting, coming, said):
    with calling(meeting.invitation) as stranger:
        stranger.sendall(said)
        stranger.shutdown(socket.SHUT_WR)
        coming(1)
        with contextlib.closing(all_of(meeting, 2)):
            told = heard(stranger)
    assert b"#WELCOME#" not in told


def test_a_stranger_with_another_key_does_not_get_in_and_is_told(meeting, coming):
    refused = []

    def try_in() -> None:
        with pytest.raises(mp.AuthenticationError) as caught:
            join(Invitation(meeting.invitation.host, meeting.invitation.port, "another key"), 1)
        refused.append(caught.value)
        coming(1)

    stranger = threading.Thread(target=try_in)
    stranger.start()
    with contextlib.closing(all_of(meeting, 2)):
        stranger.join(PATIENT_S)
    assert len(refused) == 1


@pytest.mark.parametrize(
    "name", [[TALK, 7], [LIFE, 0], ["other", 1], [TALK], 5, None, [TALK, [1]], {"\0": []}], ids=repr
)
def test_whoever_has_the_key_and_no_place_does_not_get_in(meeting, coming, name):
    with contextlib.closing(mp.Connection(calling(meeting.invitation).detach())) as odd:

        def say() -> None:
            mp.answer_challenge(odd, KEY.encode())
            named(odd, name)
            coming(1)

        saying = threading.Thread(target=say)
        saying.start()
        with contextlib.closing(all_of(meeting, 2)) as first:
            assert len(first.talk) == 1
            saying.join(PATIENT_S)
            meeting.close()
            with pytest.raises((EOFError, OSError)):
                odd.recv_bytes()


def test_a_place_that_is_taken_is_not_given_twice(meeting, coming):
    stars = coming(1)
    while 1 not in stars:  # it waits for nobody
        with pytest.raises(TimeoutError, match="not come: 2"):
            all_of_without_closing(meeting)
    assert stars[1].talk


def all_of_without_closing(meeting: Meeting) -> Star:
    return all_of(meeting, 3, patience_s=0.5)


# --- processes --------------------------------------------------------------------------------------------------------


def test_a_rank_that_dies_while_it_starts_is_named_with_its_log_s_end_and_those_who_have_come_end_at_once(
    compose_run, tmp_path, monkeypatch
):
    (tmp_path / "dying.py").write_text(DYING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(starting, "CHILD", "dying")
    monkeypatch.setattr("transfer.worker.process.STOP_S", PATIENT_S)
    config = compose_run("experiment=smoke", "trainer=replicas", "trainer.ranks=3")
    began = time.monotonic()
    said = r"^rank [12] of the trainer ended while it started; its log ends:\n"
    with pytest.raises(RunError, match=said) as caught, met(config, tmp_path, Place(0, 3)):
        raise AssertionError("nobody has come")
    assert str(caught.value).endswith("no weights at /models/seven")
    assert time.monotonic() - began < PATIENT_S, "the other rank waited for nothing"
    assert (tmp_path / "rank-1.log").exists() and (tmp_path / "rank-2.log").exists()


def test_ranks_that_do_not_come_in_time_are_named_with_where_their_logs_are(compose_run, tmp_path, monkeypatch):
    (tmp_path / "waiting.py").write_text("import sys\nsys.stdin.read()\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path)]))
    monkeypatch.setattr(starting, "CHILD", "waiting")
    monkeypatch.setattr(meetings, "START_S", 0.5)
    config = compose_run("experiment=smoke", "trainer=replicas", "trainer.ranks=3")
    said = r"have not come: 1, 2; their logs are .*/rank-\*\.log$"
    with pytest.raises(RunError, match=said), met(config, tmp_path, Place(0, 3)):
        raise AssertionError("nobody has come")


def test_each_rank_needs_a_gpu_of_its_own_where_there_are_gpus(compose_run, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    config = compose_run("experiment=smoke", "trainer=replicas", "trainer.ranks=3")
    said = r"rank 2 the one of number 2, and 2 are visible here, from 0: lower trainer\.ranks, .*model\.device=cpu"
    with pytest.raises(ValueError, match=said), met(config, tmp_path, Place(2, 3, 2)):
        raise AssertionError("it has no GPU")


def test_gpus_that_are_named_where_there_is_none_are_refused(compose_run, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = compose_run("experiment=smoke", "trainer.gpus=[1]")
    said = r"trainer.gpus names GPUs, and torch sees none here: leave it out \(got \[1\]\)"
    with pytest.raises(ValueError, match=said), met(config, tmp_path, Place()):
        raise AssertionError("it has no GPU")


def test_ranks_take_the_gpus_that_are_named(compose_run, tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    several = compose_run("experiment=smoke", "trainer=replicas", "trainer.ranks=2", "trainer.gpus=[2,3]")
    assert str(_device(several, Place(1, 2, 1))) == "cuda:3"
    with met(compose_run("experiment=smoke", "trainer.gpus=[1]"), tmp_path, Place()):
        assert chosen == [3, 1], "also of one process"
