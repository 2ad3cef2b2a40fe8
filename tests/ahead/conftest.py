"""Runs that sample ahead, small ones, which end as suddenly as is asked."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from small import SMALL

from rlhf.monitor.metrics import Recorder
from rlhf.run import run


class Killed(BaseException):
    """As sudden as SIGKILL: nothing handles it."""


@pytest.fixture
def train_ahead(compose_run, tmp_path, monkeypatch):
    """`train_ahead("algo=ppo", name="a", killed_at=3)`: the folder; step `killed_at` is the first not recorded.

    `at` is called with each step before it is.
    """

    def trained(
        *overrides: str,
        name: str = "run",
        killed_at: int = 0,
        resume: bool = False,
        at: Callable[[int], None] = lambda step: None,
    ) -> Path:
        plain = Recorder.step

        def dying(record, step, *rest):
            at(step)
            if step == killed_at:
                raise Killed
            return plain(record, step, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(Recorder, "step", dying)
            own = [each for each in SMALL if "task=guess" not in overrides or not each.startswith("task.")]
            try:
                run(compose_run(*own, *overrides), tmp_path / name, overrides, resume)
                assert not killed_at
            except Killed:
                random.seed(os.urandom(8))  # another process would not have these either
        return tmp_path / name

    return trained
