"""The one-shot API between real processes, over HTTP and on GPUs where there are some; test_ray_actors.py: over Ray."""

import gc
import json
import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
import torch
from one_shot import DEADLINE_S, Loaded, digest, digests, pickled, receive, weights
from worker_process import CONTEXT

from transfer import IPCTrainerSendWeightsArgs, IPCWeightTransferEngine
from transfer.engine import ipc
from transfer.engine.handles import Exporter

# --- transports: HTTP -------------------------------------------------------------------------------------------------


class Worker(BaseHTTPRequestHandler):
    """A server in the way of vLLM's: POST /update_weights feeds the engine; GET /loaded tells what has come."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            assert self.path == "/update_weights"
            receive(body["update_info"], self.server.loaded.load_weights)
        except ValueError as error:
            return self.answer(422, {"error": {"message": str(error), "code": 422}})
        self.server.tokens.append(self.headers["Authorization"])
        self.server.fields.append(sorted(body["update_info"]))
        return self.answer(200, {})

    def do_GET(self):
        loaded = self.server.loaded
        told = {"digests": digests(loaded.weights), "tokens": self.server.tokens, "fields": self.server.fields}
        return self.answer(200, {**told, "calls": loaded.calls, "memfds": memfds()})

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def memfds():
    """How many descriptors and mappings of trainers' memory this process has."""
    links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    maps = Path("/proc/self/maps").read_text()
    return sum("memfd:rlhf-weights" in link for link in links) + maps.count("memfd:rlhf-weights")


def serve(port, device=None):
    """A worker process; tells its port through the pipe."""
    torch.set_num_threads(1)
    if device is not None:
        torch.cuda.set_device(device)
    server = HTTPServer(("127.0.0.1", 0), Worker)  # answers in this thread, to which CUDA's current device belongs
    server.loaded, server.tokens, server.fields = Loaded(), [], []
    port.send(server.server_port)
    server.serve_forever()


@contextmanager
def worker_process(device=None):
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=serve, args=(there, device), daemon=True)
    process.start()
    try:
        assert here.poll(DEADLINE_S)
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        process.kill()
        process.join(DEADLINE_S)


@pytest.fixture(scope="module")
def worker():
    with worker_process() as url:
        yield url


@contextmanager
def server(handler):
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            running.shutdown()
            thread.join(DEADLINE_S)


def send(tensors, **arguments):
    IPCWeightTransferEngine.trainer_send_weights(iter(tensors.items()), IPCTrainerSendWeightsArgs(**arguments))


def loaded_by(url):
    return requests.get(f"{url}/loaded", timeout=DEADLINE_S).json()


def test_another_process_receives_weights_over_http_exactly_and_keeps_nothing_of_the_trainers(worker):
    for _ in range(2):
        sent = weights()
        send(sent, mode="http", url=worker)
        told = loaded_by(worker)
        assert told["digests"] == digests(sent)
        assert told["memfds"] == memfds() == 0
    assert told["fields"][-1] == ["dtype_names", "ipc_handles_pickled", "names", "shapes"]


def test_trainer_arguments_may_be_a_dict_and_the_url_may_end_in_a_slash(worker):
    sent = {"from a dict": torch.randn(3)}
    IPCWeightTransferEngine.trainer_send_weights(sent.items(), {"mode": "http", "url": worker + "/"})
    assert loaded_by(worker)["digests"]["from a dict"] == digest(sent["from a dict"])


def test_the_servers_own_message_is_raised(worker, monkeypatch):
    monkeypatch.setattr(ipc.Exporter, "add", lambda *_: [{"GPU-elsewhere": ()}])
    with pytest.raises(RuntimeError, match="/update_weights answered 422: 'w': IPC handle not found for GPU UUID"):
        send({"w": torch.ones(1)}, mode="http", url=worker)


def test_the_bearer_token_comes_from_the_environment(worker, monkeypatch):
    monkeypatch.delenv("RLHF_WORKER_TOKEN", raising=False)
    send({"w": torch.ones(1)}, mode="http", url=worker)
    assert loaded_by(worker)["tokens"][-1] is None
    monkeypatch.setenv("RLHF_WORKER_TOKEN", "secret")
    send({"w": torch.ones(1)}, mode="http", url=worker)
    assert loaded_by(worker)["tokens"][-1] == "Bearer secret"


def test_proxies_of_the_environment_are_not_used(worker, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    send({"w": torch.ones(1)}, mode="http", url=worker)


def answering(status, body, **headers):
    class Answer(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    return Answer


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (500, b'{"error": {"message": "out of memory", "type": "x"}}', "answered 500: out of memory$"),
        (409, b'{"error": "an update is under way"}', "answered 409: an update is under way$"),
        (422, b'{"detail": "names is missing"}', "answered 422: names is missing$"),
        (422, b'{"detail": [{"loc": ["names"]}]}', r'answered 422: {"detail": \[{"loc": \["names"\]}\]}$'),
        (503, b"busy", "answered 503: busy$"),
        (404, b"", "answered 404: Not Found$"),
        (500, b"x" * 200_000, "answered 500: x{65536}$"),
        (500, b'{"a": "\xff"}', "answered 500: "),
    ],
)
def test_errors_of_any_form_are_raised_with_what_the_server_says(status, body, said):
    with server(answering(status, body)) as url, pytest.raises(RuntimeError, match=said):
        send({"w": torch.ones(1)}, mode="http", url=url)


def test_redirects_are_not_followed(worker):
    before = loaded_by(worker)["calls"]
    redirect = answering(307, b"", Location=f"{worker}/update_weights")
    with server(redirect) as url, pytest.raises(RuntimeError, match="answered 307"):
        send({"w": torch.ones(1)}, mode="http", url=url)
    assert loaded_by(worker)["calls"] == before


def test_a_server_that_is_not_there_is_named():
    with server(answering(200, b"")) as url:
        pass
    with pytest.raises(RuntimeError, match=f"{url}/update_weights cannot be reached"):
        send({"w": torch.ones(1)}, mode="http", url=url)


def test_a_server_that_does_not_answer_is_given_up_at_the_deadline(monkeypatch):
    monkeypatch.setattr(ipc, "TIMEOUT_S", 0.2)
    stop = threading.Event()

    class Silent(BaseHTTPRequestHandler):
        def do_POST(self):
            stop.wait(DEADLINE_S)

    with server(Silent) as url:
        try:
            with pytest.raises(TimeoutError, match=f"{url}/update_weights did not answer within 0.2 s"):
                send({"w": torch.ones(1)}, mode="http", url=url)
        finally:
            stop.set()
    assert memfds() == 0


# --- GPUs -------------------------------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("device", [0, 1])
def test_weights_on_a_gpu_reach_a_process_on_it_and_on_a_peer_over_http(device):
    if device >= torch.cuda.device_count():
        pytest.skip("needs two CUDA devices")
    with worker_process(device) as url:
        model = weights("cuda:0")
        torch.cuda.synchronize()
        gc.collect()  # what other tests have left is freed now, and not meanwhile
        used = torch.cuda.memory_allocated()
        for _ in range(30):
            model["plain"] += 1
            send(model, mode="http", url=url)
            assert loaded_by(url)["digests"] == digests(model)
        assert torch.cuda.memory_allocated() == used


@pytest.mark.gpu
@gpu
def test_two_processes_on_a_gpu_are_each_given_an_export_of_their_own():
    with worker_process(0) as first, worker_process(0) as second:
        model = weights("cuda:0")
        for _ in range(3):
            with Exporter() as exporter:
                for url, update in zip((first, second), ipc._messages(model.items(), exporter, 2), strict=True):
                    update["ipc_handles_pickled"] = pickled(update.pop("ipc_handles"))
                    ipc._send_http(f"{url}/update_weights", update)
        assert loaded_by(first)["digests"] == loaded_by(second)["digests"] == digests(model)


@pytest.mark.gpu
@gpu
def test_weights_on_a_cpu_reach_a_process_that_has_a_gpu():
    with worker_process(0) as url:
        model = weights()
        send(model, mode="http", url=url)
        assert loaded_by(url)["digests"] == digests(model)
