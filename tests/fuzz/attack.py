"""Starts a target, fuzzes it from within and over HTTP, and judges what it has become."""

from __future__ import annotations

import collections
import http.client
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from mutations import MARK  # noqa: E402
from traffic import SESSION, VERBS, Sent, Traffic  # noqa: E402

from transfer.agreement.wire import ROUTES  # noqa: E402
from transfer.worker.openapi import document  # noqa: E402

WARM = 2000  # messages before memory and descriptors are counted
MAX_GROWTH = 64 * 2**20  # bytes
MAX_DESCRIPTORS = 2
DEADLINE_S = 20.0  # one request over HTTP
MALFORMED = {400}  # uvicorn's, when the bytes are no HTTP
ENVELOPES = [
    b"Transfer-Encoding: chunked\r\n", b"Upgrade: websocket\r\nConnection: Upgrade\r\n", b"Content-Length: 3\r\n",
    b"Expect: 100-continue\r\n", b"Content-Type: application/x-pickle\r\n", b"X: " + b"y" * 200_000 + b"\r\n",
    b"Content-Encoding: gzip\r\n", b"X-HTTP-Method-Override: GET\r\n", b"Connection: close\r\n", b"\xff: \xff\r\n",
]  # fmt: skip


@dataclass
class Outcome:
    """What came of one attack."""

    violations: list[str] = field(default_factory=list)
    table: collections.Counter[tuple[str, str, int]] = field(default_factory=collections.Counter)  # way, verb, status
    done: collections.Counter[str] = field(default_factory=collections.Counter)
    growth: int = 0  # bytes of resident memory
    peak: int = 0
    descriptors: int = 0  # more than before
    slowest: float = 0.0

    @property
    def messages(self) -> int:
        return sum(self.table.values())

    def __str__(self) -> str:
        statuses = sorted({status for _, _, status in self.table})
        rows = [f"{'':30}" + "".join(f"{status:>8}" for status in statuses)]
        for verb in VERBS:
            counts = [sum(n for (_, v, s), n in self.table.items() if (v, s) == (verb, status)) for status in statuses]
            rows.append(f"{verb:30}" + "".join(f"{count or '':>8}" for count in counts))
        valid = {name.removeprefix("valid "): count for name, count in self.done.items() if name.startswith("valid ")}
        over_http = sum(count for (how, _, _), count in self.table.items() if how == "http")
        return "\n".join(
            [
                *rows,
                f"{self.messages} messages, {over_http} of them over HTTP; {sum(valid.values())} were unchanged and "
                f"accepted, and weights were replaced {self.done['flips']} times",
                f"violations {len(self.violations)}; memory +{self.growth / 2**20:.1f} MiB, at most "
                f"{self.peak / 2**20:.0f}; descriptors {self.descriptors:+d}; slowest message {self.slowest:.2f} s",
            ]
        )


class Target:
    """A running target.py."""

    def __init__(self, process: subprocess.Popen[str], folder: str) -> None:
        self._process, self._folder = process, folder

    def start(self, way: str, seed: int = 0, hole: str | None = None) -> dict[str, Any]:
        """Make the worker; its port and token, and the material for messages."""
        return self.do("start", seed=seed, way=way, hole=hole, folder=self._folder)

    def do(self, what: str, **job: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": what, **job}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the target died at {what} {job}"
        return json.loads(line)


@contextmanager
def running() -> Iterator[Target]:
    """A target process, which ends with the context."""
    command = [sys.executable, str(HERE / "target.py")]
    with (
        tempfile.TemporaryDirectory(prefix="fuzz-") as folder,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
    ):
        try:
            yield Target(process, folder)
        finally:
            process.kill()


def attack(way: str, seed: int, count: int, over_http: int = 0, hole: str | None = None) -> Outcome:
    """Send `count` messages to a new worker, and `over_http` more from here, unless a violation ends it before."""
    outcome = Outcome()
    Path(MARK).unlink(missing_ok=True)
    with running() as target:
        told = target.start(way, seed, hole)
        before = target.do("fuzz", count=min(count, WARM))
        if over_http and not before["violations"]:
            outcome.violations += _over_http(target, told, seed, over_http, outcome.table)
        after = before if before["violations"] else target.do("fuzz", count=max(0, count - WARM))
    outcome.violations += after["violations"] + [f"seed {seed}: audit event {event}" for event in after["audit"]]
    outcome.table.update({("app", verb, status): n for verb, status, n in after["table"]})
    outcome.done.update(after["done"])
    outcome.growth, outcome.peak = after["memory"] - before["memory"], after["peak"]
    outcome.descriptors, outcome.slowest = after["descriptors"] - before["descriptors"], after["slowest"]
    if outcome.growth > MAX_GROWTH:
        more = f"{outcome.growth / 2**20:.0f} MiB of memory"
        outcome.violations.append(f"seed {seed}: {more} more than after {WARM} messages")
    if outcome.descriptors > MAX_DESCRIPTORS:
        outcome.violations.append(f"seed {seed}: {outcome.descriptors} descriptors more than after {WARM} messages")
    if Path(MARK).exists():
        outcome.violations.append(f"seed {seed}: a pickle has written {MARK}")
    return outcome


def joined(outcomes: list[Outcome]) -> Outcome:
    """Several attacks as one."""
    whole = Outcome()
    for outcome in outcomes:
        whole.violations += outcome.violations
        whole.table.update(outcome.table)
        whole.done.update(outcome.done)
        for name in ("growth", "peak", "descriptors", "slowest"):
            setattr(whole, name, max(getattr(whole, name), getattr(outcome, name)))
    return whole


# --- from outside -----------------------------------------------------------------------------------------------------


def _over_http(
    target: Target, told: dict[str, Any], seed: int, count: int, table: collections.Counter[tuple[str, str, int]]
) -> list[str]:
    """What went wrong with `count` messages over real HTTP, and with a trainer's update after them."""
    violations = []
    traffic = Traffic(seed + 1_000_000, told["material"])
    documented = _documented()
    with Client(told["port"], told["token"]) as client:
        for index in range(count):
            if index % 20 == 0:
                status = client.json(Sent("status", b"", b"", True))
                waits = target.do("place", version=_upcoming(status))
            sent = traffic.next(status, waits["where"], waits["digest"], one_shot=False)
            envelope = traffic.random.choice(ENVELOPES) if traffic.random.random() < 0.03 else b""
            code, body = client.send(sent, envelope)
            table["http", sent.verb, code] += 1
            malformed = code in MALFORMED and (envelope or sent.query)
            if not malformed and code not in documented[sent.verb]:
                violations.append(f"seed {seed}, message {index} over HTTP: status {code}, {body[:200]!r}\n    {sent}")
        violations += trainer_can_go_on(target, client, traffic, seed)
    return violations


def trainer_can_go_on(target: Target, client: Client, traffic: Traffic, seed: int) -> list[str]:
    """After all that, an update arrives, and completions are of it."""
    for verb in ("wake_up", "resume"):
        client.send(Sent(verb, b"", b"", True))
    said: list[Any] = []
    traffic.at_once = 0.0
    for verb in [
        *SESSION[:1] * 4,
        *SESSION,
    ]:  # a new epoch forgets what was withdrawn before
        status = client.json(Sent("status", b"", b"", True))
        waits = target.do("place", version=_upcoming(status))
        message = traffic.valid(verb, status, waits["where"], waits["digest"], one_shot=False)
        said.append(client.send(Sent(verb, b"", json.dumps(message).encode(), True)))
    client.send(Sent("resume", b"", b"", True))  # refused before, if the weights had been withdrawn
    seen, status = target.do("look"), client.json(Sent("status", b"", b"", True))
    code, body = client.send(Sent("completions", b"", b'{"prompt": [3, 4], "max_tokens": 2}', True))
    served = json.loads(body)["choices"][0]["weight_version"] if code == 200 else body
    if status["phase"] == "ready" and seen["live"] == waits["digest"] and served == status["version"]:
        return []
    return [f"seed {seed}: no update arrives any more: {said}, {status}, completion {served}, live {seen['live']}"]


def _upcoming(status: dict[str, Any]) -> int:
    newest = -1 if status["newest"] is None else status["newest"]
    return newest + 1 if status["target"] is None else status["target"]


def _documented() -> dict[str, set[int]]:
    operations = [operation for path in document(ROUTES)["paths"].values() for operation in path.values()]
    return {each["operationId"]: {int(status) for status in each["responses"]} - MALFORMED for each in operations}


class Client:
    """Writes requests byte by byte, so that they may be wrong; keeps its connection as long as the worker does."""

    def __init__(self, port: int, token: str) -> None:
        self._port, self._token = port, token
        self._socket: socket.socket | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def json(self, sent: Sent) -> dict[str, Any]:
        code, body = self.send(sent)
        assert code == 200, (code, body)
        return json.loads(body)

    def send(self, sent: Sent, envelope: bytes = b"") -> tuple[int, bytes]:
        """The status and the body; a connection that the worker had closed is opened again."""
        method, path = sent.route
        query = b"?" + sent.query if sent.query else b""
        head = f"{method} {path}".encode() + query + b" HTTP/1.1\r\nHost: a\r\n"
        head += f"Authorization: Bearer {self._token}\r\nContent-Length: {len(sent.body)}\r\n".encode()
        data = head + envelope + b"\r\n" + sent.body
        for attempt in range(2):
            try:
                return self._exchange(method, data, bool(envelope))
            except (ConnectionError, http.client.HTTPException):
                self._close()
                if attempt:
                    raise
        raise AssertionError

    def _exchange(self, method: str, data: bytes, once: bool) -> tuple[int, bytes]:
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self._port), DEADLINE_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(ConnectionError):  # the answer may come before all was sent
            self._socket.sendall(data)
        response = http.client.HTTPResponse(self._socket, method=method)
        response.begin()
        body = response.read()
        if once or response.will_close:
            self._close()
        return response.status, body

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
