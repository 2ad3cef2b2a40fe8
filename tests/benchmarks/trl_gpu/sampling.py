"""The limit of sampling: vLLM alone on the rows of one step, without log-probs and seeds, then with log-probs.

python -m tests.benchmarks.trl_gpu.sampling FOLDER
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from tests.benchmarks.trl_gpu.common import LOGPROBS, PLAIN, GpuMemory, say, synchronise, work_of
from tests.benchmarks.trl_gpu.shapes import Site


def main(folder: str) -> None:
    """Measure both."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    site = Site.read(folder)
    shape = site.shape
    with GpuMemory() as memory:
        began = time.perf_counter()
        llm = LLM(
            model=str(site.model),
            load_format="dummy",
            dtype="bfloat16",
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            generation_config="vllm",
            gpu_memory_utilization=shape.share,
            max_model_len=shape.longest,
            max_num_seqs=shape.rows,
        )
        start = time.perf_counter() - began
        sampled(llm, site.first_step()[:: shape.group], 16, None, "warm-up")
        for row, logprobs in ((PLAIN, None), (LOGPROBS, 0)):
            seconds, tokens = sampled(llm, site.first_step(), shape.new, logprobs, row)
            work = work_of(site.first_step(), tokens)
            say(row, sample=seconds, work=[work], gpu_gib=memory.peak, start=start if logprobs is None else None)


def sampled(llm: Any, prompts_B: list[list[int]], new: int, logprobs: int | None, salt: str) -> tuple[float, int]:
    """The seconds that vLLM takes for these rows, and how many tokens it samples."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=new, ignore_eos=True, temperature=1.0, detokenize=False, logprobs=logprobs, seed=None
    )
    requests = [{"prompt_token_ids": prompt, "cache_salt": salt} for prompt in prompts_B]
    synchronise()
    began = time.perf_counter()
    answers = llm.generate(requests, params, use_tqdm=False)
    synchronise()
    return time.perf_counter() - began, sum(len(answer.outputs[0].token_ids) for answer in answers)


if __name__ == "__main__":
    main(sys.argv[1])
