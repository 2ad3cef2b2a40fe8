"""A real worker process, over real HTTP."""

import concurrent.futures
import socket
import threading

import pytest
import requests
import uvicorn

from rlhf.rollout.app import make_app
from rlhf.rollout.worker import Worker
from transfer import wire

CREDENTIALS = {
    "none": {},
    "empty": {"Authorization": ""},
    "bearer without token": {"Authorization": "Bearer "},
    "wrong token": {"Authorization": f"Bearer {'0' * 64}"},
    "not latin": {"Authorization": "Bearer \u00e9".encode()},
    "another scheme": {"Authorization": "Basic {token}"},
    "a prefix": {"Authorization": "Bearer {token:.63}"},
    "one character more": {"Authorization": "Bearer {token}0"},
    "in another header": {"X-Api-Key": "{token}"},
}
ASK = {"prompt": [[3, 4, 5]], "max_tokens": 4, "seeds": [1]}


@pytest.fixture
def url(http_fleet):
    (sender,) = http_fleet.workers.senders()
    return sender.name.partition("(")[2].rstrip(")")


@pytest.fixture
def headers(http_fleet):
    return {"Authorization": f"Bearer {http_fleet.spec.token}"}


def routes(worker: Worker):
    """Every route of the app, and some that it must not have."""
    served = [(method, route.path) for route in make_app(worker, "t").routes for method in route.methods]
    absent = [("GET", path) for path in ("/", "/docs", "/redoc", "/openapi.json", "/health/", "//health", "/metrics")]
    return served + absent + [("OPTIONS", "/status"), ("HEAD", "/status"), ("POST", "/health")]


@pytest.mark.parametrize("credentials", CREDENTIALS)
def test_every_route_but_health_needs_the_token(credentials, url, http_fleet, local_worker):
    token = http_fleet.spec.token
    bad = {
        name: value.format(token=token) if isinstance(value, str) else value
        for name, value in CREDENTIALS[credentials].items()
    }
    checked = routes(local_worker[0])
    assert len(checked) > len(wire.ROUTES)
    for method, path in checked:
        answer = requests.request(method, url + path, headers=bad, timeout=20, allow_redirects=False)
        assert answer.status_code == (200 if (method, path) == ("GET", "/health") else 401), (method, path)


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/health/", "/v1/models"])
def test_nothing_is_served_but_the_verbs(path, url, headers):
    answer = requests.get(url + path, headers=headers, timeout=20, allow_redirects=False)
    assert answer.status_code == 404
    assert answer.json() == {"error": {"message": "Not Found", "code": 404}}


def test_a_completion_over_http(url, headers):
    body = ASK | {"n": 3, "logprobs": 0, "stop_token_ids": []}
    answer = requests.post(f"{url}/v1/completions", headers=headers, json=body, timeout=20)
    assert answer.status_code == 200
    assert [(c["index"], len(c["token_ids"]), c["weight_version"]) for c in answer.json()["choices"]] == [
        (0, 4, 0),
        (1, 4, 0),
        (2, 4, 0),
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
    ],
)
def test_a_bad_body_is_refused_with_one_clear_line(body, status, message, url, headers):
    answer = requests.post(f"{url}/v1/completions", headers=headers, data=body, timeout=20)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["code"] == status


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


def test_an_error_of_the_worker_is_a_500_with_one_line(capfd):
    class Broken:
        def __getattr__(self, verb):
            def fail(body):
                raise FloatingPointError("the model's logits are not finite\nmore")

            return fail

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(make_app(Broken(), ""), log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            answer = requests.get(f"http://127.0.0.1:{listener.getsockname()[1]}/status", timeout=20)
        finally:
            server.should_exit = True
            thread.join(20)
    assert answer.status_code == 500
    assert answer.json() == {"error": {"message": "FloatingPointError: the model's logits are not finite", "code": 500}}
    assert "Traceback" in capfd.readouterr().err
