"""reward=http against a real server: what it is sent, when it is asked again, and what ends the run."""

from __future__ import annotations

import contextlib
import email.utils
import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.assembly.matter import gathered
from rlhf.assembly.site import opened
from rlhf.config import HttpRewardConfig
from rlhf.preflight.before_torch import look
from rlhf.ranks.place import Place
from rlhf.rewards import HttpReward, WeightedSum, post, usable
from rlhf.run import run
from rlhf.shell.ending import RunError
from rlhf.types import Prompt

Answer = tuple[int, dict[str, str], bytes]


def scored(asked: dict[str, Any]) -> Answer:
    """The honest server: a completion's length; null for none at all."""
    rewards = [len(text) or None for text in asked["completions"]]
    return 200, {}, json.dumps({"rewards": rewards}).encode()


def says(status: int, body: object = b"", **headers: str) -> Answer:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, text


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(b"1," * 32768)


@dataclass
class Server:
    """Answers the n-th request with `script[n]`, if there is one, and honestly from then on."""

    script: list[Answer | Callable[[BaseHTTPRequestHandler], None]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    url: str = ""

    @contextlib.contextmanager
    def running(self, port: int = 0) -> Iterator[Server]:
        server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_port}/score"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.socket.close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        ours = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                ours.asked.append(asked)
                ours.headers.append(dict(self.headers))
                number = len(ours.asked) - 1
                answer = ours.script[number] if number < len(ours.script) else scored(asked)
                if callable(answer):
                    answer(self)
                    return
                status, headers, body = answer
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture
def server() -> Iterator[Server]:
    with Server().running() as running:
        yield running


def reward(server: Server, **options: Any) -> HttpReward:
    return HttpReward(HttpRewardConfig(**{"url": server.url, "timeout_s": 5.0} | options))


def ask(reward: HttpReward, *answers: str) -> list[float | None]:
    return reward([Prompt(f"{n}?", (n,), {"answer": n}) for n in range(len(answers))], answers)


def test_texts_and_columns_are_sent_in_batches_and_null_is_a_sample_left_out(server):
    assert ask(reward(server, batch_size=2), "a", "bb", "", "dddd", "eeeee") == [1.0, 2.0, None, 4.0, 5.0]
    assert server.asked == [
        {"prompts": ["0?", "1?"], "completions": ["a", "bb"], "columns": {"answer": [0, 1]}},
        {"prompts": ["2?", "3?"], "completions": ["", "dddd"], "columns": {"answer": [2, 3]}},
        {"prompts": ["4?"], "completions": ["eeeee"], "columns": {"answer": [4]}},
    ]


@settings(max_examples=25)
@given(st.lists(st.text(max_size=5), min_size=1, max_size=9), st.integers(1, 4))
def test_any_texts_arrive_as_they_are_whatever_the_batches(answers, batch_size):
    with Server().running() as server:
        assert ask(reward(server, batch_size=batch_size), *answers) == [len(text) or None for text in answers]
        assert [text for asked in server.asked for text in asked["completions"]] == answers
        assert len(server.asked) == -(-len(answers) // batch_size)


def test_the_token_comes_from_the_environment_and_nothing_else_is_ever_sent(server, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("RLHF_REWARD_TOKEN", raising=False)
    ask(reward(server), "a")
    monkeypatch.setenv("RLHF_REWARD_TOKEN", "abc\n")
    ask(reward(server), "a")
    monkeypatch.setenv("OTHER", "def")
    ask(reward(server, token_variable="OTHER"), "a")
    assert [headers.get("Authorization") for headers in server.headers] == [None, "Bearer abc", "Bearer def"]


def test_a_token_that_no_header_can_carry_is_refused_without_being_shown(server, monkeypatch):
    monkeypatch.setenv("RLHF_REWARD_TOKEN", "se\ncret")
    with pytest.raises(ValueError, match=r"environment variable RLHF_REWARD_TOKEN must be a token") as error:
        reward(server)
    assert "cret" not in str(error.value)


def ended(reward: HttpReward, *answers: str) -> None:
    """As a run does, which ends where too few samples have a reward."""
    usable(ask(reward, *answers), 0.5, reward.report.error)


# --- asked again: only where the server has not begun -----------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("wait", ["0", email.utils.formatdate(0, usegmt=True)])
def test_a_busy_server_that_names_a_time_is_asked_again(server, status, wait):
    server.script = [says(status, Retry_After=wait)] * 2
    assert ask(reward(server, retries=2), "abc") == [3.0]
    assert len(server.asked) == 3 and server.asked[0] == server.asked[2]


def test_the_time_that_a_busy_server_names_is_waited(server):
    server.script = [says(503, Retry_After="1")]
    start = time.monotonic()
    assert ask(reward(server), "abc") == [3.0]
    assert time.monotonic() - start >= 1.0


def test_a_server_that_stays_busy_ends_the_run_after_its_retries(server):
    server.script = [says(503, Retry_After="0")] * 9
    with pytest.raises(RunError, match=rf"reward\.url={server.url} answered 503 3 time\(s\): .*reward\.retries \(2\)"):
        ended(reward(server, retries=2), "a")
    assert len(server.asked) == 3


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def test_a_server_that_starts_a_moment_later_is_waited_for():
    port, late = free_port(), Server()
    stop = threading.Event()

    def start() -> None:
        time.sleep(0.2)
        with late.running(port):
            stop.wait(20)

    thread = threading.Thread(target=start)
    thread.start()
    try:
        assert ask(HttpReward(HttpRewardConfig(url=f"http://127.0.0.1:{port}/score")), "abc") == [3.0]
    finally:
        stop.set()
        thread.join()
    assert len(late.asked) == 1


def test_a_server_that_is_not_there_ends_the_run_with_its_address():
    url = f"http://127.0.0.1:{free_port()}/score"
    with pytest.raises(RunError, match=rf"reward\.url={url} refused the connection 2 time\(s\): look whether it runs"):
        ended(HttpReward(HttpRewardConfig(url=url, retries=1)), "a")


def test_a_server_that_is_not_there_is_noticed_before_a_worker_is_started_or_anything_trained(
    compose_run, tmp_path, monkeypatch
):
    monkeypatch.setattr("rlhf.assembly.warm_up.sft", lambda *_: pytest.fail("SFT began"))
    url = f"http://127.0.0.1:{free_port()}/score"
    for reward in (
        ["reward=http", f"reward.url={url}", "reward.retries=0"],
        ["reward=sum", f"reward.parts={{mine: {{kind: http, url: '{url}', retries: 0}}}}"],
    ):
        key = "reward.parts.mine.url" if reward[0] == "reward=sum" else "reward.url"
        config = compose_run("experiment=smoke", "task.prompts=64", *reward)
        with pytest.raises(RunError, match=rf"^{key}={url} refused the connection 1 time\(s\): look whether it runs"):
            run(config, tmp_path / "run")
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["status.json"]


@pytest.mark.parametrize("seen_before", [True, False])
@pytest.mark.parametrize(
    "choice", ["reward=http reward.url={}", "reward=sum reward.parts={{mine:{{kind:http,url:'{}'}}}}"]
)
def test_a_server_is_looked_for_once_before_a_run(compose_run, tmp_path, seen_before, choice):
    with socket.create_server(("127.0.0.1", 0)) as listening, contextlib.ExitStack() as stack:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/score"
        config = compose_run("experiment=smoke", "task.prompts=64", *choice.format(url).split())
        gathered(opened(config, tmp_path / "run", stack, Place()), look(config) if seen_before else None)
        listening.setblocking(False)
        listening.accept()[0].close()
        with pytest.raises(BlockingIOError):
            listening.accept()


def test_looking_for_the_server_waits_for_it_and_sends_it_nothing(server):
    reward(server).check()
    assert server.asked == [] and server.headers == []
    with pytest.raises(RunError, match=r"reward\.url=.* cannot be reached: .*"):
        HttpReward(HttpRewardConfig(url="http://nowhere.invalid/score")).check()


# --- never asked again ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (says(500, b"out of memory"), r"answered 500: 'out of memory'"),
        (says(500, Retry_After="0"), r"answered 500"),
        (says(503), r"answered 503"),
        (says(503, Retry_After="later"), r"answered 503 with Retry-After: later, .*reward\.timeout_s=5 seconds"),
        (says(429, Retry_After="3600"), r"answered 429 with Retry-After: 3600, .*at most reward\.timeout_s=5 seconds"),
        (says(401), r"answered 401 \(token: the environment variable RLHF_REWARD_TOKEN\)"),
        (says(302, Location="/score"), r"answered 302"),
        (says(204), r"answered 204"),
        (says(200, b"<html>"), r"must answer \{\"rewards\": \[\.\.\.\]\} \(got '<html>'\)"),
        (says(200, b"\xff\xfe"), r"must answer"),
        (says(200, [1.0, 2.0]), r"must answer"),
        (says(200, {"reward": [1.0, 2.0]}), r"must answer"),
        (says(200, {"rewards": [1.0]}), r"must return a list of 2 numbers or None \(got 1 values\)"),
        (says(200, {"rewards": 1.0}), r"must return a list of 2 numbers or None \(got float\)"),
        (says(200, {"rewards": [[1.0], "2"]}), r"must return finite numbers or None \(got '2'\)"),
        (says(200, b'{"rewards": ["1", 1' + b"0" * 400 + b"]}"), r"must return finite numbers or None"),
        (says(200, b"[" * 100_000), r"must answer"),
        (says(500, b"\x1b[2J\x9b"), r"answered 500: '\\x1b\[2J"),
        (says(503, Retry_After="\x1b[2J"), r"answered 503 with Retry-After: \\x1b\[2J, and"),
        (
            says(200, gzip.compress(b"{}"), Content_Encoding="gzip"),
            r"gave no answer: ValueError: the answer is encoded",
        ),
        (lambda handler: endless(handler), r"gave no answer: ValueError: the answer has more than 1048576 bytes"),
        (lambda handler: handler.wfile.write(b"\x1b[2J\r\n\r\n"), r"gave no answer: ConnectionError: .*\\x1b\[2J"),
        (lambda handler: handler.connection.shutdown(socket.SHUT_RDWR), r"gave no answer: ConnectionError"),
        (says(200, b'{"rewards": [1', Content_Length="99"), r"gave no answer|must answer"),
    ],
)
def test_a_broken_answer_ends_the_run_with_the_address_after_one_request(server, answer, message, monkeypatch):
    monkeypatch.setattr(post, "MOST_BYTES", 2**20)
    server.script = [answer]
    with pytest.raises(
        RunError, match=rf"^2 of 2 samples have no reward .*: reward\.url={server.url} {message}"
    ) as caught:
        ended(reward(server), "a", "bb")
    assert len(server.asked) == 1 and str(caught.value).isprintable()


def test_rewards_that_are_no_finite_numbers_are_none_and_are_counted(server):
    server.script = [says(200, b'{"rewards": [NaN, 1, true, Infinity, -1e999, null]}')]
    asked = reward(server)
    assert ask(asked, *"abcdef") == [None, 1.0, 1.0, None, None, None]
    assert asked.report.counts == {"not_finite": 3} and asked.report.errors == 0
    assert ask(asked, "ab") == [2.0] and asked.report.counts == {}


def silence(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(20)


def drip(handler: BaseHTTPRequestHandler) -> None:
    """A header that never ends; no pause is as long as the deadline."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    with contextlib.suppress(OSError):
        for _ in range(400):
            handler.wfile.write(b"x")
            time.sleep(0.05)


@pytest.mark.parametrize("slow", [silence, drip])
def test_an_answer_after_the_deadline_ends_the_run_at_the_deadline_after_one_request(server, slow):
    server.script = [slow]
    start = time.monotonic()
    with pytest.raises(RunError, match=rf"reward\.url={server.url} did not answer within reward\.timeout_s=0\.5 sec"):
        ended(reward(server, timeout_s=0.5), "a")
    assert time.monotonic() - start < 10 and len(server.asked) == 1


def test_a_request_that_fails_costs_its_own_samples_which_are_counted_by_what_befell_them(server):
    refused, garbled, dropped = says(500), says(200, b"<html>"), lambda handler: handler.connection.shutdown(2)
    server.script = [refused, silence, garbled, says(200, {"rewards": [2, "x"]}), dropped]
    asked = reward(server, batch_size=2, timeout_s=1.0)
    assert ask(asked, *"abcdefghijkl") == [None] * 6 + [2.0, None] + [None] * 2 + [1.0] * 2, "never 0"
    assert asked.report.counts == {"refused": 2, "timed_out": 2, "not_a_number": 2 + 1, "raised": 2}
    assert asked.report.errors == 9 and asked.report.error.startswith(f"reward.url={server.url} gave no answer")


def test_so_many_requests_as_asked_for_are_at_the_server_at_once_and_rewards_are_in_order(server):
    together = threading.Barrier(3)

    def waits(handler: BaseHTTPRequestHandler) -> None:
        """Answers once three requests are there."""
        together.wait(20)
        body = json.dumps({"rewards": [len(server.asked[-1]["prompts"])]}).encode()
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + body)

    server.script = [waits] * 6
    assert ask(reward(server, batch_size=1, concurrency=3, timeout_s=30), *"abcdef") == [1.0] * 6
    server.script = []
    many = ["x" * length for length in range(1, 40)]
    assert ask(reward(server, batch_size=2, concurrency=8), *many) == [float(len(text)) for text in many]


def test_a_server_works_beside_the_other_parts_of_a_sum(server):
    there, asked = threading.Event(), reward(server)

    def slow(handler: BaseHTTPRequestHandler) -> None:
        there.wait(20)
        handler.wfile.write(b'HTTP/1.0 200 OK\r\n\r\n{"rewards": [1]}')

    def other(prompts: list[Prompt], answers: list[str]) -> list[float]:
        there.set()
        return [2.0]

    server.script = [slow]
    total = WeightedSum({"other": (1.0, other), "server": (1.0, asked)})
    assert total([Prompt("?", (1,), {})], ["a"]) == [3.0]


def test_a_column_that_json_cannot_say_ends_the_run_before_anything_is_sent(server):
    with pytest.raises(RunError, match=rf"reward\.url={server.url} takes JSON, which a column of the task is not"):
        reward(server)([Prompt("?", (1,), {"answer": float("nan")})], ["a"])
    assert server.asked == []


def test_a_server_on_this_machine_is_asked_itself_whatever_proxy_the_environment_names(server, monkeypatch):
    """Without NO_PROXY; nothing listens where the proxy is said to be."""
    for name in ("HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy := f"http://127.0.0.1:{free_port()}")
        monkeypatch.setenv(name.lower(), proxy)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    here = reward(server, retries=0)
    here.check()
    ask(here, "a")
    assert len(server.asked) == 1
    with pytest.raises(RunError, match="ProxyError"):
        ended(reward(server, url="http://reward.invalid/", retries=0), "a")


@pytest.mark.parametrize(
    ("host", "here"),
    [("[::1]", True), ("[::ffff:127.0.0.1]", True), ("reward.localhost", True), ("10.0.0.1", False), ("local", False)],
)
def test_which_addresses_are_this_machine_s(host, here):
    assert post.Post(HttpRewardConfig(url=f"http://{host}:1/"))._here is here
