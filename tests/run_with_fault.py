"""`python run_with_fault.py PHASE VICTIM SIGNAL override...`: the command line, with a signal sent in one phase.

The victim is the trainer's process group, as Ctrl-C in a terminal has it, the trainer alone, or its first worker.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import time
from importlib import import_module

import psutil

PHASES = {  # -> (module, function, at which call)
    "starting workers": ("rlhf.rollout.launch", "Workers.senders", 1),
    "warm-up": ("rlhf.stages.sft", "join", 3),  # makes each batch
    "pairs": ("rlhf.rollout.client", "RolloutClient._ask", 1),
    "reward model": ("rlhf.stages.reward_model", "pair_scores", 3),
    "sampling": ("rlhf.rollout.client", "RolloutClient._ask", 5),  # after the pairs and an evaluation
    "learning": ("rlhf.learning.learner", "Learner.learn", 2),
    "withdrawing": ("transfer.trainer.session", "Session.withdraw", 2),  # of version 1
    "staging": ("transfer.trainer.two_phase_commit", "TwoPhaseCommit._stage", 2),  # of version 1
    "finishing": ("transfer.trainer.two_phase_commit", "TwoPhaseCommit._finished", 2),
}


def harm(victim: str, signum: int) -> None:
    """Send the signal; a worker is found by its command line."""
    if victim == "group":
        os.killpg(0, signum)
    elif victim == "trainer":
        os.kill(os.getpid(), signum)
    else:
        first_worker().send_signal(signum)


def first_worker() -> psutil.Process:
    """The first worker below this process, known by its command line, once there is one."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                words = process.cmdline()
                if "rlhf.rollout.worker" in words or " ".join(words).startswith("ray::RayWorker"):
                    return process
        time.sleep(0.05)
    print("no worker was started", file=sys.stderr)
    os._exit(70)


def inject(phase: str, victim: str, signum: int) -> None:
    """Wrap the phase's function, so that its n-th call does the harm first."""
    module, name, nth = PHASES[phase]
    owner = functools.reduce(getattr, name.split(".")[:-1], import_module(module))
    original = getattr(owner, name.split(".")[-1])
    calls = 0

    @functools.wraps(original)
    def wrapped(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == nth:
            harm(victim, signum)
        return original(*arguments, **options)

    setattr(owner, name.split(".")[-1], wrapped)


if __name__ == "__main__":
    from rlhf.train import main

    inject(sys.argv[1], sys.argv[2], signal.Signals[sys.argv[3]])
    sys.argv[1:4] = []
    main()
