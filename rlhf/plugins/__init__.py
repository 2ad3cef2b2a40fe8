"""What a run can be made of, in one table: the parts of this package, of installed packages, and of a user's modules.

Registering, finding and naming parts is here; no part itself, and nothing that imports torch.
"""

from rlhf.plugins.decorators import advantage, environment, logger, loss, optimizer, reward, task
from rlhf.plugins.part import PartError

__all__ = ["PartError", "advantage", "environment", "logger", "loss", "optimizer", "reward", "task"]
