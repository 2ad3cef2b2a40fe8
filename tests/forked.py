"""Processes of the tests, forked from one that has imported torch and transformers: importing these takes longer than
most of what a test does with a process.

After `use()`, subprocess.Popen starts `python -m MODULE`, for the modules below, and `python -c` with code that imports
torch, by a server that forks itself; it is started when it is first needed. What it makes is the caller's own child,
with the pipes, variables and folder that Popen was given, and has a server of its own for its workers, and for what it
starts by multiprocessing's `spawn`. FRESH among the
variables has a process import all itself; with LIGHT, it is forked from one that cannot import what is heavy.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import inspect
import json
import multiprocessing.util
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

WORKERS = {"rlhf.rollout.worker", "rlhf.beside", "transfer.worker.plain_worker"}  # they start none
MODULES = {"rlhf.train", "rlhf.resume", "rlhf.evaluate", *WORKERS}
SCRIPTS = ("run_with_fault.py", "fuzz/target.py", "transfer/test_live_view.py")  # of this folder
CODE = re.compile(r"^import [\w, ]*\btorch$", re.MULTILINE)
HERE = Path(__file__).resolve()
FRESH, LIGHT = "RLHF_FRESH_PROCESSES", "RLHF_LIGHT_PROCESS"
PARAMETERS = list(inspect.signature(subprocess.Popen._execute_child).parameters)[1:]  # type: ignore[attr-defined]
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
IMPORTED_LIGHT = (
    "rlhf.train",
    "rlhf.resume",
    "rlhf.evaluate",
    "rlhf.compose",
    "hydra._internal.utils",
    "hydra.compose",
)
IMPORTED = (  # what the modules need, and their workers
    *(
        "rlhf.run",
        "rlhf.resume",
        "rlhf.train",
        "rlhf.assembly.saved_policy",
        "rlhf.rollout.hf",
        "transfer.worker.serve",
        "transfer.worker.app",
        "transfer.worker.plain_worker",
    ),
    *("transformers.models.qwen3.modeling_qwen3", "matplotlib.pyplot", "uvicorn", "httptools"),
)
LONGEST = 2**20  # bytes of a command
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # that stop a run, unless they are ignored
MOST_FILES = 3 + 5  # that a process is given

_plainly_spawned = multiprocessing.util.spawnv_passfds
_lock = threading.Lock()
_servers: dict[bool, socket.socket] = {}  # by whether all that they fork is light


class Forked(subprocess.Popen):  # type: ignore[type-arg]
    """As the original, but for the modules that are imported already."""

    def _execute_child(self, *arguments: Any) -> None:
        told = dict(zip(PARAMETERS, arguments, strict=True))
        variables = dict(os.environ if told["env"] is None else told["env"])
        if FRESH in variables or not _is_known(told):
            super()._execute_child(*arguments)  # type: ignore[misc]
            return
        command = {
            "arguments": [str(each) for each in told["args"]],
            "variables": variables,
            "folder": str(told["cwd"] or os.getcwd()),
            "session": told["start_new_session"],
        }
        ends = [told[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        self.pid = _asked(command, LIGHT in variables, [own if end == -1 else end for own, end in enumerate(ends)])
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(told[name] for name in pipes))  # type: ignore[attr-defined]


def _is_known(told: dict[str, Any]) -> bool:
    args = told["args"]
    if not isinstance(args, list) or args[0] != sys.executable:
        return False
    match args[1:3]:
        case ["-m", module]:
            known = module in MODULES
        case ["-c", code]:
            known = bool(CODE.search(code))
        case [script, *_]:
            known = script in [str(HERE.parent / name) for name in SCRIPTS]
        case _:
            known = False
    return known and told["preexec_fn"] is None and not told["pass_fds"]


def _asked(command: dict[str, Any], light: bool, files: list[int]) -> int:
    """The id of a new child of this process, with these files as its 0, 1, 2 and wherever there is room."""
    command["ignored"] = [each for each in SIGNALS if signal.getsignal(each) is signal.SIG_IGN]
    with _lock:
        if light not in _servers:
            _servers[light] = _started(light)
        server = _servers[light]
        _adopt(True)  # what loses its parent meanwhile becomes our child
        try:
            socket.send_fds(server, [json.dumps(command).encode()], files)
            return int(server.recv(100))
        finally:
            _adopt(False)


def _spawned(path: str, args: list[str], files: Sequence[int]) -> int:
    """multiprocessing.util.spawnv_passfds, for processes of the start method `spawn`."""
    code = args[args.index("-c") :] if "-c" in args else ["", ""]
    if {FRESH, LIGHT} & set(os.environ) or "spawn_main" not in code[1]:
        return _plainly_spawned(path, args, files)
    command = {
        "arguments": [os.fsdecode(path), *code],
        "variables": dict(os.environ),
        "folder": os.getcwd(),
        "session": False,
    }
    return _asked(command | {"passed": list(files)}, False, [0, 1, 2, *files])


def _adopt(on: bool) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def _started(light: bool) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [
            sys.executable,
            HERE.name,
            str(theirs.fileno()),
            *(["light"] if light else []),
        ]  # short: others go here
        subprocess.Popen(command, cwd=HERE.parent, pass_fds=[theirs.fileno()])
    return ours


def use(server: socket.socket | None = None, light: bool = False) -> None:
    """From now on Popen asks a server: this one, or one of its own."""
    _servers.clear()
    if server is not None:
        _servers[light] = server
    subprocess.Popen = Forked  # type: ignore[misc]


# --- the server -------------------------------------------------------------------------------------------------------


def main(server: socket.socket) -> None:
    """Fork for each command; goes on, in the forked process, as `python -m MODULE`."""
    command, files = _next(server)
    while not WORKERS & set(command["arguments"][:3]):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork():
            theirs.close()
            use(ours, LIGHT in command["variables"])
            multiprocessing.util.spawnv_passfds = _spawned
            break
        for descriptor in files:  # this is the server of that process
            os.close(descriptor)
        ours.close()
        command, files = _next(theirs)
    _become(command, files)
    try:
        _run(command["arguments"])
    except SystemExit as end:
        _end(end.code)
    _end(None)


def _run(arguments: list[str]) -> None:
    _, what, module, *_ = [*arguments, ""]
    if what == "-m":
        sys.modules.pop(module, None)  # it is __main__ now
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif what == "-c":
        exec(compile(module, "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.path.insert(0, str(Path(what).parent))
        runpy.run_path(what, run_name="__main__")


def _end(code: object) -> NoReturn:
    """End as Python ends, but for taking all modules apart: in a copy of a process, longer than to import them."""
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = 120
    os._exit(code or 0)


def _next(server: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """In a new process, what it is told; the process that calls ends when its client does."""
    while True:
        message, files, _, _ = socket.recv_fds(server, LONGEST, MOST_FILES)
        if not message:
            os._exit(0)
        between = os.fork()
        if between == 0:
            between = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == between:  # until the client has adopted this process
                time.sleep(0.0005)
            server.send(str(os.getpid()).encode())
            server.close()
            command = json.loads(message)
            if command["session"]:
                os.setsid()
            return command, files
        for descriptor in files:
            os.close(descriptor)
        os.waitpid(between, 0)


def _become(command: dict[str, Any], files: list[int]) -> None:
    """This process is now as if it had been started like that."""
    for descriptor, file in enumerate(files[:3]):
        os.dup2(file, descriptor)
        os.close(file)
    there = dict(zip(map(str, command.get("passed", [])), map(str, files[3:]), strict=True))
    if there:  # code that names files by their numbers, and imports what is `__main__` in its parent
        warnings.filterwarnings("ignore", ".* found in sys.modules", RuntimeWarning, "runpy")
        command["arguments"][2] = re.sub(r"(?<==)\d+", lambda number: there[number[0]], command["arguments"][2])
    os.chdir(command["folder"])
    os.environ.clear()
    os.environ.update(command["variables"])
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for each in SIGNALS:  # of which the server may ignore what the client does not
        signal.signal(each, signal.SIG_IGN if each in command["ignored"] else signal.SIG_DFL)
    setproctitle.setproctitle(" ".join(command["arguments"]))
    _, what, *rest = command["arguments"]
    sys.argv = {"-m": rest, "-c": [what, *rest[1:]]}.get(what, [what, *rest])
    tempfile.tempdir = None  # it is where TMPDIR says
    sys.path[:0] = [command["folder"], *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    for name, descriptor, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream = os.fdopen(descriptor, mode, buffering=1 if mode == "w" else -1, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


if __name__ == "__main__":
    import light
    import setproctitle

    setproctitle.getproctitle()  # looks where its own stands while the environment is as it was
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path[0] = str(HERE.parents[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for what is forked; this ends with its client
    if "light" in sys.argv:
        light.refuse()
    for name in IMPORTED_LIGHT if "light" in sys.argv else IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else the first collection of what is forked copies all of this
    main(socket.socket(fileno=int(sys.argv[1])))
