import json
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from worker_process import PlainModel, fingerprint

from transfer import make_receiver, make_transfer
from transfer.agreement import wire
from transfer.config import DiskConfig, IpcConfig, SenderConfig
from transfer.trainer.senders.direct import DirectSender
from transfer.trainer.senders.http import HttpSender
from transfer.trainer.senders.kept_alive import KeptAlive


class Handler(BaseHTTPRequestHandler):
    """A worker's routes over the standard library's HTTP server; remembers what it was sent."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.command, self.path, dict(self.headers), body, self.client_address))
        status, headers, answer = self.server.respond(self.path, body)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    """An HTTP server on a free port that answers with `respond(path, body) -> (status, headers, bytes)`."""

    daemon_threads = True

    def __init__(self, respond):
        super().__init__(("127.0.0.1", 0), Handler)
        self.handle_error = lambda request, address: None  # a client that has hung up is part of some tests
        self.respond = respond
        self.seen = []
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(respond):
    server = Server(respond)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


@contextmanager
def http_sender(server, timeout_s=20.0, token="secret"):
    sender = HttpSender(server.url, token, "worker 0", timeout_s)
    try:
        yield sender
    finally:
        sender.close()


def answer(status, value, **headers):
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return lambda path, body: (status, headers, raw)


# --- direct -----------------------------------------------------------------------------------------------------------


class Worker:
    def status(self, body):
        return {"seen": body}

    def completions(self, body):
        return wire.Binary(b"\0\xff", wire.COLUMNS_TYPE)

    def pause(self, body):
        raise wire.Refused(409, "not now")


def test_a_direct_call_is_answered_and_a_refusal_names_the_worker():
    sender = DirectSender(Worker(), "worker 7")
    assert sender.call("status", {"a": 1}) == {"seen": {"a": 1}}
    assert sender.call("completions", {}) == {wire.BODY: b"\0\xff"}
    with pytest.raises(wire.RemoteError, match=r"worker 7: pause: not now \(status 409\)") as caught:
        sender.call("pause", {})
    assert caught.value.status == 409


# --- http -------------------------------------------------------------------------------------------------------------


def test_a_verb_becomes_its_route_with_the_token_and_json_over_one_connection():
    with serving(answer(200, {"ok": True})) as server, http_sender(server) as sender:
        for _ in range(3):
            assert sender.call("start_weight_update", {"epoch": 1}) == {"ok": True}
        assert sender.call("status", {"deep": 2}) == {"ok": True}
        method, path, headers, body, _ = server.seen[0]
        assert (method, path, body) == ("POST", "/start_weight_update", b'{"epoch":1}')
        assert headers["Authorization"] == "Bearer secret" and headers["Content-Type"] == "application/json"
        assert server.seen[3][:2] == ("GET", "/status?deep=2")
        assert len({seen[4] for seen in server.seen}) == 1, "one kept-alive connection"


def test_a_connection_that_has_been_idle_for_too_long_is_not_used_again():
    with serving(answer(200, {})) as server, closing(KeptAlive(server.url, idle_s=0.05)) as client:
        for pause_s in (0.0, 0.0, 0.1):
            time.sleep(pause_s)
            client.request("GET", "/status", "", b"", 5.0)
        first, second, third = (seen[4] for seen in server.seen)
        assert first == second != third


@pytest.mark.parametrize(
    "value, message",
    [
        ({"detail": "it is this"}, "it is this"),
        ({"error": "it is that"}, "it is that"),
        ({"error": {"message": "deeper", "code": 400}}, "deeper"),
        ({"detail": [{"loc": ["body"], "msg": "missing"}]}, "missing"),
        (b"plain words", "plain words"),
        (b"", "Conflict"),
        (b"{}", "{}"),
        (b"\xff\xfe", "\ufffd"),
    ],
)
def test_an_error_has_the_servers_own_message(value, message):
    with serving(answer(409, value)) as server, http_sender(server) as sender:
        with pytest.raises(wire.RemoteError) as caught:
            sender.call("pause", {})
        assert caught.value.status == 409 and message in caught.value.reason
        assert str(caught.value).startswith(f"worker 0 ({server.url}): pause: ")


def test_an_empty_answer_or_one_word_is_an_empty_object():
    with serving(answer(200, b"")) as server, http_sender(server) as sender:
        assert sender.call("pause", {}) == {}
    with serving(answer(200, b'"ok"')) as server, http_sender(server) as sender:
        assert sender.call("pause", {}) == {}


@pytest.mark.parametrize("kind", ["application/vnd.rlhf.columns", "Application/VND.rlhf.columns; v=1"])
def test_an_answer_of_bytes_is_handed_on_as_they_are(kind):
    with serving(answer(200, b"\0{}\xff", **{"Content-Type": kind})) as server, http_sender(server) as sender:
        assert sender.call("completions", {}) == {wire.BODY: b"\0{}\xff"}
    refused = answer(409, {"error": {"message": "no"}}, **{"Content-Type": kind})
    with serving(refused) as server, http_sender(server) as sender, pytest.raises(wire.RemoteError, match="no"):
        sender.call("completions", {})


def test_an_answer_that_is_not_json_is_an_error():
    with (
        serving(answer(200, b"<html>")) as server,
        http_sender(server) as sender,
        pytest.raises(wire.RemoteError, match="not JSON"),
    ):
        sender.call("pause", {})


def test_a_redirect_is_not_followed_and_the_token_stays_here():
    with serving(answer(200, {})) as other:
        redirect = answer(307, b"", Location=other.url + "/pause")
        with serving(redirect) as server, http_sender(server) as sender:
            with pytest.raises(wire.RemoteError) as caught:
                sender.call("pause", {})
            assert caught.value.status == 307 and other.seen == []


def test_a_proxy_from_the_environment_is_ignored(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    with serving(answer(200, {"ok": 1})) as server, http_sender(server) as sender:
        assert sender.call("pause", {}) == {"ok": 1}


def test_a_server_that_does_not_answer_is_given_up_at_the_deadline():
    release = threading.Event()

    def hang(path, body):
        release.wait(30)
        return 200, {}, b"{}"

    with serving(hang) as server, http_sender(server, timeout_s=0.2) as sender:
        with pytest.raises(wire.RemoteError, match=r"pause: no answer within 0.2 s") as caught:
            sender.call("pause", {})
        assert caught.value.status == 0
        with pytest.raises(wire.RemoteError, match=r"no answer within 0\.1 s"):
            sender.call("pause", {}, timeout_s=0.1)
        release.set()


def test_a_server_that_is_gone_is_an_error_and_cannot_be_taken_for_a_refusal():
    with serving(answer(200, {})) as server:
        pass
    with http_sender(server) as sender, pytest.raises(wire.RemoteError, match="no connection to") as caught:
        sender.call("status", {})
    assert caught.value.status == 0


def test_calls_from_several_threads_do_not_wait_for_each_other():
    meeting = threading.Barrier(2, timeout=20)

    def meet(path, body):
        meeting.wait()  # passes only if both requests are here at once
        return 200, {}, b'{"met": true}'

    answers = []
    with serving(meet) as server, http_sender(server) as sender:
        threads = [threading.Thread(target=lambda: answers.append(sender.call("pause", {}))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert answers == [{"met": True}] * 2


def receiver_routes(receiver):
    """What a worker's app does with the weight-update routes."""
    verbs = {path: verb for verb, (_, path) in wire.ROUTES.items()}

    def respond(path, body):
        try:
            return 200, {}, json.dumps(getattr(receiver, verbs[path])(wire.loads(body))).encode()
        except wire.Refused as error:
            return error.status, {}, json.dumps({"detail": error.reason}).encode()

    return respond


@pytest.mark.parametrize("config", [IpcConfig(sender=SenderConfig()), DiskConfig(sender=SenderConfig())])
def test_updates_over_http_arrive(config, tmp_path):
    module = PlainModel(seed=0)
    with make_transfer(config, tmp_path) as transfer:
        receiver = make_receiver(transfer.endpoint, module)
        with serving(receiver_routes(receiver)) as server, http_sender(server) as sender:
            transfer.open(PlainModel(1).state_dict(), [sender])
            for version in range(3):
                assert transfer.push(PlainModel(version).state_dict()) == version
                assert fingerprint(module.state_dict()) == fingerprint(PlainModel(version).state_dict())
            update = [body for _, path, _, body, _ in server.seen if path == "/start_weight_update"]
            assert max(map(len, update)) < 200
        receiver.close()


OK = b"HTTP/1.1 200 OK\r\n"
PLAIN = OK + b'Content-Length: 7\r\n\r\n{"a":1}'
ODD_ANSWERS = {
    "in chunks": OK + b'Transfer-Encoding: chunked\r\n\r\n3\r\n{"a\r\n4\r\n":1}\r\n0\r\n\r\n',
    "until the connection ends": OK + b'\r\n{"a":1}',
    "after something else": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + PLAIN,
    "and nothing more on this connection": OK + b'Connection: close\r\nContent-Length: 7\r\n\r\n{"a":1}',
    "from an old server": b"HTTP/1.0 200 OK\r\nContent-Length: 7\r\n\r\n" + b'{"a":1}',
}
BROKEN_ANSWERS = {
    "too short": OK + b'Content-Length: 70\r\n\r\n{"a":1}',
    "not HTTP": b"220 smtp.example.org ESMTP\r\n",
    "nothing": b"",
    "only a continue": b"HTTP/1.1 100 Continue\r\n\r\n",
    "an endless chunk": OK + b"Transfer-Encoding: chunked\r\n\r\nffff\r\n{",
}


@contextmanager
def saying(*answers, pause=0.0):
    """A server that gives each connection the next of these answers, byte by byte if there is a pause, and its end."""

    def serve():
        for said in answers:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                with suppress(OSError):
                    for piece in [said[at : at + 1] for at in range(len(said))] if pause else [said]:
                        connection.sendall(piece)
                        time.sleep(pause)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        sender = HttpSender(f"http://127.0.0.1:{listener.getsockname()[1]}", None, "worker 0", 20.0)
        yield sender
        sender.close()
        thread.join(10)


@pytest.mark.parametrize("said", ODD_ANSWERS)
def test_an_answer_in_any_form_of_http_is_understood_and_the_next_one_too(said):
    with saying(ODD_ANSWERS[said], PLAIN) as sender:
        assert sender.call("status", {}) == {"a": 1}
        time.sleep(0.2)  # the server ends the connection
        assert sender.call("status", {}) == {"a": 1}


@pytest.mark.parametrize("said", BROKEN_ANSWERS)
def test_an_answer_that_breaks_off_is_an_error_and_nothing_is_sent_again(said):
    with saying(BROKEN_ANSWERS[said], PLAIN) as sender:
        with pytest.raises(wire.RemoteError, match=r"the connection to http.* broke") as caught:
            sender.call("status", {})
        assert caught.value.status == 0
        assert sender.call("status", {}) == {"a": 1}


@contextmanager
def ending_after_one_answer(ends):
    """A sender to a server that ends its first connection at the second message, with a reset or not, and what came."""
    seen = []

    def serve():
        for first in (True, False):
            connection, _ = listener.accept()
            with connection:
                for answers in range(2):
                    seen.append(connection.recv(65536).split()[1].decode())
                    if first and answers:
                        if ends == "reset":
                            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        break
                    connection.sendall(PLAIN)

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        listener.settimeout(10)
        served = pool.submit(serve)
        with closing(HttpSender(f"http://127.0.0.1:{listener.getsockname()[1]}", None, "worker 0", 20.0)) as sender:
            yield sender, seen
        served.result(20)


@pytest.mark.parametrize("ends", ["reset", "closed"])
def test_a_message_that_meets_the_end_of_a_kept_connection_is_sent_once_more_over_a_new_one(ends):
    with ending_after_one_answer(ends) as (sender, seen):
        for verb in ("status", "start_weight_update", "status"):
            assert sender.call(verb, {}) == {"a": 1}
        assert seen == ["/status", "/start_weight_update", "/start_weight_update", "/status"]


@pytest.mark.parametrize("ends", ["reset", "closed"])
def test_completions_and_stock_updates_are_never_sent_twice(ends):
    for verb in ("completions", "update_weights"):
        with ending_after_one_answer(ends) as (sender, seen):
            sender.call("status", {})
            with pytest.raises(wire.RemoteError, match=r"the connection to http.* broke"):
                sender.call(verb, {})
            assert sender.call("status", {}) == sender.call("status", {}) == {"a": 1}
        assert seen == ["/status", wire.ROUTES[verb][1], "/status", "/status"]


def test_an_answer_that_drips_in_ends_with_the_deadline():
    with saying(PLAIN, pause=0.5) as sender:  # half a minute in all
        began = time.monotonic()
        with pytest.raises(wire.RemoteError, match=r"no answer within 0\.3 s"):
            sender.call("status", {}, 0.3)
        assert time.monotonic() - began < 10
