"""The process in which checks run: takes one a line on stdin, answers each with the finding as a line of JSON."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from transfer.doctor.finding import Finding, failed, late, timed_out
from transfer.doctor.load import Since

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def carried_out(target: str, arguments: Mapping[str, Any]) -> Finding:
    """The finding of one check; what it raises is one, too. A deadline that passed on a busy machine proves nothing."""
    module, _, function = target.partition(":")
    since = Since()
    try:
        return getattr(importlib.import_module(module), function)(**arguments)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        finding = failed(error)
        return late(finding.seen) if timed_out(error) and since.busy else finding


def main() -> None:
    """Serve the doctor until it closes stdin."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # whatever else is printed goes to the log
        for line in sys.stdin:
            order = json.loads(line)
            finding = carried_out(order["target"], order["arguments"])
            print(json.dumps(asdict(finding)), file=answers, flush=True)


if __name__ == "__main__":
    main()
