"""Hostile connections to a real worker process, from another process: the trainer's next push gets in."""

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from transfer import make_transfer
from transfer.agreement.manifest import Manifest
from transfer.config import HttpSenderConfig, IpcConfig
from transfer.trainer.senders.http import HttpSender
from transfer.worker import bounded_http, door, process, serve
from transfer.worker.bearer import Bearer
from transfer.worker.plain_worker import PlainSpec
from transfer.worker.repeats import PERIOD_S, Repeats

TOKEN = "t" * 43
MIB = 2**20
HALF = b"GET /health HTTP/1.1\r\nHost: a\r\nx: " + b"y" * 60_000
KINDS = {  # what a hostile client sends first, and then every tenth of a second
    "idle": (b"", b""),
    "half a head": (HALF, b""),
    "many headers": (b"GET /health HTTP/1.1\r\n" + b"a:\r\n" * 15_000, b""),
    "a slow head": (b"GET /health HTTP/1.1\r\nx: ", b"y"),
    "a slow body": (b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\n", b"y" * 1000),
    "a slow body without the token": (b"POST /pause HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\n\r\n", b"y"),
    "health and no more": (b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", b""),
    "health again and again": (
        b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" * 16,
        b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n",
    ),
    "no HTTP": (b"\x16\x03\x01 hello\r\n\r\n", b""),
    "an upgrade": (b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", b""),
}
HOSTILE = """
import errno, json, os, resource, select, socket, sys, time
port, count, kinds = json.loads(sys.stdin.readline())
resource.setrlimit(resource.RLIMIT_NOFILE, (count + 100, count + 100))
kinds = [tuple(part.encode("latin-1") for part in kind) for kind in kinds]
held = {}
def connect(index):
    one = socket.socket()
    one.setblocking(False)
    one.connect_ex(("127.0.0.1", port))
    held[index] = [one, kinds[index % len(kinds)][0]]
for index in range(count):
    connect(index)
print("up", flush=True)
parent = os.getppid()
while os.getppid() == parent:
    began = time.monotonic()
    for index, (one, unsent) in list(held.items()):
        try:
            if unsent:
                held[index][1] = unsent[one.send(unsent):] or kinds[index % len(kinds)][1]
            if not one.recv(65536):
                raise ConnectionError
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno in (errno.ENOTCONN, errno.EINPROGRESS):
                continue
            one.close()
            connect(index)  # it comes again as soon as it is disconnected
    time.sleep(max(0.0, 0.1 - (time.monotonic() - began)))
"""


class Run:
    """A trainer with a worker process of its own, which has so many descriptors."""

    def __init__(self, folder, stack, token=TOKEN, descriptors=None):
        self.weights = {"w": torch.arange(1000.0)}
        self.transfer = stack.enter_context(make_transfer(IpcConfig(sender=HttpSenderConfig()), folder))
        manifest = Manifest.of(self.weights).to_json()
        spec = PlainSpec(manifest=manifest, endpoint=self.transfer.endpoint, token=token).to_json()
        self.log = folder / "worker.log"
        started = stack.enter_context(process.WorkerProcess("worker", "transfer.worker.plain_worker", spec, self.log))
        self.worker = psutil.Process(started.pid)
        if descriptors:
            self.worker.rlimit(psutil.RLIMIT_NOFILE, (descriptors, descriptors))
        self.port = started.port(time.monotonic() + 60)
        self.token = token
        self.sender = stack.enter_context(contextlib.closing(self.client()))
        self.transfer.open(self.weights, [self.sender])
        self.push()

    def client(self):
        """Another client with the token."""
        return HttpSender(f"http://127.0.0.1:{self.port}", self.token or None, "worker", 30.0)

    def push(self, fresh=False):
        """One update, which the worker then serves; `fresh`: over a new connection."""
        if fresh:
            self.sender.close()
        self.weights["w"] += 1
        version = self.transfer.push(self.weights)
        assert self.sender.call("weight_info", {}) == {"weight_version": str(version)}

    def peak_mib(self):
        """The most memory that the worker has had since it was last asked, MiB."""
        status = Path(f"/proc/{self.worker.pid}/status").read_text()
        Path(f"/proc/{self.worker.pid}/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 1024


@contextlib.contextmanager
def hostile(port, count, *kinds):
    """`count` clients of these kinds, which connect again whenever they are disconnected."""
    told = json.dumps([port, count, [[part.decode("latin-1") for part in KINDS[kind]] for kind in kinds]])
    command = [sys.executable, "-S", "-c", HOSTILE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as clients:
        try:
            clients.stdin.write(told.encode() + b"\n")
            clients.stdin.flush()
            assert clients.stdout.readline() == b"up\n"
            yield
        finally:
            clients.kill()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run whose worker has 64 descriptors."""
    with contextlib.ExitStack() as stack:
        yield Run(tmp_path_factory.mktemp("small"), stack, descriptors=64)


@pytest.mark.parametrize("kinds", [["idle"], list(KINDS)], ids=["idle", "mixed"])
def test_a_worker_with_64_descriptors_takes_updates_among_150_hostile_connections(kinds, small):
    small.push()
    small.peak_mib()
    before = small.peak_mib()
    with hostile(small.port, 150, *kinds):
        for fresh in (False, True, True):
            small.push(fresh)
            assert small.client().call("health", {}) == {"status": "ok"}
        assert small.worker.num_fds() < 64
    assert small.peak_mib() - before < 16
    assert small.log.stat().st_size < 4096


@pytest.mark.slow
@pytest.mark.parametrize(
    "token, descriptors, clients",
    [(TOKEN, None, 3000), (TOKEN, 64, 3000), ("", None, 1000)],
    ids=["the worker's default", "64 descriptors", "no token"],
)
def test_a_push_gets_in_among_3000_hostile_connections(token, descriptors, clients, tmp_path):
    with contextlib.ExitStack() as stack:
        run = Run(tmp_path, stack, token, descriptors)
        run.peak_mib()
        before = run.peak_mib()
        for kinds in (["half a head"], list(KINDS)):
            with hostile(run.port, clients, *kinds):
                run.push()
                began = time.monotonic()
                run.push(fresh=True)
                took = time.monotonic() - began
            more = run.peak_mib() - before
            print(f"{', '.join(kinds)}: a push over a new connection in {took:.1f} s, {more:.1f} MiB more")
            assert more < 16
        print(f"a log of {run.log.stat().st_size} bytes")
        assert run.log.stat().st_size < 4096


def test_a_worker_without_descriptors_waits_for_some_and_says_so_once(small):
    small.sender.close()
    time.sleep(0.1)
    limit = small.worker.rlimit(psutil.RLIMIT_NOFILE)
    said = small.log.read_text().count("could not be accepted")
    small.worker.rlimit(psutil.RLIMIT_NOFILE, (3, limit[1]))
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            asked = pool.submit(small.client().call, "health", {})
            used = small.worker.cpu_times().user
            time.sleep(0.5)
            assert small.worker.cpu_times().user - used < 0.25, "no busy loop"
            assert not asked.done()
            small.worker.rlimit(psutil.RLIMIT_NOFILE, limit)
            assert asked.result(20) == {"status": "ok"}
    finally:
        small.worker.rlimit(psutil.RLIMIT_NOFILE, limit)
    assert small.log.read_text().count("could not be accepted") == said + 1


class Idle:
    """A worker that does nothing."""

    def health(self, body):
        return {"status": "ok"}

    def completions(self, body):
        return {"nbytes": len(body.get("text", ""))}

    status = health


@contextlib.contextmanager
def served(token=TOKEN, most=8):
    """The address of a worker in this process, whose door lets so many strangers in, and a record of who was ended."""
    listener = serve.listening(PlainSpec(manifest={}, endpoint={}, token=token))
    server = serve._server(Idle(), token)
    server._door._most = most
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join(20)


def ended(connection, within_s):
    """Whether the other side ends the connection, after what it may have to say."""
    connection.settimeout(within_s)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def answered(connection):
    """An answer whose body is one JSON object."""
    got = b""
    while not got.endswith(b"}"):
        got += connection.recv(65536)
    return got


AUTHORIZED = f"Authorization: Bearer {TOKEN}\r\n".encode()
LATE = {  # what a client begins and does not end
    "nothing": b"",
    "half a head": b"GET /health HTTP/1.1\r\nHost: a\r\n",
    "half a head after an answer": b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /he",
    "an answer and no more": b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n",
    "half a head after the token": b"GET /status HTTP/1.1\r\nHost: a\r\n" + AUTHORIZED + b"\r\nGET /he",
    "half a body": b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99\r\n" + AUTHORIZED + b"\r\n{",
    "a body that nobody reads": b"GET /health HTTP/1.1\r\nContent-Length: 99\r\n\r\n{",
}


@pytest.fixture
def hasty(monkeypatch):
    """Deadlines of a fifth of a second."""
    monkeypatch.setattr(bounded_http, "HEAD_S", 0.2)
    monkeypatch.setattr(bounded_http, "STALL_S", 0.2)
    monkeypatch.setattr(door, "SWEEP_S", 0.05)


def test_a_client_that_does_not_end_what_it_began_is_disconnected(hasty):
    with served() as address, contextlib.ExitStack() as stack:
        clients = {what: stack.enter_context(socket.create_connection(address)) for what in LATE}
        for what, client in clients.items():
            client.sendall(LATE[what])
        assert {what: ended(client, 20) for what, client in clients.items()} == dict.fromkeys(LATE, True)


@pytest.mark.slow
@pytest.mark.parametrize("token", [TOKEN, ""], ids=["token", "no token"])
def test_a_trainer_may_be_silent_between_two_requests_and_send_a_body_slowly(hasty, monkeypatch, token):
    monkeypatch.setattr(bounded_http, "STALL_S", 2.0)
    monkeypatch.setattr(bounded_http, "STEP", 10)
    text = json.dumps({"text": "y" * 200}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n%s\r\n" % (len(text), AUTHORIZED if token else b"")
    with served(token) as address, socket.create_connection(address) as client:
        client.settimeout(20)
        client.sendall(head + text)
        assert answered(client).endswith(b'{"nbytes":200}')
        assert not ended(client, 0.6)
        client.sendall(head)
        for at in range(0, len(text), 40):
            client.sendall(text[at : at + 40])
            time.sleep(0.5)  # 3 s in all
        client.settimeout(20)
        assert answered(client).endswith(b'{"nbytes":200}')


@pytest.mark.slow
def test_a_client_that_does_not_read_its_answers_is_disconnected(hasty):
    with served("") as address, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(address)
        client.settimeout(0.5)
        with pytest.raises((ConnectionError, TimeoutError)):
            for _ in range(100_000):
                client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n")
        time.sleep(1)
        with pytest.raises(ConnectionError):
            for _ in range(100):
                client.sendall(b"x")
                time.sleep(0.01)


def test_where_strangers_are_as_many_as_may_be_the_longest_silent_makes_room():
    with served(most=3) as address, contextlib.ExitStack() as stack:
        connect = lambda: stack.enter_context(socket.create_connection(address))  # noqa: E731
        trainer = connect()
        trainer.sendall(b"GET /status HTTP/1.1\r\nHost: a\r\n" + AUTHORIZED + b"\r\n")
        assert b"200" in trainer.recv(4096)
        first, asks, third = connect(), connect(), connect()
        time.sleep(0.1)
        first.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"200" in first.recv(4096)
        stack.enter_context(contextlib.closing(connect()))
        assert ended(asks, 20) and not ended(first, 0.1) and not ended(third, 0.1) and not ended(trainer, 0.1)


class Stranger:
    """A connection whose bytes nobody reads."""

    def __init__(self, unread):
        self.unread, self.dropped = lambda: unread, False

    def drop(self):
        self.dropped = True


def test_who_has_sent_what_is_not_read_yet_is_spared_once():
    async def make_room_three_times():
        at_the_door, sent, silent = door.Door(Bearer(""), 2), Stranger(True), Stranger(False)
        at_the_door.came(sent, 0.0)
        at_the_door.came(silent, 0.0)
        dropped = []
        for _ in range(3):
            await at_the_door._make_room(1.0)
            dropped.append((sent.dropped, silent.dropped))
        return dropped

    assert asyncio.run(make_room_three_times()) == [(False, False), (False, True), (True, True)]


def test_a_connection_is_kept_where_a_process_has_more_than_1024_descriptors():
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2000, limit[1]), limit[1]))
    try:
        with served("") as (host, port), contextlib.ExitStack() as stack:
            for _ in range(1100):
                stack.callback(os.close, os.open("/dev/null", os.O_RDONLY))
            sender = stack.enter_context(contextlib.closing(HttpSender(f"http://{host}:{port}", None, "worker", 30.0)))
            for _ in range(2):
                assert sender.call("health", {}) == {"status": "ok"}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_a_line_that_comes_again_is_counted(caplog):
    now = [0.0]
    logger = logging.getLogger("test.repeats")
    repeats = Repeats([logger.name], lambda: now[0])
    for index in range(1000):
        logger.warning("a client was disconnected: %d", index)
    logger.warning("something else")
    repeats.tell()
    now[0] = PERIOD_S
    repeats.tell()
    logger.warning("a client was disconnected: %d", 7)
    assert [record.getMessage() for record in caplog.records] == [
        "a client was disconnected: 0",
        "something else",
        "a client was disconnected: %d (999 more times in 60 s)",
        "a client was disconnected: 7",
    ]


def test_strangers_get_at_most_half_of_the_descriptors_that_are_free(monkeypatch):
    used = len(os.listdir("/proc/self/fd"))
    for limit, most in ((used + 21, 10), (10**6, door.MAX_STRANGERS), (used, 1), (resource.RLIM_INFINITY, 64)):
        monkeypatch.setattr(door.resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert door.most_strangers() == most
