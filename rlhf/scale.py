"""`python -m rlhf.scale RUN_DIR 4`: more workers, or fewer, for a run that goes on; the run does it between two steps.

This command leaves a request in the run's folder and waits for the answer (shell/scale_files.py).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf.shell import scale_files
from rlhf.shell.ending import INTERRUPTED, RunError, alone, terminate_as_interrupt
from rlhf.shell.scale_files import Answer, Request
from rlhf.shell.screen import outlast
from transfer.agreement.shown import printable
from transfer.agreement.wire import TOKEN_VARIABLE

HELP = f"""\
More workers, or fewer, for a run that goes on (docs/operations.md). No number of the run changes.

  python -m rlhf.scale RUN_DIR 4                            from the next step on, or as soon as they are up
  python -m rlhf.scale RUN_DIR --join http://host:8000      one that runs already; its token is in {TOKEN_VARIABLE}

It waits until the run has done it, which says why not if it cannot; the run then goes on with the workers that it has.
"""
LOOK_S = 0.1  # between two looks for an answer
WAIT_S = 600.0
STALE_S = 10.0  # a run rewrites its status every second
MARKS = (".hydra/config.yaml", "status.json", "metrics.jsonl")  # of a run's folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask a run for another number of workers, and wait until it has them."""
    outlast()
    terminate_as_interrupt()  # so that a request is taken back
    parser = argparse.ArgumentParser(
        "python -m rlhf.scale", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="RUN_DIR", help="the run's folder")
    parser.add_argument("workers", type=int, nargs="?", help="how many there are to be, 1 at least")
    parser.add_argument("--join", action="append", default=[], metavar="URL", help="a worker that runs already")
    parser.add_argument(
        "--wait", type=float, default=WAIT_S, metavar="S", help="give up after so many seconds (default: %(default)g)"
    )
    given = parser.parse_args(arguments)
    if (given.workers is None) is not bool(given.join):
        parser.error("say how many workers there are to be, or --join URL")
    if given.workers is not None and given.workers < 1:
        parser.error(f"a run has at least 1 worker (got {given.workers})")
    if wrong := [url for url in given.join if not url.startswith(("http://", "https://"))]:
        parser.error(f"--join must be like http://127.0.0.1:8000 (got {wrong[0]!r})")
    request = Request(given.workers, given.join, os.environ.get(TOKEN_VARIABLE) if given.join else None)
    try:
        print(printable(asked(given.folder, request, time.monotonic() + given.wait)))
    except (RunError, OSError) as error:
        print(printable(str(error)), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def asked(folder: Path, request: Request, deadline: float) -> str:
    """What a run says once it has as many workers as it was asked for; RunError: why not."""
    check(folder)
    try:
        scale_files.post(folder, request)
    except FileExistsError:
        raise RunError(
            f"somebody else has asked this run already, and it has not looked yet: wait, or remove "
            f"{folder / scale_files.REQUEST}"
        ) from None
    try:
        return _answered(folder, request, deadline)
    finally:
        scale_files.withdrawn(folder, request)
        if scale_files.heard(folder, request) is not None:
            (folder / scale_files.ANSWER).unlink(missing_ok=True)


def check(folder: Path) -> None:
    """RunError unless a run goes on there that looks for requests."""
    if not any((folder / name).exists() for name in MARKS):
        raise RunError(f"{folder} is no folder of a run: it has none of {', '.join(MARKS)}")
    if not goes_on(folder):
        raise RunError(f"no run goes on in {folder}: a resume begins with as many as its rollout.workers says")
    if _algorithm(folder) == "dpo":
        raise RunError("algo=dpo samples before it learns, not between steps: its workers stay as they are")


def goes_on(folder: Path) -> bool:
    """Whether a process trains there: it has the folder's lock, or, on a file system without locks, a fresh status."""
    try:
        with alone(folder) as locked:
            return not locked and _status(folder).get("state") == "running" and _age_s(folder) < STALE_S
    except RunError:
        return True


def _answered(folder: Path, request: Request, deadline: float) -> str:
    said = ""
    while True:
        ended = not goes_on(folder)  # before the answer is looked for: what a run says last is not missed
        answer = scale_files.heard(folder, request)
        if answer is not None and answer.state == "done":
            return answer.line
        if answer is not None and answer.state == "failed":
            raise RunError(answer.line)
        said = _progress(answer, said)
        if ended:
            raise RunError(f"the run in {folder} has ended meanwhile")
        if time.monotonic() > deadline:
            if scale_files.withdrawn(folder, request):
                raise RunError(f"the run did not look within --wait ({_where(folder)}): nothing is changed")
            if answer is not None:
                raise RunError(f"the run is still at it: {answer.line}; what comes of it is on its screen")
            raise RunError("the run has begun, and not answered within --wait; what comes of it is on its screen")
        time.sleep(LOOK_S)


def _progress(answer: Answer | None, said: str) -> str:
    """Print where the run is with it, if that is new; what was said last."""
    line = "asked: the run looks between two steps" if answer is None else answer.line
    if line != said:
        print(printable(line), flush=True)
    return line


def _where(folder: Path) -> str:
    status = _status(folder)
    return f"it is in {status.get('stage', '?')} {status.get('done', '?')}/{status.get('of', '?')}"


def _status(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        told = json.loads((folder / "status.json").read_text(encoding="utf-8"))
        return told if isinstance(told, dict) else {}
    return {}


def _age_s(folder: Path) -> float:
    """Since the status was written."""
    with suppress(OSError):
        return time.time() - (folder / "status.json").stat().st_mtime
    return float("inf")


def _algorithm(folder: Path) -> str:
    """Which one the run is configured with; empty where Hydra has written nothing."""
    import yaml

    with suppress(OSError, yaml.YAMLError):
        config = yaml.safe_load((folder / ".hydra" / "config.yaml").read_text(encoding="utf-8"))
        return str(config["algo"]["name"]) if isinstance(config, dict) and isinstance(config.get("algo"), dict) else ""
    return ""


if __name__ == "__main__":
    main()
