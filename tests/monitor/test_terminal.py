"""What a worker, a service or a file says comes to the screen without a character that a terminal would obey."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.check import _table
from rlhf.monitor.loggers import Guarded
from rlhf.monitor.progress import Bars
from rlhf.reports.summary import PHASES, print_table
from transfer.agreement.wire import TransferError
from transfer.worker.process import WorkerProcess

EVIL = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e"
ROOT = Path(__file__).resolve().parents[2]


def assert_safe(text):
    assert all(line.isprintable() for line in text.splitlines()), repr(text)
    assert "\\x1b[2J" in text


def test_warnings_of_the_transfer_and_lines_of_workers(capsys):
    with Bars(on=True) as bars:
        logging.getLogger("transfer").warning("%s was started again", EVIL)
        bars.say(f"a trace of {EVIL}")
    out = capsys.readouterr().out
    assert_safe(out)
    assert "warning: \\x1b[2J" in out and "a trace of \\x1b[2J" in out


def test_paths_and_rows_are_printed_as_they_are(capsys, tmp_path):
    folder, row = tmp_path / "logger=[console,jsonl] [", "rows.jsonl:100: '[/b] :key: [red]x[/red]'"
    (folder / "b]").mkdir(parents=True)
    names = ("transfer_ms", "transfer_share", "step_ms", "tokens_per_second", "steps")
    print_table(dict.fromkeys([*names, *(f"seconds_{phase}" for phase in PHASES)], 1.0), folder / "b]", row)
    with Bars(on=True) as bars:
        bars.say(row)
        bars.stage(row, 1).advance()
        _table(bars.console, row, [(row, row)])
    out = capsys.readouterr().out
    assert f"written: {folder}/b]/" in out and f"rlhf.report '{folder}/b]'" in out
    assert out.count("rows.jsonl:100: '[/b] :key: [red]x[/red]'") >= 3
    assert "\U0001f4af" not in out


def test_reasons_of_a_logging_service(capsys):
    def make():
        raise ConnectionError(f"{EVIL}\nand more")

    Guarded("wandb", make).log(0, {})
    err = capsys.readouterr().err
    assert_safe(err)
    assert len(err.splitlines()) == 1


def test_the_log_of_a_worker_that_dies(tmp_path, monkeypatch):
    (tmp_path / "dying.py").write_text(f"import sys; sys.exit('\\x1b[1;31mred\\x1b[0m ' + {EVIL!r})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    died = pytest.raises(TransferError, match="died while it started")
    with WorkerProcess("worker 0", "dying", "{}", tmp_path / "log") as worker, died as caught:
        worker.port(time.monotonic() + 60)
    assert_safe(str(caught.value))
    assert "\nred \\x1b[2J" in str(caught.value)


@pytest.mark.slow
def test_a_file_whose_columns_have_such_names(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"\\u001b[2J": 1, "\\u202e": 2}\n')
    command = [sys.executable, "-m", "rlhf.train", "task=jsonl", f"task.path={tmp_path / 'rows.jsonl'}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "no column" in done.stderr
    assert_safe(done.stderr)
