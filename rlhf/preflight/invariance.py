"""Before a policy is trained with `rollout.batch_invariant`: does engine hf keep that promise for it on this machine?

A model may multiply in a way that rlhf/rollout/invariant.py does not know, and a processor may have kernels in which
the place of a row counts. A few short rows are sampled together, and some of them alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from rlhf.learning.pass_choice import context_of
from rlhf.rollout.hf import HfEngine
from rlhf.rollout.invariant import released
from rlhf.rollout.sampling import Sampling

LENGTHS, TOKENS = (5, 2, 11, *[2, 5] * 4), 4  # some of one length, which share a batch also where nothing is padded
ALONE = 3  # of them are sampled once more, each alone
SAMPLING = Sampling(n=4, max_tokens=TOKENS, temperature=1.0, stop_ids=())


def check_invariance(policy: PreTrainedModel, threads: int = 1) -> None:
    """ValueError, in one line, where the bits of a row depend on the rows beside it; `threads` of each worker."""
    if policy.device.type == "cpu" and threads > 1:
        raise ValueError(
            "on a CPU rollout.batch_invariant=true needs one thread a process, as several cut tensors anywhere: set "
            f"threads=1 (got {threads})"
        )
    longest = max(1, context_of(policy) - TOKENS)
    chosen = torch.Generator().manual_seed(0)
    below = policy.config.get_text_config().vocab_size
    prompts = [torch.randint(below, (min(each, longest),), generator=chosen).tolist() for each in LENGTHS]
    engine = HfEngine(policy, invariant=True)
    try:
        together = _bits(engine, prompts, range(len(prompts)))
        alone = [row for seed, prompt in enumerate(prompts[:ALONE]) for row in _bits(engine, [prompt], [seed])]
    finally:
        released(policy)
    if together[: len(alone)] != alone:
        raise ValueError(
            f"with {type(policy).__name__} on this machine a row's last bits depend on the rows beside it, whatever is "
            "done about it: runs with other numbers of workers differ in them (rollout.batch_invariant=false)"
        )


def _bits(engine: HfEngine, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[tuple[bytes, bytes]]:
    samples = engine.generate(prompts, seeds, SAMPLING, lambda: 0)
    return [(each.ids.tobytes(), b"" if each.logprobs is None else each.logprobs.tobytes()) for each in samples]
