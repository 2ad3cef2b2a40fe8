"""A `vllm serve` process of the run: `python -m rlhf.rollout.vllm_serve`, for WorkerProcess.

Reads a worker's spec from stdin, starts vLLM's own server with our plug-in on a free loopback port, reports the port
once it answers, and ends it when stdin ends, however the trainer ended.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf.rollout.gpus import VARIABLE
from rlhf.rollout.spec import WorkerSpec
from rlhf.rollout.vllm import environment
from rlhf.rollout.vllm_model import model_folder
from transfer.trainer.senders.kept_alive import KeptAlive
from transfer.vllm.plugin import BACKEND
from transfer.worker.serve import OF_PARENT, PR_SET_PDEATHSIG
from transfer.worker.stacks import dumps_stacks_when_asked

LOOK_S = 0.5
STOP_S = 2.0  # until what has not ended is killed; less than a trainer waits for this process


def main() -> None:
    """Serve until stdin ends."""
    for signum in OF_PARENT:
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _terminated)
    dumps_stacks_when_asked()
    spec = WorkerSpec.from_json(sys.stdin.buffer.readline())
    with model_folder(spec) as folder:
        port = _free_port()
        process = _started(spec, folder, port)
        try:
            threading.Thread(target=_end_with_stdin, args=(process,), daemon=True).start()
            if _answers(process, port):
                print(json.dumps({"port": port}), flush=True)
                process.wait()
        finally:
            _stop(process)


def _started(spec: WorkerSpec, folder: str, port: int) -> subprocess.Popen[bytes]:
    options: dict[str, Any] = {
        "load_format": "dummy",
        "dtype": spec.dtype,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "trust_remote_code": bool(spec.code),
        "weight_transfer_config": {"backend": BACKEND},
        **spec.engine_args,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--host", "127.0.0.1"]
    command += ["--port", str(port)]
    for key, value in options.items():
        command += _option(key, value)
    claimed = {VARIABLE: spec.visible[0]} if spec.visible else {}
    variables = {k: v for k, v in environment(spec).items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=2,  # the log
        env=variables | os.environ | claimed | {"VLLM_SERVER_DEV_MODE": "1"},
        start_new_session=True,
        preexec_fn=_die_with_us,
    )


def _option(key: str, value: Any) -> list[str]:
    """An engine argument as vLLM's command line has it."""
    name = "--" + key.replace("_", "-")
    if isinstance(value, bool):
        return [name] if value else [name.replace("--", "--no-", 1)]
    return [name, json.dumps(value) if isinstance(value, dict | list) else str(value)]


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    """Whether the server comes up; it may take as long as the trainer is willing to wait."""
    client = KeptAlive(f"http://127.0.0.1:{port}")
    while process.poll() is None:
        try:
            if client.request("GET", "/health", "", b"", 5.0).status == 200:
                return True
        except OSError:
            time.sleep(LOOK_S)
    return False


def _end_with_stdin(process: subprocess.Popen[bytes]) -> None:
    while os.read(0, 4096):  # not the buffered reader, whose lock would be held when the interpreter ends
        pass
    _stop(process)  # which ends main, too


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server with all its processes: also those that outlive it, as its engine does when it is killed.

    But for Python's resource trackers, which end by themselves, and remove the shared memory that the others leave.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        for member in _group(process.pid):
            with suppress(ProcessLookupError):
                os.kill(member, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)


def _group(leader: int) -> list[int]:
    """The processes of this group that are no resource trackers."""
    members = []
    for entry in Path("/proc").iterdir():
        with suppress(ValueError, OSError):  # not a process, or gone
            number = int(entry.name)
            if os.getpgid(number) == leader and b"resource_tracker" not in (entry / "cmdline").read_bytes():
                members.append(number)
    return members


def _terminated(*_: object) -> None:
    raise SystemExit(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_us() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
