"""The limit of learning: a plain loop over packed rows, decoder layers compiled, log-probs in one compiled kernel.

python -m tests.benchmarks.trl_gpu.learning FOLDER

Rows of prompt and answer are packed behind each other, each prompt once for each of its answers. Attention is torch's
own FlashAttention 2 for rows of different lengths; only the answers' tokens have logits; fused AdamW on bfloat16.
Without a GPU, attention is sdpa, a row at a time, and nothing is compiled.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from tests.benchmarks.trl_gpu.common import (
    LEARNING,
    GpuMemory,
    device,
    median,
    most_allocated,
    say,
    synchronise,
    work_of,
)
from tests.benchmarks.trl_gpu.shapes import SPECIAL, Site

REPEAT = 2  # measured passes over all rows
WARM_PACKS = 2  # packs before them, in which everything is compiled
CUDA = torch.cuda.is_available()
NOW: dict[str, Any] = {}  # of the pack that is computed: where its rows begin, and the longest row


@dataclass(slots=True)
class Pack:
    """Rows behind each other."""

    ids_1T: Tensor
    positions_1T: Tensor
    begins: Tensor  # int32, with the end
    predicts_N: Tensor  # positions whose next token was sampled
    targets_N: Tensor  # the sampled tokens
    advantages_N: Tensor


def main(folder: str) -> None:
    """Measure passes over the rows of one step."""
    site = Site.read(folder)
    shape = site.shape
    prompts_B = site.first_step()
    policy = _policy(site)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=CUDA)
    packs = [_pack(rows, shape.new, shape.vocabulary) for rows in split(prompts_B, shape.new, shape.pack)]
    NOW["longest"] = max(map(len, prompts_B)) + shape.new
    with GpuMemory() as memory:
        began = time.perf_counter()
        _step(policy, optimizer, packs[:WARM_PACKS])
        start = time.perf_counter() - began
        seconds = []
        for _ in range(REPEAT):
            began = time.perf_counter()
            _step(policy, optimizer, packs)
            seconds.append(time.perf_counter() - began)
    work = [work_of(prompts_B, shape.new * len(prompts_B))]
    gib = {"trainer_gib": most_allocated(), "gpu_gib": memory.peak}
    say(LEARNING, learn=median(seconds), steps=[round(each, 3) for each in seconds], work=work, start=start, **gib)


def split(prompts_B: Sequence[list[int]], new: int, budget: int) -> list[list[list[int]]]:
    """The rows in order, in packs of at most `budget` tokens."""
    packs: list[list[list[int]]] = [[]]
    used = 0
    for prompt in prompts_B:
        size = len(prompt) + new
        if packs[-1] and used + size > budget:
            packs.append([])
            used = 0
        packs[-1].append(prompt)
        used += size
    return packs


def _policy(site: Site) -> Any:
    AttentionInterface.register("packed", _attend)
    AttentionMaskInterface.register("packed", lambda *_, **__: None)
    policy = AutoModelForCausalLM.from_pretrained(site.model, dtype=torch.bfloat16, attn_implementation="packed")
    policy = policy.to(device())
    if CUDA:
        torch._dynamo.config.cache_size_limit = 128
        for layer in policy.model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)
    return policy


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **other: Any) -> Any:
    """Attention of rows behind each other, [1, H, T, D] -> [1, T, H, D]."""
    scaling, begins, longest = other.get("scaling"), NOW["begins"], NOW["longest"]
    if CUDA:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        flash = torch.ops.aten._flash_attention_forward
        out = flash(q, k, v, begins, begins, longest, longest, 0.0, True, False, scale=scaling)[0]
        return out[None], None
    ends = begins.tolist()
    rows = [slice(first, last) for first, last in pairwise(ends)]
    attend = torch.nn.functional.scaled_dot_product_attention
    parts = [
        attend(query[:, :, r], key[:, :, r], value[:, :, r], is_causal=True, scale=scaling, enable_gqa=True)
        for r in rows
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _pack(prompts: list[list[int]], new: int, vocabulary: int) -> Pack:
    """These prompts with random answers."""
    generator = torch.Generator().manual_seed(0)
    ids: list[Tensor] = []
    positions, predicts, begins = [], [], [0]
    for prompt in prompts:
        answer = torch.randint(0, vocabulary - SPECIAL, (new,), generator=generator)
        ids += [torch.tensor(prompt), answer]
        first = begins[-1] + len(prompt)
        positions.append(torch.arange(len(prompt) + new))
        predicts.append(torch.arange(first - 1, first + new - 1))
        begins.append(first + new)
    all_ids, predicts_N = torch.cat(ids), torch.cat(predicts)
    where = device()
    return Pack(
        ids_1T=all_ids[None].to(where),
        positions_1T=torch.cat(positions)[None].to(where),
        begins=torch.tensor(begins, dtype=torch.int32, device=where),
        predicts_N=predicts_N.to(where),
        targets_N=all_ids[predicts_N + 1].to(where),
        advantages_N=torch.randn(len(predicts_N), generator=generator).to(where),
    )


def _step(policy: Any, optimizer: torch.optim.Optimizer, packs: list[Pack]) -> None:
    """Gradients of all packs, and one step of the optimiser."""
    head = policy.get_output_embeddings().weight
    for pack in packs:
        NOW["begins"] = pack.begins
        out = policy.model(input_ids=pack.ids_1T, position_ids=pack.positions_1T, attention_mask=None, use_cache=False)
        logits_NV = out.last_hidden_state[0].index_select(0, pack.predicts_N) @ head.T
        logprobs_N, _ = _Logprobs.apply(logits_NV, pack.targets_N)
        (logprobs_N * pack.advantages_N).sum().backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    synchronise()


def _forward(logits_NV: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, log-sum-exp and entropy [N]."""
    z = logits_NV.float()
    top_N1 = z.amax(dim=1, keepdim=True)
    e = (z - top_N1).exp()
    total_N = e.sum(dim=1)
    lse_N = top_N1[:, 0] + total_N.log()
    entropy_N = lse_N - (e * z).sum(dim=1) / total_N
    return logits_NV.gather(1, ids_N[:, None])[:, 0].float() - lse_N, lse_N, entropy_N


def _backward(logits_NV: Tensor, ids_N: Tensor, lse_N: Tensor, gradient_N: Tensor) -> Tensor:
    """The gradient of the logits, in their dtype."""
    p = (logits_NV.float() - lse_N[:, None]).exp()
    hit = torch.arange(logits_NV.shape[1], device=logits_NV.device)[None] == ids_N[:, None]
    scale = gradient_N[:, None]
    return torch.where(hit, scale - p * scale, -p * scale).to(logits_NV.dtype)


if CUDA:
    _forward, _backward = (torch.compile(function, dynamic=True) for function in (_forward, _backward))


class _Logprobs(torch.autograd.Function):
    """Log-probs and entropies of the sampled tokens; only the first have a gradient."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
        """Both, [N]."""
        logprobs_N, lse_N, entropy_N = _forward(logits_NV, ids_N)
        ctx.save_for_backward(logits_NV, ids_N, lse_N)
        ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Of the log-probs."""
        return _backward(*ctx.saved_tensors, gradients[0].contiguous()), None


if __name__ == "__main__":
    main(sys.argv[1])
