"""Into a Ray, or one clear line why not: a private one of this machine, or one that runs already.

A private Ray gets a folder of its own, since its sockets need a short path, and a token of its own, since by itself Ray
would write one into the home folder; both are gone with it, but for the folder of a process that was killed, which the
next one removes. Whether a Ray that runs already can be used, a process of its own finds out: from Ray's own attempt to
connect nothing can bring this one back, whatever it waits for.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transfer.agreement.shown import one_line
from transfer.agreement.wire import TransferError

STORE_BYTES = 80 * 2**20  # Ray's least; weights do not travel through its object store
SHORT_PATH = 43  # characters of its folder; its sockets lie 64 deeper, and may have 107
PREFIX = "ray-"  # of its folder, with 8 characters more
MARK = ".held"  # in it, locked for as long as its process lives
CONNECT_S = 5.0  # for a connection to an address at which Ray listens
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
OWN_TOKEN = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")  # any of them: the user has chosen
PROBE = """
import json, logging, sys
try:
    import ray
    ray.init(sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
    print(json.dumps({"cpus": ray.cluster_resources().get("CPU", 0)}), flush=True)
    ray.shutdown()
except Exception as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
"""


@contextmanager
def private_ray(cpus: int) -> Iterator[None]:
    """A Ray that ends with this context and leaves nothing; TransferError if it does not start."""
    import ray

    folder = _folder()
    sweep(folder.parent)
    set_environment()
    held = _holding(folder)
    try:
        _start(folder, cpus)
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def sweep(place: Path) -> None:
    """Remove the folders that private Rays of processes which were killed have left in this place."""
    for mark in place.glob(f"{PREFIX}????????/{MARK}"):
        with suppress(OSError):  # another user's, or another process removes it just now
            descriptor = os.open(mark, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_uid == os.geteuid():
                    shutil.rmtree(mark.parent, ignore_errors=True)
            finally:
                os.close(descriptor)


def _holding(folder: Path) -> int:
    """A descriptor that says, until this process ends or closes it, that the folder is in use."""
    new = folder / f"{MARK}.new"
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with suppress(OSError):  # a file system without locks: then nobody can tell, and nobody removes it
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    new.rename(folder / MARK)  # is not seen before it is locked
    return descriptor


@contextmanager
def joined_ray(address: str, workers: int, timeout_s: float, ranks: int = 0) -> Iterator[None]:
    """The Ray at `address`; TransferError within `timeout_s` if it cannot be used, or not by so many processes.

    `ranks`: of a trainer that are in it, too; then `trainer.address` names it.
    """
    import ray

    _check_address(address, workers, timeout_s, ranks)
    try:
        _join(address, ranks)
        yield
    finally:
        ray.shutdown()


def check_cpus(where: str, cpus: float, workers: int, ranks: int = 0) -> None:
    """TransferError unless a Ray has a CPU for each worker, and for each rank of a trainer that is in it."""
    if cpus >= workers + ranks:
        return
    who = "each rank of the trainer and each worker" if ranks else "each worker"
    keys = "trainer.ranks and rollout.workers together" if ranks else "rollout.workers"
    raise TransferError(
        f"{where} has {cpus:g} CPU(s), and {who} takes one: {keys} must be at most {int(cpus)} there "
        f"(got {workers + ranks})"
    )


def set_environment() -> None:
    """What a Ray of this process should know, unless the user has said something else."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else an actor that reserves no GPU sees none
    if not any(name in os.environ for name in OWN_TOKEN):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextmanager
def keeping_sigterm() -> Iterator[None]:
    """Put SIGTERM's handler back after a call that replaces it, as ray.init does."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _start(folder: Path, cpus: int) -> None:
    import ray

    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": STORE_BYTES, "_temp_dir": str(folder)}
    try:
        with keeping_sigterm():
            ray.init("local", num_cpus=cpus, **own, **QUIET)
    except Exception as error:  # of whatever kind: it is Ray's, and only its words matter
        raise TransferError(f"Ray does not start: {type(error).__name__}: {one_line(str(error))}") from error


def _join(address: str, ranks: int) -> None:
    import ray

    try:
        with keeping_sigterm():
            ray.init(address, **QUIET)
    except Exception as error:
        raise _unusable(ranks, address, f"{type(error).__name__}: {one_line(str(error))}") from error


def _folder() -> Path:
    """A new folder whose path is short enough for Ray's sockets, in the first place where there can be one."""
    places = [place for place in (os.environ.get("RAY_TMPDIR"), os.environ.get("TMPDIR"), "/tmp") if place]
    tried = []
    for place in dict.fromkeys(places):
        if len(os.fsencode(place)) > SHORT_PATH - len(f"/{PREFIX}xxxxxxxx"):
            tried.append(f"{place!r} is too long")
            continue
        try:
            return Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        except OSError as error:
            tried.append(f"{place!r}: {error.strerror}")
    raise TransferError(
        f"Ray needs a folder for its sockets, and there is none ({'; '.join(tried)}): set RAY_TMPDIR to a folder "
        f"that can be written to, of at most {SHORT_PATH - len(f'/{PREFIX}xxxxxxxx')} characters"
    )


def _check_address(address: str, workers: int, timeout_s: float, ranks: int) -> None:
    deadline = time.monotonic() + timeout_s
    if address != "auto":
        _check_listens(address, min(timeout_s, CONNECT_S), ranks)
    command = [sys.executable, "-c", PROBE, address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        limit = f"{timeout_s:g} s" if ranks else f"transfer.sender.start_timeout_s={timeout_s:g}"
        raise _unusable(ranks, address, f"it did not answer within {limit}") from None
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    told: dict[str, Any] = json.loads(lines[-1]) if lines else {"error": f"{done.stderr} (code {done.returncode})"}
    if "error" in told:
        raise _unusable(ranks, address, one_line(told["error"]))
    check_cpus(f"the Ray at {address}", told["cpus"], workers, ranks)


def _check_listens(address: str, timeout_s: float, ranks: int) -> None:
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        socket.create_connection((parts.hostname or "", parts.port or 10001), timeout_s).close()
    except OSError as error:
        raise _unusable(ranks, address, f"nothing answers there ({error})") from None


def _unusable(ranks: int, address: str, why: str) -> TransferError:
    key = "trainer.address" if ranks else "transfer.sender.address"
    return TransferError(f"the Ray at {key}={address} cannot be used: {why}")
