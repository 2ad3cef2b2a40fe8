"""Hosts of a trainer that a Ray has: on each an actor holds what its ranks and workers need, and starts the ranks.

The first host is the one that the run was started on, which is a node of that Ray, too. What is reserved of the others
is reserved in one placement group, a bundle a host, so that all of it is there, or nothing starts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlhf.config import RunConfig
from rlhf.config.model import Device
from rlhf.config.trainer import ShardedConfig
from rlhf.ranks.starting import CHILD, ended, log_of
from rlhf.shell.ending import RunError
from transfer.agreement.shown import one_line
from transfer.config import CollectiveConfig, Library
from transfer.worker.process import WorkerProcess, python_path
from transfer.worker.ray_start import joined_ray

PLACED_S = 60.0  # until the Ray has found room; and for an actor of it to answer
LOOK_S = 1.0  # between two questions whether all ranks still live
VISIBLE = "CUDA_VISIBLE_DEVICES"
NODE = "ray.io/node-id"  # Ray's label of a node


class Host:
    """An actor: the ranks of one host, as its child processes."""

    def __init__(self) -> None:
        self._processes: dict[int, WorkerProcess] = {}

    def resources(self) -> dict[str, Any]:
        """Where this is, and the GPUs that are reserved here, by the names that CUDA knows them by."""
        import ray

        gpus = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        return {"address": ray.util.get_node_ip_address(), "gpus": list(map(str, gpus))}

    def start(self, started_in: str, folder: str, specs: dict[int, str]) -> None:
        """Start these ranks, whose logs go to `folder`, on a file system that all hosts share, as `started_in` is."""
        os.chdir(started_in)
        for number, spec in specs.items():
            process = WorkerProcess(f"rank {number}", CHILD, spec, log_of(Path(folder), number))
            self._processes[number] = process.__enter__()

    def ended(self) -> list[tuple[str, str]]:
        """The name and the end of the log of each rank that runs no more."""
        return [(each.name, each.tail()) for each in self._processes.values() if not each.alive]

    def close(self) -> None:
        """End the ranks."""
        for process in self._processes.values():
            process.__exit__()


class Hosts:
    """The trainer's hosts in Ray, `group` the placement group of their bundles; a `Starter` of ranks."""

    def __init__(self, group: Any, actors: Sequence[Any], folder: Path, holders: int) -> None:
        self.group = group
        self._actors = actors
        self._folder, self._holders = folder, holders
        self._looked = 0.0
        told = self._answers([actor.resources.remote() for actor in actors])
        self.address: str = told[0]["address"]
        self.gpus: list[list[str]] = [each["gpus"] for each in told]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._actors)

    def start(self, specs: Sequence[str]) -> None:
        """All ranks but the first, each on its host."""
        of_hosts: list[dict[int, str]] = [{} for _ in self._actors]
        for number, spec in enumerate(specs, start=1):
            of_hosts[number // self._holders][number] = spec
        places = os.getcwd(), str(self._folder.absolute())
        self._answers([actor.start.remote(*places, of) for actor, of in zip(self._actors, of_hosts, strict=True)])

    def check(self) -> None:
        """RunError if one of them has ended."""
        if time.monotonic() - self._looked < LOOK_S:
            return
        for gone in self._answers([actor.ended.remote() for actor in self._actors]):
            for name, tail in gone:
                raise ended(name, tail)
        self._looked = time.monotonic()

    def placed(self, index: int) -> Any:
        """Ray's scheduling of the worker of this number: on the hosts in turn."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=index % self.count)

    def visible(self, here: str, host: int) -> str:
        """CUDA_VISIBLE_DEVICES of this host, in an order that is said by the names that the first host's GPUs have."""
        return ",".join(self.gpus[host][self.gpus[0].index(name)] for name in here.split(","))

    def _answers(self, asked: Sequence[Any]) -> list[Any]:
        import ray

        try:
            return list(ray.get(list(asked), timeout=PLACED_S))
        except ray.exceptions.RayTaskError as error:  # whose own words are a traceback
            cause = error.cause or error
            raise RunError(
                f"a host of the trainer in the Ray: {type(cause).__name__}: {one_line(str(cause))} (folders and the "
                "program must be on every host under the same path)"
            ) from None
        except ray.exceptions.RayError as error:
            raise RunError(
                f"a host of the trainer in the Ray: {type(error).__name__}: {one_line(str(error))}"
            ) from None


@contextmanager
def placed(config: RunConfig, folder: Path) -> Iterator[Hosts]:
    """The hosts that `trainer.address` gives to this run, for as long as it needs them; RunError if there is no room.

    From now on this process sees those of its GPUs alone that are reserved.
    """
    import ray
    from ray.util.placement_group import remove_placement_group

    trainer = config.trainer
    assert trainer.address is not None
    with joined_ray(trainer.address, config.rollout.workers, PLACED_S, trainer.ranks):
        cpus, gpus = trainer.ranks // trainer.hosts, _gpus(config)
        group = _group(config, cpus, gpus)
        try:
            actors = [_actor(group, host, cpus, gpus) for host in range(trainer.hosts)]
            hosts = Hosts(group, actors, folder, cpus)
            if gpus:
                _see(",".join(hosts.gpus[0]))
            try:
                yield hosts
            finally:
                with suppress(ray.exceptions.RayError):
                    ray.get([actor.close.remote() for actor in actors], timeout=PLACED_S)
        finally:
            with suppress(ray.exceptions.RayError):
                remove_placement_group(group)


def _see(gpus: str) -> None:
    """Let this process see these GPUs alone; RunError if it has others already, as in a sweep that goes on."""
    import torch

    now = os.environ.get(VISIBLE)
    if torch.cuda.is_initialized() and now != gpus:
        raise RunError(
            f"this process computes on GPUs already (CUDA_VISIBLE_DEVICES={now}), and the Ray of trainer.address gives "
            f"the run others ({gpus}): start each run of the sweep by itself"
        )
    os.environ[VISIBLE] = gpus


def _gpus(config: RunConfig) -> int:
    """How many are reserved on each host."""
    import ray

    if config.model.device is Device.cpu or not ray.cluster_resources().get("GPU"):
        return 0
    return reserved(config)


def reserved(config: RunConfig) -> int:
    """GPUs of a host, all up to the last that ranks or workers are to have; by NCCL no worker has a sending rank's."""
    trainer, rollout, transfer = config.trainer, config.rollout, config.transfer
    ranks = trainer.gpus or range(trainer.ranks // trainer.hosts)
    most = 1 + max([*ranks, *(rollout.gpus or ())])
    if rollout.gpus is None and isinstance(transfer, CollectiveConfig) and transfer.library is Library.nccl:
        sending = len(ranks) if isinstance(trainer, ShardedConfig) else 1
        most = max(most, sending + -(-rollout.workers // trainer.hosts) * rollout.gpus_each)
    return most


def _group(config: RunConfig, cpus: int, gpus: int) -> Any:
    """Room for the ranks of each host and for its share of the workers, on hosts that are different ones."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    hosts = config.trainer.hosts
    bundle = {"CPU": cpus + -(-config.rollout.workers // hosts)} | ({"GPU": gpus} if gpus else {})
    here = {NODE: ray.get_runtime_context().get_node_id()}
    others: list[dict[str, str]] = [{} for _ in range(hosts - 1)]
    group = placement_group([bundle] * hosts, "STRICT_SPREAD", bundle_label_selector=[here, *others])
    try:
        ray.get(group.ready(), timeout=PLACED_S)
    except ray.exceptions.RayError:
        remove_placement_group(group)
        what = " and ".join(f"{count} {kind}s" for kind, count in bundle.items())
        raise RunError(
            f"the Ray at trainer.address={config.trainer.address} has no room for trainer.hosts={hosts} hosts, this "
            f"one among them, with {what} free on each, for the ranks and workers there"
        ) from None
    return group


def _actor(group: Any, host: int, cpus: int, gpus: int) -> Any:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=host)
    variables = {"PYTHONPATH": python_path()}
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": where}
    return ray.remote(Host).options(**options, runtime_env={"env_vars": variables}).remote()
