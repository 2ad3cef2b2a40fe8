"""`python commands.py`: command lines in forked processes that need not import torch again; one after the other.

Each line of JSON on stdin, {"module", "arguments", "folder", "output"}, starts one; its process id is answered, and its
exit code once it has ended.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path


def become(told: dict) -> None:
    """This process is now that of the command."""
    os.setsid()
    os.chdir(told["folder"])
    output = os.open(Path(told["output"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(source, descriptor)
    sys.argv = [told["module"], *told["arguments"]]
    importlib.import_module(told["module"]).main()


if __name__ == "__main__":
    # So that the forked processes have it.
    import matplotlib.pyplot  # noqa: F401
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import rlhf.resume
    import rlhf.run
    import rlhf.train  # noqa: F401

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            become(json.loads(line))
            sys.exit(0)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
