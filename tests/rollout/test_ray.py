"""Workers as real Ray actors."""

import os
import time

import psutil
import pytest

from rlhf.config import HfRolloutConfig
from rlhf.monitor.heartbeat import dump_stacks, workers_of
from rlhf.rollout.client import RolloutClient
from rlhf.types import Prompt
from transfer.agreement.wire import ROUTES, RemoteError
from transfer.config import IpcConfig, LocalConfig, RaySenderConfig

pytestmark = pytest.mark.slow  # Ray takes several seconds to come up

PROMPTS = [Prompt("x", (3, 4, 5)), Prompt("y", (8,)), Prompt("z", (9, 2))]


def test_actors_have_the_surface_of_the_http_worker_and_leave_nothing_behind(launch, model, tokenizer, tmp_path):
    import ray

    before = set(psutil.Process().children(recursive=True))
    config = HfRolloutConfig(max_new_tokens=10)
    with launch(LocalConfig()) as fleet:
        expected = RolloutClient(fleet.feed(model), tokenizer, config).sample(PROMPTS, n=3, temperature=0.7, seed=4)
    with launch(IpcConfig(sender=RaySenderConfig()), workers=2) as fleet:
        senders = fleet.workers.senders()
        with pytest.raises(RemoteError, match="no weights to serve") as empty:
            senders[0].call("completions", {"prompt": [[3]]})
        assert empty.value.status == 503
        fleet.feed(model)
        sampled = RolloutClient(senders, tokenizer, config).sample(PROMPTS, n=3, temperature=0.7, seed=4)
        assert [c.ids for c in sampled.completions] == [c.ids for c in expected.completions]
        refused = {verb: _refusal(senders[0], verb) for verb in ROUTES if verb not in ("status", "weight_info")}
        assert set(refused.values()) == {422}
        assert senders[1].call("weight_info", {}) == {"weight_version": "0"}
        assert len(workers_of(os.getpid())) == 2
        dump_stacks(tmp_path / "stacks.txt")
        for log in (tmp_path / "worker-0.log", tmp_path / "worker-1.log"):
            wait_for(lambda log=log: "default_worker.py" in log.read_text())  # the file that Ray's workers run
        assert senders[0].call("weight_info", {}) == {"weight_version": "0"}, "and goes on"
        started = set(psutil.Process().children(recursive=True)) - before
        assert any("raylet" in process.name() for process in started)
    assert not ray.is_initialized()
    _, alive = psutil.wait_procs(started, timeout=20)
    assert alive == []


def wait_for(there):
    deadline = time.monotonic() + 20
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_actor_that_dies_is_named_in_the_error(launch, model, tokenizer):
    import ray

    with launch(IpcConfig(sender=RaySenderConfig())) as fleet:
        senders = fleet.feed(model)
        ray.kill(senders[0]._actor)
        with pytest.raises(RemoteError, match=r"worker 0 \(ray\): completions: the actor is gone"):
            RolloutClient(senders, tokenizer, HfRolloutConfig()).sample(PROMPTS, n=1, temperature=1.0, seed=0)


def _refusal(sender, verb):
    with pytest.raises(RemoteError) as error:
        sender.call(verb, {"surprise": 1})
    return error.value.status
