"""The command line that evaluates a saved policy alone; imports nothing heavy before the configuration is checked.

What it does is in assembly/saved_policy.py, and what is measured, there and during a run, in held_out.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException

from rlhf.compose import CONF, checked_evaluation, register
from rlhf.preflight.before_torch import look
from rlhf.shell.ending import EXPLAINED, INTERRUPTED, terminate_as_interrupt
from rlhf.shell.screen import outlast
from rlhf.shell.search_path import started_in
from rlhf.train import answered, prepare_command
from transfer.agreement.shown import printable

register()

HELP = """\
A saved policy on a task's held-out prompts: greedy accuracy, sampled gold score, pass@k.

  python -m rlhf.evaluate model.path=FOLDER                     the policy/ of a run, or any transformers causal LM
  python -m rlhf.evaluate model.path=FOLDER task=arithmetic evaluate.k=[1,16] evaluate.samples=64
  python -m rlhf.evaluate -m model.path=FOLDER,ANOTHER          one after the other
  python -m rlhf.evaluate model.path=FOLDER --cfg job           print the composed evaluation and stop

With the run's own `seed` and task dials, the held-out prompts are those that it never trained on.

Choices (group=choice):
{choices}

The dials of the composed evaluation (key=value; what each means is in rlhf/config/ and transfer/config.py):

{dials}"""


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="evaluate")
def _job(config: Any) -> None:
    evaluation = checked_evaluation(config)
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        seen = look(evaluation)
        from rlhf.assembly.saved_policy import evaluate_policy

        evaluate_policy(evaluation, folder, seen)
    except EXPLAINED as error:
        raise CompactHydraException(printable(str(error))) from error


def runs_of(arguments: Sequence[str]) -> Iterator[Path]:
    """What Hydra has noted of the runs in whose folders the policies lie that a command line names."""
    for argument in arguments:
        key, _, given = argument.partition("=")
        for named in given.split(",") if key == "model.path" else ():
            policy = Path(named.strip(" '\"")).absolute()
            yield from [hydra for each in policy.parents if (hydra := each / ".hydra" / "hydra.yaml").is_file()][:1]


def main() -> None:
    """`python -m rlhf.evaluate`."""
    outlast()
    if answered(sys.argv[1:], "evaluate", HELP):
        return
    prepare_command(sys.argv[1:], [each for run in runs_of(sys.argv[1:]) for each in started_in(run)])
    terminate_as_interrupt()
    try:
        _job()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
