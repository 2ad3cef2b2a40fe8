"""Where metrics go: all at once, each has every row, and none that fails, hangs or is slow changes the run."""

from __future__ import annotations

import importlib.util
import json
import struct
import threading
import time
from pathlib import Path

import pytest

from rlhf.monitor.loggers import Background, Guarded, JsonlLogger, check_loggers, described, make_loggers
from rlhf.monitor.metrics import SHOWN

SMALL = ("experiment=smoke", "transfer=local", "sft.steps=2", "steps=2", "task.held_out=8", "task.prompts=64")


class Keeps:
    """A logger that keeps what it is given, and fails at one step."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.fails_at, self.closed = fails_at, 0

    def log(self, step, metrics):
        if step == self.fails_at:
            raise OSError("No space left on device")
        self.rows.append((step, dict(metrics)))

    def close(self):
        self.closed += 1


def test_a_logger_that_fails_is_said_once_closed_and_dropped(capsys):
    keeps = Keeps(fails_at=2)
    logger = Guarded("jsonl", lambda: keeps)
    for step in range(5):
        logger.log(step, {"a": 1.0})
    logger.close()
    assert [step for step, _ in keeps.rows] == [0, 1] and keeps.closed == 1
    said = capsys.readouterr().err
    assert said.count("logger=jsonl has failed, and the run goes on without it: OSError: No space left") == 1


def test_a_logger_that_cannot_even_be_made_is_dropped(capsys, tmp_path):
    logger = Guarded("jsonl", lambda: JsonlLogger(tmp_path / "nowhere"))
    logger.log(0, {})
    logger.close()
    assert capsys.readouterr().err.count("FileNotFoundError") == 1


def test_a_service_gets_every_row_in_order_from_a_thread_of_its_own_that_also_makes_it():
    keeps, threads = Keeps(), []
    logger = Background("wandb", lambda: threads.append(threading.current_thread()) or keeps)
    metrics = {"a": 0.0}
    for step in range(100):
        metrics["a"] = step / 2  # the trainer goes on with its own
        logger.log(step, metrics)
    logger.close()
    assert keeps.rows == [(step, {"a": step / 2}) for step in range(100)] and keeps.closed == 1
    assert threads != [threading.main_thread()]


def test_a_service_that_never_answers_costs_its_time_at_the_end_and_no_more(capsys):
    never = threading.Event()
    logger = Background("mlflow", lambda: never.wait() and Keeps(), close_s=0.1)
    logger.log(0, {})
    logger.close()
    assert "logger=mlflow was not done 0.1 s after the run's end" in capsys.readouterr().err
    never.set()


def test_a_run_whose_logger_fails_is_the_run_that_it_would_have_been(compose_run, tmp_path, monkeypatch, capsys):
    from rlhf.run import run

    def fails(self, step, metrics):
        raise OSError("disk full")

    undisturbed = run(compose_run(*SMALL, "logger=jsonl"), tmp_path / "undisturbed")
    monkeypatch.setattr(JsonlLogger, "log", fails)
    disturbed = run(compose_run(*SMALL, "logger=[jsonl,tensorboard]"), tmp_path / "disturbed")
    assert disturbed["gold_end"] == undisturbed["gold_end"] and disturbed["kl_end"] == undisturbed["kl_end"]
    assert capsys.readouterr().err.count("logger=jsonl has failed") == 1
    assert list((tmp_path / "disturbed" / "tensorboard").iterdir()) and (tmp_path / "disturbed/summary.json").exists()


SERVICES = ("wandb", "mlflow", "trackio")


def test_a_service_whose_package_is_missing_is_refused_before_the_run_with_what_to_install(compose_run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for package in SERVICES:
        with pytest.raises(ValueError, match=rf"pip install 'rlhf-transfer\[{package}\]', or leave {package} out"):
            check_loggers(compose_run(f"logger=[jsonl,{package}]").logger)
    check_loggers(compose_run().logger)


def test_what_services_are_told_of_a_run_is_plain_and_names_its_choices(compose_run):
    told = described(compose_run("transfer=disk", "transfer/sender=ray", "algo=ppo"))
    assert json.loads(json.dumps(told)) == told
    assert (told["transfer"]["choice"], told["transfer"]["sender"]["choice"]) == ("disk", "ray")
    assert (told["algo"]["name"], told["algo"]["advantage"], told["task"]["choice"]) == ("ppo", "gae", "sort")


def test_the_console_has_at_most_ten_columns():
    assert len(SHOWN) + len(("stage", "bar", "steps", "time")) <= 10


@pytest.mark.parametrize("package", SERVICES)
def test_a_service_without_network_has_every_row(compose_run, tmp_path, monkeypatch, package):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[{package}]'")
    offline = ["logger.wandb.mode=offline"] if package == "wandb" else []
    logged(make_loggers(compose_run(f"logger={package}", *offline), tmp_path), range(3))
    assert KEPT[package](tmp_path) == [(0, 0.0), (1, 0.5), (2, 1.0)]
    time.sleep(package == "wandb")  # its folders have the name of the second
    logged(make_loggers(compose_run(f"logger={package}", *offline, "steps=7"), tmp_path, begin=2), range(2, 5))
    assert KEPT[package](tmp_path) == [(0, 0.0), (1, 0.5), (2, 1.0), (2, 1.0), (3, 1.5), (4, 2.0)]
    known = (tmp_path / "services" / package).read_text()
    logged(make_loggers(compose_run(f"logger={package}", *offline), tmp_path), range(1))
    assert (tmp_path / "services" / package).read_text() != known, "a run that begins anew is another"


def logged(loggers, steps):
    (logger,) = loggers
    for step in steps:
        logger.log(step, {"train/reward": step / 2})
    logger.close()


def kept_by_wandb(folder: Path) -> list[tuple[int, float]]:
    """From the files that `wandb sync` sends, all to the run whose name they have."""
    import wandb

    wandb.teardown()  # its own process writes the file, and ends with ours
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert {path.name for path in files} == {f"run-{(folder / 'services' / 'wandb').read_text().strip()}.wandb"}
    records = [record for path in files for record in wandb_records(path)]
    assert {record.run.run_id for record in records if record.HasField("run")} == {files[0].stem.partition("-")[2]}
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
    ]
    return [(row["_step"], row["train/reward"]) for row in rows if "train/reward" in row]


def wandb_records(path: Path) -> list:
    """Of a LevelDB log, of 7 bytes and blocks of 32 KiB, after 7 of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, found, record = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # no head fits into the rest of a block
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or the last part of one
            found.append(Record.FromString(record))
            record = b""
    return found


def kept_by_mlflow(folder: Path) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("rlhf").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["algo.name"] == "grpo"
    assert run.data.params["steps"] == "60" and run.data.tags.get("resumed.steps") in (None, "7")
    return [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "train/reward")]


def kept_by_trackio(folder: Path) -> list[tuple[int, float]]:
    import sqlite3

    with sqlite3.connect(folder / "trackio" / "rlhf.db") as database:
        rows = database.execute("select step, metrics from metrics order by step").fetchall()
        ((name,),) = database.execute("select distinct run_name from metrics").fetchall()
    assert name == (folder / "services" / "trackio").read_text().strip()
    return [(step, json.loads(metrics)["train/reward"]) for step, metrics in rows]


KEPT = {"wandb": kept_by_wandb, "mlflow": kept_by_mlflow, "trackio": kept_by_trackio}
