"""Where metrics go: files in the run's folder, and services. One that fails is said once and dropped; the run goes on.

A file's logger writes at once. A service's works in a thread of its own: a server that is slow, or never answers, takes
no time of a step, and at the end of the run at most `CLOSE_S`. Secrets come from the environment, as each service has
it (WANDB_API_KEY, MLFLOW_TRACKING_USERNAME, HF_TOKEN, ...), and stand in no configuration. A run that goes on after a
stop is the same run for a service: the run's folder keeps by which name the service knows it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import queue
import secrets
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlhf.compose import choice
from rlhf.config import (
    JsonlLoggerConfig,
    LoggerConfig,
    MlflowLoggerConfig,
    RunConfig,
    TensorboardLoggerConfig,
    TrackioLoggerConfig,
    WandbLoggerConfig,
)
from rlhf.plugins.part import SERVICE
from rlhf.plugins.registry import part_of
from rlhf.reports.run_folder import flat
from transfer.agreement.shown import one_line

CLOSE_S = 30.0  # how long a service has at the end of a run to take what it has not taken yet
KNOWN_AS = "services"  # folder of a run: a file a service, by which name it knows the run


class Logger(Protocol):
    """Where metrics go; several at once."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Named:
    """A run at one service."""

    path: Path
    goes_on: bool

    def name(self) -> str | None:
        """Its name there; None of a run that begins, or that the service does not know yet."""
        return self.path.read_text(encoding="utf-8").strip() if self.goes_on and self.path.is_file() else None

    def keep(self, name: str) -> str:
        """For when the run is resumed."""
        self.path.parent.mkdir(exist_ok=True)
        writing = self.path.with_suffix(".writing")
        writing.write_text(f"{name}\n", encoding="utf-8")
        writing.replace(self.path)
        return name


@dataclass(frozen=True, slots=True)
class Given:
    """What loggers are made of, beside their own dials."""

    run: RunConfig
    folder: Path
    begin: int | None  # the step at which a run goes on; None: a new one
    named: Named  # at a service


class JsonlLogger:
    """`metrics.jsonl`: one object a step or evaluation, flushed at once."""

    def __init__(self, folder: Path) -> None:
        self.file = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class TensorboardLogger:
    """TensorBoard event files."""

    def __init__(self, folder: Path, begin: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _unless_of_tensorboard(threading.excepthook)
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=begin)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


def _unless_of_tensorboard(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What to do with a thread's exception: its writer's, that of a full disk, say, is raised again by `log`."""

    def said(told: Any) -> None:
        if not (isinstance(told.exc_value, OSError) and type(told.thread).__module__.startswith("tensorboard.")):
            hook(told)

    return said


class WandbLogger:
    """A run of Weights & Biases, with its local files in `wandb/`.

    Of a run that goes on it drops the rows that it has already.
    """

    def __init__(self, config: WandbLoggerConfig, given: Given) -> None:
        import wandb

        self.run = wandb.init(
            id=given.named.name() or given.named.keep(secrets.token_hex(4)),
            resume="allow",
            project=config.project,
            entity=config.entity,
            mode=config.mode.value,
            dir=str(given.folder),
            name=given.folder.name,
            config=described(given.run),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


class MlflowLogger:
    """A run of an MLflow experiment; without a server's address, in a database of the run's folder.

    Of a run that goes on it has what was logged after the checkpoint twice, with the same steps.
    """

    def __init__(self, config: MlflowLoggerConfig, given: Given) -> None:
        import mlflow
        from mlflow.entities import Metric, Param, RunTag

        self.metric = Metric
        folder, named = given.folder, given.named
        uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / 'mlflow.db'}"
        self.client = mlflow.MlflowClient(uri)
        self.id = self._known(named.name()) or named.keep(self._created(config.experiment, folder.name))
        params = {key: str(value) for key, value in flat(described(given.run)).items()}
        before = self.client.get_run(self.id).data.params  # which MLflow does not change
        new = [Param(key, value) for key, value in params.items() if key not in before]
        others = {key: value for key, value in params.items() if before.get(key, value) != value}
        self.client.log_batch(self.id, params=new, tags=[RunTag(f"resumed.{k}", v) for k, v in others.items()])

    def _known(self, name: str | None) -> str | None:
        """The run of that name, which goes on; None if it is not there."""
        from mlflow.exceptions import MlflowException

        if name is None:
            return None
        try:
            self.client.update_run(name, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return name

    def _created(self, experiment: str, name: str) -> str:
        found = self.client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self.client.create_experiment(experiment)
        return str(self.client.create_run(number, run_name=name).info.run_id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        self.client.log_batch(self.id, [self.metric(name, value, now, step) for name, value in metrics.items()])

    def close(self) -> None:
        self.client.set_terminated(self.id)


class TrackioLogger:
    """A run of trackio, in its local database or in a Hugging Face Space.

    Of a run that goes on it has what was logged after the checkpoint twice, with the same steps.
    """

    def __init__(self, config: TrackioLoggerConfig, given: Given) -> None:
        import trackio

        folder, named = given.folder, given.named
        self.run = trackio.init(
            project=config.project,
            name=named.name()
            or named.keep(f"{folder.name}-{secrets.token_hex(2)}"),  # it finds runs by their name alone
            resume="allow",
            space_id=config.space,
            config=described(given.run),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


class Guarded:
    """A logger that ends at its first failure, with one line to stderr."""

    def __init__(self, name: str, make: Callable[[], Logger]) -> None:
        self.name = name
        self.logger: Logger | None = None
        self._try(lambda: setattr(self, "logger", make()))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.logger is not None:
            self._try(lambda: self.logger.log(step, metrics))  # type: ignore[union-attr]

    def close(self) -> None:
        if self.logger is not None:
            self._try(self.logger.close)
            self.logger = None

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self.fail(f"{type(error).__name__}: {error}")

    def fail(self, reason: str) -> None:
        """Say why and drop the logger, which may still hold something open."""
        failed, self.logger = self.logger, None
        print(
            f"warning: logger={self.name} has failed, and the run goes on without it: {one_line(reason)}",
            file=sys.stderr,
        )
        if failed is not None:
            with suppress(Exception):
                failed.close()


class Background:
    """A guarded logger in a thread of its own, which also makes it."""

    def __init__(self, name: str, make: Callable[[], Logger], close_s: float = CLOSE_S) -> None:
        self.name, self.close_s = name, close_s
        self.rows: queue.SimpleQueue[tuple[int, Mapping[str, float]] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, args=(make,), name=f"logger {name}", daemon=True)
        self.thread.start()

    def _work(self, make: Callable[[], Logger]) -> None:
        logger = Guarded(self.name, make)
        while (row := self.rows.get()) is not None:
            logger.log(*row)
        logger.close()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows.put((step, dict(metrics)))

    def close(self) -> None:
        """Wait until it has taken all rows, or not longer than its time."""
        self.rows.put(None)
        self.thread.join(self.close_s)
        if self.thread.is_alive():
            print(
                f"warning: logger={self.name} was not done {self.close_s:g} s after the run's end: "
                "what it had not taken yet is lost there (metrics.jsonl has all, with logger=jsonl)",
                file=sys.stderr,
            )


def jsonl(config: JsonlLoggerConfig, given: Given) -> Logger:
    """A file."""
    return JsonlLogger(given.folder)


def tensorboard(config: TensorboardLoggerConfig, given: Given) -> Logger:
    """Files."""
    return TensorboardLogger(given.folder, given.begin)


def is_service(config: LoggerConfig) -> bool:
    """Whether it works in a thread of its own, and is told of runs that somebody else may see."""
    return SERVICE in part_of(config).traits


def check_package(config: LoggerConfig) -> None:
    """Raise ValueError, naming the extra, where a service's package is not installed."""
    package = choice(config)
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"logger={package} needs the package {package}: pip install 'rlhf-transfer[{package}]', "
            f"or leave {package} out of logger=[...]"
        )


def check_loggers(configs: Mapping[str, LoggerConfig]) -> None:
    """Raise ValueError where a logger cannot be had."""
    for config in configs.values():
        if check := part_of(config).checker():
            check(config)


def make_loggers(run: RunConfig, folder: Path, begin: int | None = None) -> list[Logger]:
    """The writers that a run names, for one that goes on at step `begin`; None: a new one.

    The console is none: it is the run's bars and table (progress.py, summary.py).
    """
    return [_make(config, run, folder, begin) for config in run.logger.values() if part_of(config).make is not None]


def _make(config: LoggerConfig, run: RunConfig, folder: Path, begin: int | None) -> Logger:
    part = part_of(config)
    given = Given(run, folder, begin, Named(folder / KNOWN_AS / part.name, goes_on=begin is not None))
    kind = Background if is_service(config) else Guarded
    return kind(part.name, lambda: part.maker()(config, given))


def described(run: RunConfig) -> dict[str, Any]:
    """The run's dials as nested dicts of plain values, each group with the name of its choice."""
    plain = json.loads(json.dumps(dataclasses.asdict(run), default=lambda value: getattr(value, "value", str(value))))
    for group in ("task", "model", "rollout", "reward", "transfer"):
        plain[group]["choice"] = choice(getattr(run, group))
    plain["transfer"]["sender"] = {"choice": choice(run.transfer.sender), **(plain["transfer"].get("sender") or {})}
    return plain
