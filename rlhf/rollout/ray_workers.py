"""Workers that are Ray actors, and the Ray that they run in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import RolloutConfig
from rlhf.rollout.begun import Begin, Begun
from rlhf.rollout.gpus import claim
from rlhf.rollout.spec import WorkerSpec
from rlhf.rollout.worker import Worker, parts_of
from rlhf.shell.ending import RunError
from transfer.backends.shards import endpoint_of_host
from transfer.config import RaySenderConfig
from transfer.worker.process import python_path
from transfer.worker.ray_start import check_cpus, joined_ray, private_ray
from transfer.worker.stacks import dumps_stacks_when_asked

if TYPE_CHECKING:
    from rlhf.ranks.ray_hosts import Hosts
    from transfer import Sender

RAY_THREADS = 64  # so that weights come, and `status` is answered, while the actor samples


class RayWorker(Worker):
    """A worker as a Ray actor: built in the actor's process."""

    def __init__(self, spec: WorkerSpec) -> None:
        dumps_stacks_when_asked(spec.log)
        claim(spec.visible)
        super().__init__(*parts_of(spec), spec.log)


@contextmanager
def ray_actors(
    spec: WorkerSpec,
    numbered: Callable[[int], WorkerSpec],
    config: RolloutConfig,
    sender: RaySenderConfig,
    hosts: Hosts | None = None,
) -> Iterator[Begin]:
    """Workers as Ray actors, in a private Ray unless `sender.address` names one or this process is in one already.

    Where the trainer's ranks are on `hosts` of a Ray, workers are on the same, in turn, and take weights from there.

    An actor that dies is started again, `config.restarts` times.
    """
    import ray

    from transfer.trainer.senders.ray import RaySender

    variables = {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": str(spec.threads)}
    options = {"max_concurrency": RAY_THREADS, "max_restarts": config.restarts}
    actor_class = partial(ray.remote(RayWorker).options, **options, runtime_env={"env_vars": variables})

    def told(index: int) -> WorkerSpec:
        if hosts is not None:
            own = numbered(index)
            own = replace(own, journal=str(Path(own.journal).absolute()))
            return _on_host(own, index, spec.visible, hosts)
        return numbered(index) if sender.address is None else replace(spec, visible=[])

    with ray_running(sender, config.workers) as private:

        def begin(index: int) -> Begun:
            where: dict[str, Any] = {"num_cpus": 1}
            if index >= config.workers:
                where = _one_more(index, config.workers, private, hosts)
            if hosts is not None:
                where["scheduling_strategy"] = hosts.placed(index)
            name = f"worker {index} (ray)"
            actor: Any = actor_class(**where).remote(told(index))
            health = actor.health.remote({})

            def connect(deadline: float) -> Sender:
                _await_actor(name, actor, deadline)
                return RaySender(actor, name, sender.timeout_s, sender.start_timeout_s)

            begun = Begun(index, connect, lambda: bool(ray.wait([health], timeout=0)[0]))
            begun.stack.callback(ray.kill, actor)
            return begun

        yield begin


def _one_more(index: int, first: int, private: bool, hosts: Hosts | None) -> dict[str, Any]:
    """The CPUs of a worker beyond the `first` ones, for which there was room; RunError if there is none.

    A private Ray has as many as the run has begun with, and is there for nobody else: this one takes none of them.
    """
    import ray

    if hosts is not None and index >= (room := -(-first // hosts.count) * hosts.count):
        raise RunError(f"the hosts of trainer.address have room for {room} workers, which was reserved at the start")
    free = ray.available_resources().get("CPU", 0)
    if not private and hosts is None and free < 1:
        raise RunError(f"the Ray has no CPU free for worker {index}: each takes one, and {free:g} are free")
    return {"num_cpus": 0 if private else 1}


def _on_host(spec: WorkerSpec, index: int, visible: Sequence[str], hosts: Hosts) -> WorkerSpec:
    """What a worker is told: it maps the memory of the ranks on its host, and computes on that host's GPUs.

    `visible`: of the first workers of a host, as the GPUs are called on the first; empty where all see all of them,
    which is said, too: of a host that is reserved Ray shows none to an actor that takes none.
    """
    host, number = index % hosts.count, index // hosts.count
    own = [hosts.visible(order, host) for order in visible[number : number + 1]]
    own = own or [",".join(hosts.gpus[host])][: len(hosts.gpus[host])]
    return replace(spec, endpoint=endpoint_of_host(spec.endpoint, host), visible=own)


@contextmanager
def ray_running(sender: RaySenderConfig, workers: int) -> Iterator[bool]:
    """A Ray to run in: this process's own, or the one at `sender.address`, or a private one that ends with it.

    Whether it is private.
    """
    import ray

    if ray.is_initialized():
        check_cpus("the Ray that this process is in", ray.cluster_resources().get("CPU", 0), workers)
        yield False
    elif sender.address is None:
        with private_ray(workers):
            yield True
    else:
        with joined_ray(sender.address, workers, sender.start_timeout_s):
            yield False


def _await_actor(name: str, actor: Any, deadline: float) -> None:
    import ray

    try:
        ray.get(actor.health.remote({}), timeout=max(0.0, deadline - time.monotonic()))
    except ray.exceptions.GetTimeoutError:
        free, all_ = (resources().get("CPU", 0) for resources in (ray.available_resources, ray.cluster_resources))
        raise RunError(
            f"{name} did not come up within transfer.sender.start_timeout_s; each takes one CPU of the Ray, of whose "
            f"{all_:g} {free:g} are free"
        ) from None
    except ray.exceptions.RayError as error:
        raise RunError(f"{name} died while it started: {error}") from None
