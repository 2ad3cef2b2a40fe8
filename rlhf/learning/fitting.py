"""`tokens_per_microbatch=auto`: the largest micro-batch of packed rows that fits the GPU beside all that is there.

Two micro-batches of random rows go forward and backward; a line through their peaks tells what a token costs, and what
is there anyway. AdamW's moments, which the first step makes, are set aside. A run that goes on from a checkpoint keeps
what was measured first, so that its sums are added up in the same order.
"""

from __future__ import annotations

import torch

from rlhf.config.model import AUTO
from rlhf.learning.learner import Learner
from rlhf.learning.pass_choice import context_of, random_batch
from rlhf.learning.passes import Packed
from transfer.agreement.dtensor import local_part

LADDER = (1024, 2048, 4096, 6144, 8192, 12288, 16384, 24576, 32768)  # few sizes; larger ones are no faster
TRIALS = ((4096, 8192), (512, 1024))  # the second where the first does not fit
SPARE = 0.1  # of the free memory, for what a line does not see
MOST = 0.3  # of all memory: more tokens gain little, and workers may want the room


def fits(learner: Learner) -> bool:
    """Whether the number is to be measured: where the configuration names none, and rows are packed on a GPU."""
    packed = isinstance(learner.passes, Packed) and learner.device.type == "cuda"
    return packed and learner.config.tokens_per_microbatch == AUTO


def fitting_tokens(learner: Learner) -> int:
    """Tokens of a micro-batch; ranks may try another number of times, where no trial needs the others.

    Where it does, only the smallest are tried, and memory must suffice for them.
    """
    lockstep = learner.spread.lockstep
    with learner.spread.whole(learner.critic, learner.policy):
        for few, many in TRIALS[-1:] if lockstep else TRIALS:
            try:
                low, high = _peak(learner, few), _peak(learner, many)
            except torch.OutOfMemoryError:
                if lockstep:
                    raise
                torch.cuda.empty_cache()
                continue
            most = MOST * torch.cuda.get_device_properties(learner.device).total_memory
            room = _free(learner.device) * (1 - SPARE) - _to_come(learner)
            return fitting(min(room, most), (few, low), (many, high))
        return LADDER[0]


def fitting(room: float, small: tuple[int, int], large: tuple[int, int]) -> int:
    """The largest of LADDER whose peak is at most `room` bytes, by two (tokens, bytes); or the smallest."""
    slope = max(0.0, (large[1] - small[1]) / (large[0] - small[0]))
    return max((tokens for tokens in LADDER if large[1] + slope * (tokens - large[0]) <= room), default=LADDER[0])


def _peak(learner: Learner, tokens: int) -> int:
    """Bytes beyond what is there now, at most, while the gradients of so many tokens are computed; they are dropped."""
    row = min(512, max(1, context_of(learner.policy) - 16))
    rows = max(1, tokens // row)
    batch = random_batch(learner.policy, [16], [0] * rows, [row] * rows)
    learner.drop_gradients(batch)  # compiles, and makes what libraries keep
    torch.cuda.synchronize(learner.device)
    torch.cuda.reset_peak_memory_stats(learner.device)
    before = torch.cuda.memory_allocated(learner.device)
    learner.drop_gradients(batch)
    torch.cuda.synchronize(learner.device)
    return torch.cuda.max_memory_allocated(learner.device) - before


def _free(device: torch.device) -> int:
    """Bytes that this process can still have."""
    torch.cuda.empty_cache()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _to_come(learner: Learner) -> int:
    """Bytes of moments that optimisers have not made yet."""
    optimizers = [learner.optimizer, learner.critic_optimizer]
    parameters = [p for o in optimizers if o is not None for g in o.param_groups for p in g["params"] if not o.state]
    held = map(local_part, parameters)
    return sum(2 * p.numel() * p.element_size() for p in held if p.is_cuda)
