"""Workers that are Ray actors, and the Ray that they run in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import RolloutConfig
from rlhf.rollout.gpus import claim
from rlhf.rollout.spec import WorkerSpec
from rlhf.rollout.spec_of_run import specs
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

    Connect = Callable[[], list[Sender]]  # waits until the workers are up

RAY_THREADS = 64  # so that weights come, and `status` is answered, while the actor samples


class RayWorker(Worker):
    """A worker as a Ray actor: built in the actor's process."""

    def __init__(self, spec: WorkerSpec) -> None:
        dumps_stacks_when_asked(spec.log)
        claim(spec.visible)
        super().__init__(*parts_of(spec), spec.log)


@contextmanager
def ray_actors(
    spec: WorkerSpec, config: RolloutConfig, sender: RaySenderConfig, folder: Path, hosts: Hosts | None = None
) -> Iterator[Connect]:
    """Workers as Ray actors, in a private Ray unless `sender.address` names one or this process is in one already.

    Where the trainer's ranks are on `hosts` of a Ray, workers are on the same, in turn, and take weights from there.

    An actor that dies is started again, `config.restarts` times.
    """
    import ray

    from transfer.trainer.senders.ray import RaySender

    variables = {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": str(spec.threads)}
    options = {"num_cpus": 1, "max_concurrency": RAY_THREADS, "max_restarts": config.restarts}
    actor_class = partial(ray.remote(RayWorker).options, **options, runtime_env={"env_vars": variables})
    if hosts is not None:
        told = list(_on_hosts(specs(spec, config.workers, folder.absolute()), spec.visible, hosts))
    elif sender.address is None:
        told = specs(spec, config.workers, folder)
    else:
        told = [replace(spec, visible=[])] * config.workers
    with ray_running(sender, config.workers), ExitStack() as stack:
        actors: list[Any] = []
        for index, worker_spec in enumerate(told):
            where = {} if hosts is None else {"scheduling_strategy": hosts.placed(index)}
            actors.append(actor_class(**where).remote(worker_spec))
            stack.callback(ray.kill, actors[-1])

        def connected(index: int, deadline: float) -> Sender:
            name = f"worker {index} (ray)"
            _await_actor(name, actors[index], deadline)
            return RaySender(actors[index], name, sender.timeout_s, sender.start_timeout_s)

        def connect() -> list[Sender]:
            deadline = time.monotonic() + sender.start_timeout_s
            return [connected(index, deadline) for index in range(len(actors))]

        yield connect


def _on_hosts(told: Sequence[WorkerSpec], visible: Sequence[str], hosts: Hosts) -> Iterator[WorkerSpec]:
    """What each worker is told: it maps the memory of the ranks on its host, and computes on that host's GPUs.

    `visible`: of the first workers of a host, as the GPUs are called on the first; empty where all see all of them,
    which is said, too: of a host that is reserved Ray shows none to an actor that takes none.
    """
    for index, spec in enumerate(told):
        host, number = index % hosts.count, index // hosts.count
        own = [hosts.visible(order, host) for order in visible[number : number + 1]]
        own = own or [",".join(hosts.gpus[host])][: len(hosts.gpus[host])]
        yield replace(spec, endpoint=endpoint_of_host(spec.endpoint, host), visible=own)


@contextmanager
def ray_running(sender: RaySenderConfig, workers: int) -> Iterator[None]:
    """A Ray to run in: this process's own, or the one at `sender.address`, or a private one that ends with it."""
    import ray

    if ray.is_initialized():
        check_cpus("the Ray that this process is in", ray.cluster_resources().get("CPU", 0), workers)
        yield
    elif sender.address is None:
        with private_ray(workers):
            yield
    else:
        with joined_ray(sender.address, workers, sender.start_timeout_s):
            yield


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
