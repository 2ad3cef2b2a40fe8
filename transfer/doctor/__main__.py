"""The command line; nothing heavy is imported in this process, whatever is checked."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from transfer.doctor.catalog import checks
from transfer.doctor.choice import choose
from transfer.doctor.finding import LATE
from transfer.doctor.load import MOST, PATIENCE, patience
from transfer.doctor.runner import Progress, run

DEADLINE_S = 27.0  # so that all is over, and gone, within 30 where nothing else runs
NO_TIME = 75  # exit code; sysexits.h calls it EX_TEMPFAIL
REPORT_S = 2.0  # between two lines of progress


def main() -> int:
    """Check, print, and return 0 if weights reached another process by at least one backend; see --help."""
    options = _options()
    deadline_s = DEADLINE_S * patience() if options.deadline is None else options.deadline
    patient = max(1.0, deadline_s / DEADLINE_S)
    os.environ[PATIENCE] = str(patient)  # for the processes in which checks run
    signal.signal(signal.SIGTERM, _terminated)
    try:
        with tempfile.TemporaryDirectory(prefix="doctor-", ignore_cleanup_errors=True) as folder:
            results = run(checks(options.quick, patient), Path(folder), deadline_s, _progress())
    except KeyboardInterrupt:
        print("doctor: interrupted", file=sys.stderr)
        return 130
    from transfer.doctor.table import as_json, show

    choice = choose(results)
    if options.json:
        print(as_json(results, choice))
    else:
        show(results, choice)
    if choice.moves:
        return 0
    return NO_TIME if any(result.finding.status == LATE for result in results) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m transfer.doctor",
        description="Check what of the weight transfer works on this machine, with real transfers of 1 MiB, and say "
        "what does not, why, what to do, and which backend to choose.",
        epilog="Exit code 0: weights reached another process by at least one backend; 1: they did not; "
        f"{NO_TIME}: they did not, and some checks had no time: run it again, with a longer --deadline.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--quick", action="store_true", help="leave out what needs a Ray, whose start is slow")
    limit = f"seconds for all of it (default: {DEADLINE_S:g}, and up to {MOST:g} times as long on a busy machine)"
    parser.add_argument("--deadline", type=_seconds, metavar="S", help=limit)
    return parser.parse_args()


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds greater than 0 (got {text})")
    return value


def _progress() -> Progress:
    """A line on stderr now and then; on a terminal always the same one."""
    count = len(checks())
    last = time.monotonic()
    terminal = sys.stderr.isatty()

    def progress(done: int, running: list[str]) -> None:
        nonlocal last
        if terminal and done == count:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)  # the line goes
        elif time.monotonic() - last > (0.2 if terminal else REPORT_S):
            last = time.monotonic()
            line = f"{done} of {count} checks done; running: {', '.join(running) or 'none'}"
            begin, end = ("\r\x1b[K", "") if terminal else ("", "\n")
            print(begin + line[:110], end=end, file=sys.stderr, flush=True)

    return progress


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
