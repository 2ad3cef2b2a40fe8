"""Before a checkpoint is trained: does it say the same by every way in which the run will compute it?

The measure is the model's own plain forward: one row at a time, whole, without cache and padding. Held against it are
the learner's rows with their gradients (checkpointed, and with an adapter, where the run has these), and the engine's
steps, in which rows end at different times; on a few short random rows, of prompts of different lengths and of one
alone. How far two ways may differ is told by how far the plain forward differs from itself when a row is computed twice
side by side, so that rounding in bfloat16, or a router that wavers, refuses no model.

Shapes: B rows, T response tokens, R rows that the engine still samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from rlhf.config.model import LoraConfig
from rlhf.learning.forward import Batch
from rlhf.learning.pass_choice import context_of, random_batch
from rlhf.learning.passes import PADDED, WHOLE, Padded
from rlhf.models.adapter import add_adapter, base_weights, remove_adapter
from rlhf.models.merging import check_merge
from rlhf.models.model_cache import parameters_of, recurrent
from rlhf.rollout.decoder import make_decoder
from rlhf.rollout.hf import evaluating
from rlhf.rollout.sampling import Sampling
from transfer.agreement.shown import one_line

PROMPTS, RESPONSES = (9, 3), (6, 2, 4, 5)  # tokens; two rows a prompt
BATCHES = ([0, 1, 2, 3], [2, 3])  # rows: padded, and with nothing to pad
# The most that two ways may differ, in log-probs as a share of their spread, in gradients as one of their norm: in
# fp32, and in 16 bits, where right ones differed by 0.03 at most; and so many times the forward's own noise.
EXACT, HALF = 1e-3, 0.1
NOISE = 4.0
SPREAD = 0.01  # nats, at least
SOME, MANY = 24, 2**26  # gradients that are compared: of so many parameters, each of so many numbers at most


@dataclass(frozen=True, slots=True)
class Said:
    """Log-probs [B, T], and the gradients of their sum."""

    logprobs_BT: Tensor
    gradients: Sequence[Tensor] = ()


def agreeing_passes(
    policy: PreTrainedModel, lora: LoraConfig, engine: bool, say: Callable[[str], None] = lambda line: None
) -> Padded:
    """The way to compute padded rows that agrees with the policy's plain forward; `engine`: whether engine hf samples.

    ValueError, in one line, where none does, or the engine does not, or the policy takes no adapter.
    """
    try:
        trial = Trial(policy)
        passes = _first(trial, [WHOLE] if recurrent(policy) else [PADDED, WHOLE], say)
        if engine:
            _check_worker(policy)
            trial.check("the engine", lambda batch: Said(engine_logprobs(policy, batch)))
        if lora.rank:
            _check_adapter(policy, lora, passes)
    except ValueError as error:
        raise ValueError(f"model.path: {type(policy).__name__} cannot be trained here: {error}") from error
    return passes


def check_engine(policy: PreTrainedModel) -> None:
    """ValueError, in one line, where engine hf does not agree with the policy's plain forward."""
    try:
        _check_worker(policy)
        Trial(policy).check("the engine", lambda batch: Said(engine_logprobs(policy, batch)))
    except ValueError as error:
        raise ValueError(f"model.path: {type(policy).__name__} cannot be sampled from: {error}") from error


def _first(trial: Trial, ways: Sequence[Padded], say: Callable[[str], None]) -> Padded:
    """The first way that agrees; ValueError of the last if none does."""
    for way in ways:
        try:
            trial.check("the learner", lambda batch, way=way: trial.learned(way, batch))  # type: ignore[misc]
            break
        except ValueError as error:
            if way is ways[-1]:
                raise
            say(f"learner: prompts are computed once a row, not once for all of their rows: {error}")
    return way


def _check_worker(policy: PreTrainedModel) -> None:
    """A worker makes its model from the policy's configuration: where transformers has it, it must be the same kind."""
    name, shape = policy.config.model_type, type(policy.config)
    if name in CONFIG_MAPPING and CONFIG_MAPPING[name] is shape and shape not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"transformers makes no causal LM from {shape.__name__}, which is what a worker gets")


def _check_adapter(policy: PreTrainedModel, lora: LoraConfig, passes: Padded) -> None:
    """Attach an adapter, let it learn, merge it, and take it off."""
    before = {name: weight.shape for name, weight in base_weights(policy).items()}
    add_adapter(policy, lora.rank, lora.alpha, lora.target)
    try:
        check_merge(policy, before)
        trial = Trial(policy)
        trial.check("the learner with an adapter", lambda batch: trial.learned(passes, batch))
    finally:
        remove_adapter(policy)


class Trial:
    """A few rows, and what the model's plain forward says of them."""

    def __init__(self, policy: PreTrainedModel) -> None:
        self._policy = policy
        half = max(1, context_of(policy) // 2)
        prompts, responses = ([min(length, half) for length in each] for each in (PROMPTS, RESPONSES))
        self._batch = random_batch(policy, prompts, [0, 0, 1, 1], responses)
        learning = [p for p in policy.parameters() if p.requires_grad and p.numel() <= MANY]
        self._learning = learning[:: max(1, len(learning) // SOME)]
        rows = [_tried("the plain forward", self._plain, row) for row in range(len(responses))]
        self._rows = [Said(said.logprobs_BT[0], said.gradients) for said in rows]
        self._tolerance = EXACT if policy.dtype == torch.float32 else HALF
        self._noise = self._apart(self._plain(0, copies=2), rows[0], [responses[0]])

    def check(self, who: str, way: Callable[[Batch], Said]) -> None:
        """ValueError unless this way says of the rows what the plain forward does."""
        for rows in BATCHES:
            batch = self._batch.rows(rows)
            theirs = Said(
                torch.stack([self._rows[row].logprobs_BT[: batch.ids_BT.shape[1]] for row in rows]),
                [sum(each) for each in zip(*(self._rows[row].gradients for row in rows), strict=True)],  # type: ignore[misc]
            )
            gaps = self._apart(_tried(who, way, batch), theirs, batch.lengths())
            what = ("log-probs", "of their spread"), ("gradients", "of their norm")
            for (name, unit), gap, noise in zip(what, gaps, self._noise, strict=True):
                if not gap <= self._tolerance + NOISE * noise:  # nan, too
                    raise ValueError(f"{who} and its plain forward differ in {name} (by {gap:.2g} {unit})")

    def learned(self, passes: Padded, batch: Batch) -> Said:
        """What the learner computes of rows."""
        with torch.enable_grad():
            logprobs_BT = passes.logprobs(self._policy, batch, 1.0) * batch.mask_BT
            return Said(logprobs_BT.detach(), self._gradients(logprobs_BT.sum()))

    def _plain(self, row: int, copies: int = 1) -> Said:
        """Of one row, or the mean of as many copies of it, computed side by side: [1, T]."""
        batch, length = self._batch, self._batch.lengths()[row]
        device, prompt = batch.ids_BT.device, batch.prompts[batch.prompt_of_B[row]]
        ids_bL = torch.cat([torch.tensor(prompt, device=device), batch.ids_BT[row, :length]]).expand(copies, -1)
        options = {"use_cache": False} if "use_cache" in parameters_of(self._policy) else {}
        with torch.enable_grad():
            logits_btV = self._policy(input_ids=ids_bL, **options).logits[:, len(prompt) - 1 : -1]
            logprobs_btV = logits_btV.float().log_softmax(dim=-1)
            logprobs_1t = logprobs_btV.gather(-1, ids_bL[:, len(prompt) :, None])[..., 0].mean(dim=0, keepdim=True)
            padded = torch.nn.functional.pad(logprobs_1t.detach(), (0, batch.ids_BT.shape[1] - length))
            return Said(padded, self._gradients(logprobs_1t.sum()))

    def _gradients(self, total: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(total, self._learning, allow_unused=True)
        pairs = zip(self._learning, found, strict=True)
        return [torch.zeros_like(p) if gradient is None else gradient for p, gradient in pairs]

    def _apart(self, ours: Said, theirs: Said, lengths: Sequence[int]) -> tuple[float, float]:
        """How far two ways are apart in log-probs and in gradients.

        In log-probs it is the row that is the farthest: in fp32 by its worst token, else by its median, since a single
        token may have another expert by rounding.
        """
        spread = torch.cat(
            [row.logprobs_BT[:n] for row, n in zip(self._rows, self._batch.lengths(), strict=True)]
        ).std()
        gap_BT = (ours.logprobs_BT - theirs.logprobs_BT).abs()
        most = 1.0 if self._tolerance == EXACT else 0.5
        worst = max(float(gap_BT[row, :length].quantile(most)) for row, length in enumerate(lengths))
        worst = worst if bool(gap_BT.isfinite().all()) else float("nan")
        if not ours.gradients:
            return worst / max(SPREAD, float(spread)), 0.0
        pairs = list(zip(ours.gradients, theirs.gradients, strict=True))
        norms = torch.stack([torch.stack([(a - b).float().norm(), b.float().norm()]) for a, b in pairs]).norm(dim=0)
        return worst / max(SPREAD, float(spread)), float(norms[0] / norms[1].clamp(min=1e-12))


def _tried(who: str, way: Callable[[Any], Said], rows: Any) -> Said:
    try:
        return way(rows)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's own code may raise anything
        said = one_line(str(error), 200)
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{who} fails: {kind}{said}") from error


@torch.inference_mode()
def engine_logprobs(policy: PreTrainedModel, batch: Batch) -> Tensor:
    """Log-probs [B, T] of the batch's tokens as engine hf says them, where it samples these; as many rows a prompt.

    A row leaves the engine's batch as soon as it has ended.
    """
    lengths, out_BT = np.array(batch.lengths()), torch.zeros_like(batch.mask_BT)
    n, longest = len(lengths) // len(batch.prompts), int(lengths.max())
    live = np.arange(len(lengths))
    with evaluating(policy):
        decoder = make_decoder(policy, batch.prompts, Sampling(n, longest, temperature=1.0, stop_ids=()))
        for position in range(longest):
            ids_R1 = batch.ids_BT[live, position, None]
            out_BT[live, position] = decoder.logits.float().log_softmax(dim=-1).gather(1, ids_R1)[:, 0]
            kept = np.flatnonzero(lengths[live] > position + 1)
            if 0 < len(kept) < len(live):
                decoder.select(kept)
            live = live[kept]
            if len(live):
                decoder.step(batch.ids_BT[live, position])
    return out_BT
