"""Shared by all tests: one torch thread, and runs composed as the command line composes them."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def compose_run():
    """`compose_run("algo=ppo", ...) -> RunConfig`."""
    from hydra import compose, initialize_config_dir

    from rlhf.config import CONF, checked, register

    register()

    def composed(*overrides: str):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return checked(compose("config", overrides=list(overrides)))

    return composed
