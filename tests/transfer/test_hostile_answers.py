"""Whatever a worker or a server answers: one line that names it, no escape sequence, little memory, no traceback."""

import gzip
import json
import socket
import threading
import time
import tracemalloc
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

import pytest
import torch

from transfer.agreement import protocol, wire
from transfer.backends.make import make_publisher
from transfer.config import IpcConfig, SenderConfig
from transfer.trainer import answers
from transfer.trainer.senders import kept_alive
from transfer.trainer.senders.http import HttpSender
from transfer.trainer.session import Session
from transfer.vllm.stock import StockServer

OK = "HTTP/1.1 200 OK\r\n"
WEIGHTS = {"w": torch.zeros(3)}
STATUS = {"phase": "empty", "boot": "b", "epoch": 0, "trainer": "", "version": None, "newest": None, "dtype": "float32"}


def said(value, head=OK):
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return f"{head}Content-Length: {len(body)}\r\nContent-Type: application/json\r\n\r\n".encode() + body


@contextmanager
def server_that_says(answer, endless=b""):
    """A real server: each request gets `answer`, bytes or a function of its path, then `endless` until it hangs up."""

    def talk(connection):
        with connection, suppress(OSError):
            while head := connection.recv(65536):
                path = head.split(b" ", 2)[1].decode()
                while head.startswith(b"POST") and not complete(head):
                    head += connection.recv(65536)
                connection.sendall(answer(path) if callable(answer) else answer)
                while endless:
                    connection.sendall(endless)

    def serve():
        with suppress(OSError):
            while True:
                threading.Thread(target=talk, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def complete(request):
    head, _, body = request.partition(b"\r\n\r\n")
    lengths = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
    return b"\r\n\r\n" in request and len(body) >= sum(lengths)


def refused(url, verb="status", body=None, timeout_s=20.0):
    sender = HttpSender(url, None, "worker 3", timeout_s)
    try:
        with pytest.raises(wire.RemoteError) as caught:
            sender.call(verb, body or {})
    finally:
        sender.close()
    line = str(caught.value)
    assert line.startswith(f"worker 3 ({url}): {verb}: ") and line.isprintable() and len(line) < 2200
    return line


NOT_JSON = {
    "binary": b"\0\xff\x1b[2J",
    "half an object": b'{"a": ',
    "a constant": b'{"epoch": NaN}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000,
    "a long number": b'{"epoch": ' + b"9" * 5000 + b"}",
    "a gzip without a word": gzip.compress(b"{}"),
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
def test_an_answer_that_is_not_json_is_one_line(body):
    with server_that_says(said(body)) as url:
        assert "the answer is not JSON: b'" in refused(url)


def test_an_encoding_that_nobody_has_asked_for_is_not_unpacked():
    bomb = gzip.compress(b"[" * 10**7)
    with server_that_says(said(bomb, OK + "Content-Encoding: gzip\r\n")) as url:
        assert "the answer is encoded, which was not asked for: b'gzip'" in refused(url)


ENDLESS = {
    "a body without a length": (OK.encode() + b"\r\n", b"x" * 65536),
    "a body with one": (OK.encode() + b"Content-Length: 99999999999\r\n\r\n", b"x" * 65536),
    "chunks": (OK.encode() + b"Transfer-Encoding: chunked\r\n\r\n", b"8000\r\n" + b"x" * 0x8000 + b"\r\n"),
    "chunks of a byte": (OK.encode() + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 8192),
    "a header": (OK.encode() + b"X: ", b"y" * 65536),
    "headers": (OK.encode(), b"X: y\r\n" * 8192),
    "a trailer": (OK.encode() + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: ", b"y" * 65536),
    "words before it": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 2048),
    "a reason": (b"HTTP/1.1 500 ", b"n" * 65536),
}


@pytest.mark.parametrize("begin, endless", ENDLESS.values(), ids=ENDLESS)
def test_an_endless_answer_ends_after_little_memory_and_long_before_the_deadline(begin, endless, monkeypatch):
    monkeypatch.setattr(wire, "MAX_CONTROL_BYTES", 2**20)
    with server_that_says(begin, endless) as url:
        tracemalloc.start()
        try:
            line = refused(url, timeout_s=600.0)
            assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
        finally:
            tracemalloc.stop()
    assert "bytes that it may have" in line or "the answer is not HTTP" in line


def test_a_long_answer_that_was_asked_for_is_taken():
    body = {"prompt": [[1]] * 100, "n": 10, "max_tokens": 100}
    assert answers.most_bytes(body) == wire.MAX_CONTROL_BYTES + 512 * 100 * 10 * 100
    assert answers.most_bytes({}) == answers.most_bytes({"prompt": 5, "n": "x"}) == kept_alive.MAX_BODY
    long = {"a": "x" * (wire.MAX_CONTROL_BYTES + 2**20)}
    with server_that_says(said(long)) as url:
        sender = HttpSender(url, None, "worker 3", 20.0)
        assert sender.call("completions", body) == long
        sender.close()
        assert "bytes that it may have" in refused(url, "completions", {"prompt": [[1]], "max_tokens": 1})


@pytest.mark.parametrize("cut", [5, 20, 60])
def test_a_head_in_two_pieces_before_a_long_body_is_read(cut):
    long = {"a": "x" * 2**20}
    whole = said(long)

    def talk():
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(whole[:cut])
            go_on.wait(20)
            connection.sendall(whole[cut:])

    go_on, feed = threading.Event(), kept_alive._Reading.feed

    def feeding(reading, data):
        feed(reading, data)
        if not go_on.is_set():
            go_on.set()
            time.sleep(0.05)  # more than one read takes has come

    with pytest.MonkeyPatch.context() as patched, socket.create_server(("127.0.0.1", 0)) as listener:
        patched.setattr(kept_alive._Reading, "feed", feeding)
        threading.Thread(target=talk, daemon=True).start()
        sender = HttpSender(f"http://127.0.0.1:{listener.getsockname()[1]}", None, "worker 3", 20.0)
        assert sender.call("status", {}) == long
        sender.close()


ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e\nsecond line\r\x00"


@pytest.mark.parametrize(
    "answer",
    [
        said({"error": {"message": ESCAPES, "code": 409}}, "HTTP/1.1 409 No\r\n"),
        said({"detail": [{"msg": ESCAPES}] * 2000}, "HTTP/1.1 422 No\r\n"),
        said({"error": "\ud800" * 3 + ESCAPES * 1000}, "HTTP/1.1 500 No\r\n"),
        said(ESCAPES.encode(), "HTTP/1.1 500 No\r\n"),
        said(b"[" * 100_000, "HTTP/1.1 500 No\r\n"),
        said(b"", "HTTP/1.1 500 \x9b31m\r\n"),
        said({"epoch": ESCAPES}),
        said({"boot": [ESCAPES] * 50}),
    ],
)
def test_no_words_of_a_worker_reach_the_terminal_as_they_came(answer):
    with server_that_says(answer) as url:
        refused(url).encode()


NO_STATUS = {
    "no object": [1, 2],
    "an empty one": {},
    "an epoch below 0": STATUS | {"epoch": -1},
    "an epoch of 31 digits": STATUS | {"epoch": 10**30},
    "an epoch in words": STATUS | {"epoch": "x"},
    "half an epoch": STATUS | {"epoch": 1.5},
    "no epoch": STATUS | {"epoch": None},
    "true": STATUS | {"epoch": True},
    "a version beyond all": STATUS | {"newest": 10**18},
    "a version in words": STATUS | {"version": "3"},
    "versions": STATUS | {"version": [3, 4]},
    "an unknown dtype": STATUS | {"dtype": "float33"},
    "a dtype that is a list": STATUS | {"dtype": ["float32"]},
    "a boot of any length": STATUS | {"boot": "b" * 5000},
    "a trainer that is an object": STATUS | {"trainer": {}},
    "nothing of the newest": {key: value for key, value in STATUS.items() if key != "newest"},
}


@contextmanager
def session():
    config = IpcConfig(sender=SenderConfig(timeout_s=5.0))
    publisher = make_publisher(config, None)
    from transfer.agreement.journal import Journal
    from transfer.config import InFlight

    with Session(publisher, config, InFlight.wait, Journal()) as made:
        yield made


@pytest.mark.parametrize("status", NO_STATUS.values(), ids=NO_STATUS)
def test_a_session_is_not_opened_with_a_worker_whose_status_makes_no_sense(status):
    with server_that_says(said(status)) as url, session() as transfer:
        sender = HttpSender(url, None, "worker 3", 5.0)
        with pytest.raises(wire.TransferError) as caught:
            transfer.open(WEIGHTS, [sender])
        sender.close()
    assert f"asking for the status failed: worker 3 ({url}): status: the answer makes no sense: " in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_an_infinite_epoch_is_none():
    with server_that_says(said(json.dumps(STATUS).replace('"epoch": 0', '"epoch": 1e999').encode())) as url:
        assert "epoch cannot be inf" in refused(url)


@pytest.mark.parametrize("field, words", [("epoch", "its epoch is"), ("newest", "its version is")])
def test_a_worker_whose_numbers_the_others_could_not_follow_is_named_and_they_are_told_none(field, words):
    far = STATUS | {field: 2 * protocol.AHEAD}
    heard = []

    def honest(path):
        heard.append(path)
        return said(STATUS)

    with server_that_says(honest) as one, server_that_says(said(far)) as other, session() as transfer:
        senders = [HttpSender(one, None, "worker 0", 5.0), HttpSender(other, None, "worker 1", 5.0)]
        with pytest.raises(wire.TransferError, match=rf"worker 1 \({other}\) says that {words} {2 * protocol.AHEAD}"):
            transfer.open(WEIGHTS, senders)
        for sender in senders:
            sender.close()
    assert urlsplit(one).port and set(heard) <= {"/status", "/init_weight_transfer_engine"}


# --- vLLM's own servers -----------------------------------------------------------------------------------------------

ASKED = {"prompt": [[1, 2]], "seeds": [5], "n": 2, "max_tokens": 3, "temperature": 1.0, "stop_token_ids": [49]}


def choice(index=0, **changes):
    made = {"index": index, "token_ids": [5, 49], "logprobs": {"token_logprobs": [-0.5, -0.1]}, "finish_reason": "stop"}
    return {key: value for key, value in (made | changes).items() if value != "missing"}


def spoilt(**changes):
    return [choice(), choice(1, **changes)]


CHOICES = {
    "a token below 0": spoilt(token_ids=[-1, 49]),
    "a token of 31 digits": spoilt(token_ids=[10**30, 49]),
    "a token in words": spoilt(token_ids=["5", 49]),
    "half a token": spoilt(token_ids=[1.5, 49]),
    "a whole number with a point": spoilt(token_ids=[5.0, 49]),
    "no token": spoilt(token_ids=[None, 49]),
    "true": spoilt(token_ids=[True, 49]),
    "tokens that are no list": spoilt(token_ids="ab"),
    "more tokens than asked for": spoilt(token_ids=[5] * 4, logprobs={"token_logprobs": [-1.0] * 4}),
    "a probability of 148": spoilt(logprobs={"token_logprobs": [5.0, -0.1]}),
    "a log-prob that is no number": spoilt(logprobs={"token_logprobs": ["-1", -0.1]}),
    "no log-prob": spoilt(logprobs={"token_logprobs": [None, -0.1]}),
    "one log-prob for two": spoilt(logprobs={"token_logprobs": [-0.1]}),
    "log-probs that are an object": spoilt(logprobs={"token_logprobs": {}}),
    "no log-probs": spoilt(logprobs=None),
    "log-probs without tokens'": spoilt(logprobs={}),
    "an unknown end": spoilt(finish_reason="\x1b[2J"),
    "no end": spoilt(finish_reason=None),
    "without an end": spoilt(finish_reason="missing"),
    "without tokens": spoilt(token_ids="missing"),
    "one choice": [choice()],
    "three choices": [choice(), choice(1), choice(2)],
    "a choice twice": [choice(), choice()],
    "choices that are words": ["a", "b"],
    "choices that are numbers": [1, 2],
    "an index in words": [choice("0"), choice(1)],
    "no choices": None,
    "an object": {"0": choice()},
}
RAW = {
    "an infinite log-prob": json.dumps({"choices": spoilt()}).replace("-0.5", "-1e999"),
    "an infinite token": json.dumps({"choices": spoilt()}).replace("[5,", "[1e999,"),
    "a log-prob that is NaN": json.dumps({"choices": spoilt()}).replace("-0.5", "NaN"),
    "an infinite index": json.dumps({"choices": spoilt()}).replace('"index": 1', '"index": 1e999'),
}
COMPLETIONS = {name: json.dumps({"choices": choices}) for name, choices in CHOICES.items()} | RAW


@pytest.mark.parametrize("raw", COMPLETIONS.values(), ids=COMPLETIONS)
def test_a_completion_that_no_sampler_can_have_said_is_refused(raw):
    with server_that_says(said(raw.encode())) as url:
        server = StockServer(url, 5.0)
        server.version = 0
        with pytest.raises(wire.RemoteError) as caught:
            server.complete(ASKED)
        server.close()
    line = str(caught.value)
    assert line.startswith(f"vLLM ({url}): v1/completions: the answer ") and line.isprintable() and len(line) < 400


def test_a_completion_of_a_sampler_is_taken_as_it_is():
    ends = [choice(finish_reason="length"), choice(1, token_ids=[], logprobs=None, finish_reason="abort")]
    with server_that_says(said({"choices": ends[::-1]})) as url:
        server = StockServer(url, 5.0)
        server.version = 4
        first, second = server.complete(ASKED)["choices"]
        server.close()
    assert first["token_ids"] == [5, 49] and first["logprobs"]["token_logprobs"] == [-0.5, -0.1]
    assert second["token_ids"] == [] and second["finish_reason"] == "abort"
    assert first["weight_versions"] == [[4, 2]]


@pytest.mark.parametrize("ranks", [0, -1, 1.5, "1", None, 10**30, True, [1]])
def test_a_server_without_a_number_of_ranks_is_refused(ranks):
    def answer(path):
        return said({"world_size": ranks} if "world" in path else {"is_sleeping": False})

    with (
        server_that_says(answer) as url,
        pytest.raises(wire.TransferError, match="its answers are not vLLM's") as caught,
    ):
        StockServer(url, 5.0).open(WEIGHTS)
    assert url in str(caught.value)


@pytest.mark.parametrize("version", ["0." + "9" * 5000, "\x1b[2J", None, [], {"a": 1}, "0.33.0\n0.24"])
def test_a_server_without_a_version_is_refused_in_one_line(version):
    def answer(path):
        told = {"/version": {"version": version}, "/is_sleeping": {"is_sleeping": False}, "/weight_info": [1]}
        return said({"world_size": 1} if "world" in path else told.get(path, {}))

    with (
        server_that_says(answer) as url,
        pytest.raises(wire.TransferError, match="cannot tell which dialect") as caught,
    ):
        StockServer(url, 5.0).open(WEIGHTS)
    assert url in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 400
