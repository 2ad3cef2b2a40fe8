"""Ends the groups of processes that it was told of, when whoever told it is gone: also after a kill.

Lines of its standard input are `+PID` of a group that was begun and `-PID` of one that has ended. Standard library
only: it is run by its path.
"""

import contextlib
import os
import signal
import sys


def main() -> None:
    """Until the end of the input."""
    groups: set[int] = set()
    for line in sys.stdin:
        (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
