"""A real worker process, over real HTTP."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import socket
import threading

import pytest
import requests

from rlhf.rollout.columns import Expected, decode
from rlhf.rollout.worker import Worker
from transfer.agreement import wire
from transfer.worker import serve
from transfer.worker.app import MAX_DEPTH, THREADS, BearerToken, make_app
from transfer.worker.bounded_http import MAX_HEAD_BYTES, MAX_PIPELINED
from transfer.worker.plain_worker import PlainSpec

CREDENTIALS = {
    "none": {},
    "empty": {"Authorization": ""},
    "bearer without token": {"Authorization": "Bearer "},
    "wrong token": {"Authorization": f"Bearer {'0' * 64}"},
    "not latin": {"Authorization": "Bearer \u00e9".encode()},
    "another scheme": {"Authorization": "Basic {token}"},
    "a prefix": {"Authorization": "Bearer {token:.42}"},
    "one character more": {"Authorization": "Bearer {token}0"},
    "in another header": {"X-Api-Key": "{token}"},
}
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "LOCK")
UPGRADE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "AA=="}
ASK = {"prompt": [[3, 4, 5]], "max_tokens": 4, "seeds": [1]}


@pytest.fixture
def url(http_fleet):
    (sender,) = http_fleet.workers.senders()
    return sender.name.partition("(")[2].rstrip(")")


@pytest.fixture
def headers(http_fleet):
    return {"Authorization": f"Bearer {http_fleet.spec.token}"}


def requests_of(worker: Worker):
    """Every route of the app by every method, and some paths that it must not have, as (method, path)."""
    paths = {route.path for route in make_app(worker, "t").routes}
    assert len(paths) == len(wire.ROUTES) + 1
    absent = ("/", "/docs", "/redoc", "/health/", "//health", "/metrics", "/health%0A", "/v1/models", "*")
    return [(method, path) for path in (*paths, *absent) for method in METHODS]


def connected(url):
    return socket.create_connection(url.removeprefix("http://").split(":"), timeout=20)


class Raw:
    """A kept-alive connection on which everything can be sent."""

    def __init__(self, url):
        self.url = url
        self.socket = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    def ask(self, method, path, headers, body=b""):
        """The status, the headers and the body of the answer."""
        if self.socket is None:
            self.socket = connected(self.url)
        lines = {"Host": "a", "Content-Length": str(len(body)), **headers}
        head = f"{method} {path} HTTP/1.1\r\n".encode()
        for name, value in lines.items():
            head += name.encode() + b": " + (value if isinstance(value, bytes) else value.encode()) + b"\r\n"
        self.socket.sendall(head + b"\r\n" + body)
        answer = http.client.HTTPResponse(self.socket, method=method)
        answer.begin()
        content = answer.read()
        if answer.will_close:
            self.close()
        return answer.status, dict(answer.getheaders()), content


@contextlib.contextmanager
def served(worker, token=""):
    """The address of a worker in this process, behind the server that its own process would have."""
    with serve.listening(PlainSpec(manifest={}, endpoint={}, token=token)) as listener:
        server = serve._server(worker, token)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)


@pytest.mark.parametrize("upgrade", [{}, UPGRADE], ids=["plain", "upgrade to a websocket"])
@pytest.mark.parametrize("credentials", CREDENTIALS)
def test_every_route_but_health_needs_the_token(credentials, upgrade, url, http_fleet, local_worker):
    token = http_fleet.spec.token
    bad = {
        name: value.format(token=token) if isinstance(value, str) else value
        for name, value in CREDENTIALS[credentials].items()
    }
    checked = requests_of(local_worker[0])
    assert len(checked) > 200
    with Raw(url) as raw:
        for method, path in checked:
            status, headers, body = raw.ask(method, path, bad | upgrade)
            assert status == (200 if (method, path) == ("GET", "/health") else 401), (method, path)
            assert status == 200 or (headers["www-authenticate"], headers["connection"]) == ("Bearer", "close")
            assert method == "HEAD" or status == 200 or b"bearer token" in body


def test_the_token_twice_or_in_the_query_is_not_the_token(url, headers, http_fleet):
    with Raw(url) as raw:
        assert raw.ask("GET", "/status", headers)[0] == 200
        assert raw.ask("GET", "/status", headers | {"authorization": headers["Authorization"]})[0] == 401
        assert raw.ask("GET", f"/status?token={http_fleet.spec.token}", {})[0] == 401


def test_a_websocket_is_closed_without_a_look_at_it():
    sent = []

    async def send(event):
        sent.append(event)

    asyncio.run(BearerToken(None, "t")({"type": "websocket", "headers": [(b"authorization", b"Bearer t")]}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/health/", "/v1/models", "/"])
def test_nothing_is_served_but_the_verbs_and_their_description(path, url, headers):
    answer = requests.get(url + path, headers=headers, timeout=20, allow_redirects=False)
    assert answer.status_code == 404
    assert answer.json() == {"error": {"message": "Not Found", "code": 404}}


def test_a_route_has_one_method(url, headers, local_worker):
    methods = {route.path: route.methods for route in make_app(local_worker[0], "t").routes}
    with Raw(url) as raw:
        for path, (known,) in methods.items():
            for method in set(METHODS) - {known}:
                status, answered, _ = raw.ask(method, path, headers)
                assert (status, answered["allow"]) == (405, known), (method, path)


def test_the_document_is_that_of_the_workers_verbs(url, headers):
    told = requests.get(f"{url}/openapi.json", headers=headers, timeout=20).json()
    assert set(told["paths"]) == {path for _, path in wire.ROUTES.values()} | {"/openapi.json"}


def test_a_completion_over_http(url, headers):
    body = ASK | {"n": 3, "logprobs": 0, "stop_token_ids": []}
    answer = requests.post(f"{url}/v1/completions", headers=headers, json=body, timeout=20)
    assert answer.status_code == 200
    assert [(c["index"], len(c["token_ids"]), c["weight_version"]) for c in answer.json()["choices"]] == [
        (0, 4, 0),
        (1, 4, 0),
        (2, 4, 0),
    ]


def test_a_completion_as_columns_is_one_binary_body_with_the_numbers_of_the_json_answer(url, headers):
    body = ASK | {"n": 3, "logprobs": 0, "stop_token_ids": []}
    plain = requests.post(f"{url}/v1/completions", headers=headers, json=body, timeout=20).json()
    answer = requests.post(f"{url}/v1/completions", headers=headers, json=body | {"encoding": "columns"}, timeout=20)
    assert (answer.status_code, answer.headers["content-type"]) == (200, wire.COLUMNS_TYPE)
    samples = decode(answer.content, Expected(3, ASK["max_tokens"]))
    assert [
        (sample.ids.tolist(), sample.logprobs.tolist(), sample.versions.tolist(), sample.finish_reason)
        for sample in samples
    ] == [
        (c["token_ids"], c["logprobs"]["token_logprobs"], [c["weight_version"]] * 4, c["finish_reason"])
        for c in plain["choices"]
    ]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 422, "strict JSON"),
        (b"[]", 422, "JSON object"),
        (b'{"prompt": [[3]], "prompt": [[4]]}', 422, "duplicate"),
        (b'{"prompt": [[3]], "temperature": NaN}', 422, "NaN"),
        (b'{"prompt": [[3]], "max_tokens": 64}', 422, "body.max_tokens"),
        (b'{"prompt": [["a"]]}', 422, "body.prompt"),
        (b'{"prompt": ' + b"[" * 100000, 422, "strict JSON"),
        (b'{"prompt": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", 422, "more than 32 lists and objects"),
        (b'{"\\ud800": 1}', 422, "body.\ud800 is not known"),
        (b'{"prompt": [[1]], "n": ' + b"1" * 4300 + b"}", 422, "body.n"),
        (b'{"prompt": [[1]], "n": ' + b"1" * 5000 + b"}", 422, "strict JSON"),
        ('{"prompt": [[3]]}'.encode("utf-16"), 422, "strict JSON"),
        (b'\xef\xbb\xbf{"prompt": [[3]]}', 422, "strict JSON"),
        (b'{"prompt": [["' + b"x" * 10_000 + b'"]], "' + b"y" * 10_000 + b'": 1}', 422, "is not known"),
    ],
)
def test_a_bad_body_is_refused_with_one_clear_line(body, status, message, url, headers):
    answer = requests.post(f"{url}/v1/completions", headers=headers, data=body, timeout=20)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["code"] == status
    assert len(answer.json()["error"]["message"]) <= 2000


def test_a_control_message_over_the_cap_is_refused_and_completions_may_be_larger(url, headers):
    body = b'{"mode": "' + b"x" * wire.MAX_CONTROL_BYTES + b'"}'
    assert requests.post(f"{url}/pause", headers=headers, data=body, timeout=20).status_code == 413
    assert requests.post(f"{url}/v1/completions", headers=headers, data=body, timeout=20).status_code == 422


def test_vllms_query_parameters_are_part_of_the_message(url, headers):
    try:
        answer = requests.post(f"{url}/pause?mode=keep&clear_cache=true", headers=headers, timeout=20)
        assert answer.json() == {"status": "paused"}
        assert requests.get(f"{url}/is_paused", headers=headers, timeout=20).json() == {"is_paused": True}
    finally:
        assert requests.post(f"{url}/resume", headers=headers, timeout=20).json() == {"status": "resumed"}
    twice = requests.post(f"{url}/pause?mode=keep", headers=headers, json={"mode": "abort"}, timeout=20)
    assert twice.status_code == 422
    world = requests.get(f"{url}/get_world_size?include_dp=true", headers=headers, timeout=20)
    assert world.json() == {"world_size": 1}
    awake = requests.post(f"{url}/wake_up?tags=weights&tags=kv_cache", headers=headers, timeout=20)
    assert awake.json() == {"is_sleeping": False}


@pytest.mark.parametrize(
    "asked", ["/status?epoch=1", "/health?a", "/pause?mode=keep&path=/etc", "/pause?mode=a&mode=b"]
)
def test_query_parameters_that_a_verb_does_not_know_are_refused(asked, url, headers):
    method = "POST" if asked.startswith("/pause") else "GET"
    answer = requests.request(method, url + asked, headers=headers, timeout=20)
    assert answer.status_code == 422
    assert requests.get(f"{url}/is_paused", headers=headers, timeout=20).json() == {"is_paused": False}


def test_the_body_of_a_get_is_not_read(url, headers):
    with Raw(url) as raw:
        for _ in range(3):
            status, _, body = raw.ask("GET", "/is_paused", headers, body=b'{"mode": ' * 100_000)
            assert (status, body) == (200, b'{"is_paused":false}')


def test_an_answer_has_no_header_that_nobody_needs(url, headers):
    with Raw(url) as raw:
        assert raw.ask("GET", "/is_paused", headers)[1] == {"content-type": "application/json", "content-length": "19"}


@pytest.mark.parametrize("opening, closing", [(b"[", b"]"), (b'{"a":', b"}")])
def test_no_depth_of_nesting_is_an_error_of_the_worker(opening, closing, url, headers):
    with Raw(url) as raw:
        for depth in (*range(40), *range(900, 1010)):
            body = b'{"epoch": 1, "version": ' + opening * depth + b"1" + closing * depth + b"}"
            status, _, body = raw.ask("POST", "/abort_weight_update", headers, body=body)
            assert status == (422 if depth else 200), (depth, body)


def test_a_body_in_chunks_is_refused_and_ends_the_connection(url, headers):
    with Raw(url) as raw:
        chunked = {"Transfer-Encoding": "chunked", "Content-Length": "0"}
        assert raw.ask("POST", "/resume", headers | chunked)[0] == 400  # both: a smuggler's request
    for method, path, credentials in (
        ("POST", "/resume", headers),
        ("GET", "/status", headers),
        ("GET", "/health", {}),
    ):
        with connected(url) as connection:
            authorization = "".join(f"{name}: {value}\r\n" for name, value in credentials.items())
            head = f"{method} {path} HTTP/1.1\r\nHost: a\r\n{authorization}Transfer-Encoding: chunked\r\n\r\n"
            connection.sendall(head.encode())
            answer = http.client.HTTPResponse(connection, method=method)
            answer.begin()
            assert (answer.status, answer.will_close) == (411, True)


def flood(url, first, more, most):
    """Send `first`, then `more` until the worker ends the connection, or `most` bytes; how many were sent."""
    sent = 0
    with contextlib.suppress(ConnectionError), connected(url) as connection:
        connection.sendall(first)
        while sent < most:
            connection.sendall(more)
            sent += len(more)
    return sent


FLOODS = {  # what a stranger may go on sending, with no token
    "headers": (b"GET /health HTTP/1.1\r\nHost: a\r\n", b"x: " + b"y" * 1000 + b"\r\n"),
    "one header": (b"GET /health HTTP/1.1\r\nHost: a\r\nx: ", b"y" * 1000),
    "the address": (b"GET /health?", b"y" * 1000),
    "trailers": (b"GET /health HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"x: " + b"y" * 1000 + b"\r\n"),
    "requests": (b"", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" * 1000),
    "a body": (b"POST /pause HTTP/1.1\r\nHost: a\r\nContent-Length: 9999999999\r\n\r\n", b"y" * 1000),
}


@pytest.mark.parametrize("what", FLOODS)
def test_the_worker_ends_a_connection_that_floods_it(what, url):
    first, more = FLOODS[what]
    assert flood(url, first, more, most=64 * 2**20) < 64 * 2**20
    assert requests.get(f"{url}/health", timeout=20).status_code == 200


def test_headers_up_to_the_limit_and_a_few_requests_at_once_are_answered(url, headers):
    with Raw(url) as raw:
        long = headers | {"X-Long": "y" * (MAX_HEAD_BYTES - 1000)}
        for _ in range(3):
            assert raw.ask("GET", "/is_paused", long, body=b" " * 300_000)[0] == 200
    with connected(url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" * MAX_PIPELINED)
        received = b""
        while received.count(b'{"status":"ok"}') < MAX_PIPELINED:
            received += connection.recv(65536)


def test_health_and_status_answer_while_the_worker_samples(url, headers):
    ask = {"prompt": [[3, 4]] * 300, "n": 8, "max_tokens": 60, "stop_token_ids": []}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        sampling = pool.submit(requests.post, f"{url}/v1/completions", headers=headers, json=ask, timeout=100)
        answered = 0
        while not sampling.done():
            assert requests.get(f"{url}/health", timeout=20).status_code == 200
            assert requests.get(f"{url}/status", headers=headers, timeout=20).json()["version"] == 0
            answered += not sampling.done()
        assert sampling.result().status_code == 200
    assert answered > 3


def test_the_worker_listens_on_loopback_alone(url):
    port = int(url.rpartition(":")[2])
    with socket.socket() as other, pytest.raises(OSError):
        other.settimeout(5)
        other.connect((_own_address(), port))


def _own_address():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; asks which address would be used
        except OSError:
            pytest.skip("this machine has no address but loopback")
        return probe.getsockname()[0]


class Waiting:
    """A worker whose POSTs end when it is told."""

    def __init__(self):
        self.told = threading.Event()
        self.waiting = threading.Semaphore(0)

    def completions(self, body):
        self.waiting.release()
        return {"ended": self.told.wait(60)}

    pause = completions

    def finish_weight_update(self, body):
        return {"phase": "ready", "version": 1}

    def status(self, body):
        return {"phase": "ready"}

    health = status


@pytest.mark.parametrize("busy_with", ["/v1/completions", "/pause"])
def test_status_and_the_messages_of_an_update_are_answered_however_many_other_messages_wait(busy_with):
    worker = Waiting()
    clients = 2 * THREADS
    with served(worker) as url, concurrent.futures.ThreadPoolExecutor(clients) as pool:
        jobs = [pool.submit(requests.post, url + busy_with, timeout=100) for _ in range(clients)]
        try:
            for _ in range(THREADS):
                assert worker.waiting.acquire(timeout=20)
            for method, path in (("GET", "/health"), ("GET", "/status"), ("POST", "/finish_weight_update")):
                assert requests.request(method, url + path, timeout=20).status_code == 200
        finally:
            worker.told.set()
        assert {job.result(60).status_code for job in jobs} == {200}


def test_seventy_messages_to_pause_keep_no_update_and_no_status_out(local_worker):
    worker, _ = local_worker
    clients = 70
    with served(worker) as url, concurrent.futures.ThreadPoolExecutor(clients) as pool:
        with worker._gate.generating():
            ask = {"json": {"mode": "wait"}, "timeout": 60}
            jobs = [pool.submit(requests.post, f"{url}/pause", **ask) for _ in range(clients)]
            refused = [job.result() for _, job in zip(range(66), concurrent.futures.as_completed(jobs), strict=False)]
            assert {answer.status_code for answer in refused} == {503}
            assert refused[0].json()["error"]["message"].startswith("4 messages wait already")
            for method, path in (("GET", "/health"), ("GET", "/status"), ("POST", "/abort_weight_update")):
                answer = requests.request(method, url + path, json={"epoch": 0, "version": 0}, timeout=20)
                assert answer.status_code in (200, 409), path
        answers = [job.result(60).status_code for job in jobs]
        assert sorted(answers) == [200] * 4 + [503] * 66
        assert requests.get(f"{url}/is_paused", timeout=20).json() == {"is_paused": True}


def test_an_error_of_the_worker_is_a_500_with_one_line(capfd):
    class Broken:
        def __getattr__(self, verb):
            def fail(body):
                raise FloatingPointError("the model's logits are not finite\nmore")

            return fail

    with served(Broken()) as url:
        answer = requests.get(f"{url}/status", timeout=20)
    assert answer.status_code == 500
    assert answer.json() == {"error": {"message": "FloatingPointError: the model's logits are not finite", "code": 500}}
    assert "Traceback" in capfd.readouterr().err


def test_an_answer_that_is_not_json_is_a_500():
    class Infinite:
        def status(self, body):
            return {"logprob": float("inf")}

    with served(Infinite()) as url:
        assert requests.get(f"{url}/status", timeout=20).status_code == 500


# --- messages that are answered in the thread of the event loop -------------------------------------------------------


class Prompt:
    """A worker that says which thread has called it; `start_weight_update` is prompt when it is told so."""

    def __init__(self):
        self.is_prompt = True

    def prompt(self, verb):
        return self.is_prompt

    def status(self, body):
        return {"thread": threading.current_thread().name, "body": body}

    start_weight_update = health = status

    def abort_weight_update(self, body):
        raise wire.Refused(409, "no")

    def finish_weight_update(self, body):
        raise RuntimeError("broken")


def posted(raw, path, headers, body=b"{}"):
    status, got, content = raw.ask("POST", path, headers, body)
    return status, got, content


def test_a_prompt_message_is_answered_by_the_loop_and_any_other_by_a_thread():
    worker = Prompt()
    with served(worker, "t") as url, Raw(url) as raw:
        headers = {"Authorization": "Bearer t"}
        assert b'"updates' not in posted(raw, "/start_weight_update", headers)[2]
        usual = [{"Accept": "*/*"}, {"Connection": "close"}, {"Expect": "100-continue"}]
        for more in usual:
            assert b'"updates' in posted(raw, "/start_weight_update", headers | more)[2], more
        worker.is_prompt = False
        assert b'"updates' in posted(raw, "/start_weight_update", headers)[2]


@pytest.fixture(scope="module")
def prompt_url():
    """The address of one such worker for all messages."""
    with served(Prompt(), "t") as address:
        yield address


@pytest.mark.parametrize("path", ["/start_weight_update", "/abort_weight_update", "/finish_weight_update"])
@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"a":1}', b"\xff", b"[" * 100, b'{"a":' + b" " * 3000 + b"1}"])
def test_both_ways_answer_the_same(path, body, prompt_url):
    with Raw(prompt_url) as raw:
        headers = {"Authorization": "Bearer t"}
        short, usual = (posted(raw, path, headers | more, body) for more in ({}, {"Accept": "*/*"}))
        assert short[0] == usual[0] and short[1].keys() == usual[1].keys()
        assert short[0] == 200 or short[2] == usual[2]


def test_without_the_token_no_way_is_short():
    with served(Prompt(), "t") as url, Raw(url) as raw:
        for headers in ({}, {"Authorization": "Bearer u"}, {"Authorization": "bearer t"}):
            assert posted(raw, "/start_weight_update", headers)[0] == 401
    with served(Prompt()) as url, Raw(url) as raw:
        assert b'"updates' not in posted(raw, "/start_weight_update", {})[2]


def test_requests_in_one_write_are_answered_in_their_order_whichever_way_they_go():
    with served(Prompt()) as url, connected(url) as connection:
        request = b"POST /%s HTTP/1.1\r\nHost: a\r\n%sContent-Length: 7\r\n\r\n"
        usual = b"Accept: */*\r\n"
        ways = [b"", usual, b"", b"", usual, usual, b"", usual, b""]
        sent = [request % (b"start_weight_update", way) + b'{"a":%d}' % index for index, way in enumerate(ways)]
        connection.sendall(b"".join(sent))
        got = b""
        while got.count(b'"body"') < len(ways):
            got += connection.recv(65536)
        assert [part[5:6] for part in got.split(b'"body":')[1:]] == [b"%d" % index for index in range(len(ways))]


def test_a_message_that_comes_byte_by_byte_is_one_message():
    with served(Prompt()) as url, connected(url) as connection:
        for byte in b'POST /start_weight_update HTTP/1.1\r\nHost: a\r\nContent-Length: 8\r\n\r\n{"a":12}':
            connection.sendall(bytes([byte]))
        assert b'"body":{"a":12}' in connection.recv(65536)
