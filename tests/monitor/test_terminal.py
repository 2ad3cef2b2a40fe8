"""What a worker, a service or a file says comes to the screen without a character that a terminal would obey."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.monitor.loggers import Guarded
from rlhf.monitor.progress import Bars
from transfer.process import WorkerProcess
from transfer.wire import TransferError

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
