"""The console script `rlhf`, and `python -m rlhf`: every command by one name; each is a module with a `--help`.

A command takes the place of this process, as `python -m MODULE`: same process id, arguments, signals and exit code.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from rlhf import __version__

COMMANDS = {  # by name: the module, and what it does
    "train": ("rlhf.train", "train a policy: SFT, a reward model, then RL or DPO"),
    "resume": ("rlhf.resume", "go on with a run that was stopped, from its newest checkpoint"),
    "scale": ("rlhf.scale", "more workers, or fewer, for a run that goes on"),
    "evaluate": ("rlhf.evaluate", "a saved policy on a task's held-out prompts"),
    "report": ("rlhf.report", "one HTML page about runs: curves, alarms, time, samples"),
    "sweep": ("rlhf.sweep", "tables and plot of a sweep again, from its folders"),
    "doctor": ("transfer.doctor", "what of the weight transfer works on this machine"),
    "bench": ("transfer.bench", "every way to move weights, measured"),
}
UNKNOWN = 2  # exit code


def main(arguments: Sequence[str] | None = None) -> None:
    """List the commands, say the version, or become the command that is named."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    match given:
        case [] | ["--help" | "-h", *_]:
            print(usage())
        case ["--version", *_]:
            print(f"rlhf {__version__}")
        case [name, *rest] if name in COMMANDS:
            become(COMMANDS[name][0], rest)
        case [name, *_]:
            print(f"rlhf: there is no command {name!r}: choose from {', '.join(COMMANDS)}", file=sys.stderr)
            sys.exit(UNKNOWN)


def usage() -> str:
    """The commands, a line each."""
    lines = [f"  rlhf {name:<9} {about}" for name, (_, about) in COMMANDS.items()]
    title = f"rlhf {__version__}: sample, score, learn, hand the new weights over; repeat."
    more = "Each has a --help of its own. A module is a command, too: rlhf train is python -m rlhf.train."
    return "\n".join([title, "", *lines, "", more])


def become(module: str, arguments: Sequence[str]) -> None:
    """Go on as `python -m MODULE` with these arguments and this interpreter's options; does not return."""
    options = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing does
    os.execv(sys.executable, [sys.executable, *options, "-m", module, *arguments])


if __name__ == "__main__":
    main()
