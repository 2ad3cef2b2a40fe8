"""Engine `hf`: samples from any transformers causal LM, with a decode loop of its own for speed.

Each prompt is prefilled once for its group of n samples, then the key/value cache is repeated; finished rows leave the
batch. Shapes: P prompts, R rows still in the batch (at first P*n), L prompt positions, V vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rlhf.config.cut import WHOLE, Cut
from rlhf.rollout.decoder import Apart, Decoder, make_decoder, make_invariant_decoder
from rlhf.rollout.invariant import BLOCK, blocked, filled, prepared
from rlhf.rollout.sampling import ABORTED, Sample, Sampling, streams, uniforms
from rlhf.types import FINISHED, IDS, LOGPROBS, TRUNCATED, VERSIONS

DROP_SHARE = 0.125  # finished rows leave once they are this share of the batch: leaving costs a copy of the cache
ROW_STEP = 32  # few shapes, as kernels are prepared for each (bfloat16 on CPU: milliseconds at every new one)
EXACT_VOCABULARY = 32768  # up to here the distribution is summed in float64; beyond, its memory counts more


class HfEngine:
    """Samples from `model`, which stays the caller's: its weights may change between two calls."""

    sleep_levels = (1,)  # between completions it holds nothing but the weights

    def __init__(self, model: Any, recomputes: bool = False, invariant: bool = False) -> None:
        """`recomputes`: the cache of rows that new weights find in the middle, with those.

        `invariant`: a row's tokens and log-probs are the same, to the bit, whatever rows are sampled beside it.
        """
        self.model = model
        self._recomputes = recomputes
        self._invariant = invariant
        if invariant:
            prepared(model)

    def sleep(self, level: int) -> None:
        """Give cached GPU memory back to the device."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def wake_up(self, tags: Sequence[str]) -> bool:
        """True: all is there at once."""
        return True

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        turn: Callable[[], int | None],
    ) -> list[Sample]:
        """Sample row j of prompt i at index i*n + j; `seeds` has one integer a prompt.

        Before each token `turn` tells the version of the weights, and may change them; on None unfinished rows end with
        reason "abort". FloatingPointError when the model's logits are not finite.
        """
        rows = Rows(len(prompts) * sampling.n, sampling)
        keys = streams(seeds, sampling.n, sampling.firsts)
        with evaluating(self.model), blocked() if self._invariant else nullcontext():
            if (version := turn()) is None:
                return rows.samples()
            decoder = self._decoder(prompts, sampling)
            for position in range(sampling.max_tokens):
                ids, logprobs = self._draw(decoder.logits, uniforms(keys[rows.live], position), sampling)
                rows.record(version, ids, logprobs)
                if rows.finished or position + 1 == sampling.max_tokens:
                    break
                before, version = version, turn()
                if version is None:
                    break
                if (kept := rows.drop()) is not None:
                    ids = ids[torch.from_numpy(kept).to(ids.device)]
                    decoder.select(kept)
                if self._recomputes and version != before:
                    rest = replace(sampling, n=1, max_tokens=sampling.max_tokens - position - 1)
                    decoder = self._decoder(rows.so_far(prompts), rest)
                else:
                    decoder.step(ids)
        return rows.samples()

    def _decoder(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Decoder | Apart:
        return (make_invariant_decoder if self._invariant else make_decoder)(self.model, prompts, sampling)

    def _draw(self, logits: torch.Tensor, uniform: np.ndarray, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
        temperature, cut = sampling.temperature, sampling.cut
        if not self._invariant:
            return draw(logits, uniform, temperature, cut)
        places = filled(np.arange(len(logits)), BLOCK)
        ids, logprobs = draw(logits[torch.from_numpy(places).to(logits.device)], uniform[places], temperature, cut)
        return ids[: len(logits)], logprobs[: len(logits)]


class Rows:
    """What was sampled so far; `live` are the rows [R] still in the decoder's batch, finished or not."""

    def __init__(self, count: int, sampling: Sampling) -> None:
        self.live = np.arange(count)
        self._n = sampling.n
        self._stop_ids = np.array(sampling.stop_ids, np.int64)
        self._ids = np.zeros((count, sampling.max_tokens), np.int64)
        self._logprobs = np.zeros((count, sampling.max_tokens), np.float32)
        self._versions: list[int] = []  # by position
        self._lengths = np.zeros(count, np.int64)
        self._stopped = np.zeros(count, bool)

    def record(self, version: int, ids: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Take the next token [R] of each live row; a row that has stopped keeps its length and its tokens."""
        position = len(self._versions)
        self._versions.append(version)
        going = self.live[~self._stopped[self.live]]
        self._ids[self.live, position] = ids.cpu().numpy()
        self._logprobs[self.live, position] = logprobs.cpu().numpy()
        if not np.isfinite(self._logprobs[going, position]).all():
            raise FloatingPointError("the model's logits are not finite")
        self._lengths[going] = position + 1
        self._stopped[going] = np.isin(self._ids[going, position], self._stop_ids)

    @property
    def finished(self) -> bool:
        """Whether every row has stopped."""
        return bool(self._stopped.all())

    def drop(self) -> np.ndarray | None:
        """Forget stopped rows once they are worth it: the batch indices that stay, or None for all.

        The batch stays a multiple of ROW_STEP, with stopped rows where need be.
        """
        stopped = self._stopped[self.live]
        size = -(-int((~stopped).sum()) // ROW_STEP) * ROW_STEP
        if len(self.live) - size < max(1, DROP_SHARE * len(self.live)):
            return None
        kept = np.sort(np.argsort(stopped, kind="stable")[:size])
        self.live = self.live[kept]
        return kept

    def so_far(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Prompt and tokens of each live row."""
        position = len(self._versions)
        return [[*prompts[row // self._n], *self._ids[row, :position].tolist()] for row in self.live.tolist()]

    def samples(self) -> list[Sample]:
        """The rows in order."""
        reasons = np.where(self._lengths == self._ids.shape[1], TRUNCATED, ABORTED)
        reasons[self._stopped] = FINISHED
        versions = array(VERSIONS, self._versions)
        return [
            Sample(
                array(IDS, ids[:length].astype(np.int32).tobytes()),
                array(LOGPROBS, logprobs[:length].tobytes()),
                versions[:length],
                str(reason),
            )
            for ids, logprobs, length, reason in zip(self._ids, self._logprobs, self._lengths, reasons, strict=True)
        ]


def draw(
    logits: torch.Tensor, uniform: np.ndarray, temperature: float, cut: Cut = WHOLE
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token [R] from softmax(logits / temperature), by inverting its distribution at `uniform` [R], and log-prob.

    Both are of what `cut` leaves of the distribution. Temperature 0 takes the most likely token and the log-prob of the
    plain softmax. A token of probability zero is never drawn: the sum does not rise there.
    """
    scaled = logits.float() / temperature if temperature else logits.float()
    if temperature and cut:
        scaled = left(scaled, cut)
    logprobs = scaled.log_softmax(-1)
    if temperature:
        dtype = torch.float64 if logits.shape[-1] <= EXACT_VOCABULARY else torch.float32
        cumulative = logprobs.exp().cumsum(-1, dtype=dtype)
        total = cumulative[:, -1:]
        below = torch.nextafter(total, torch.zeros_like(total))
        target = torch.minimum(torch.from_numpy(uniform).to(total)[:, None] * total, below)
        ids = torch.searchsorted(cumulative, target, right=True)[:, 0]
        ids = ids.clamp(max=logits.shape[-1] - 1)  # only where logits are NaN
    else:
        ids = logits.argmax(-1)
    return ids, logprobs.gather(-1, ids[:, None])[:, 0]


def left(scaled: torch.Tensor, cut: Cut) -> torch.Tensor:
    """The logits [R, V], those of tokens that are cut off at minus infinity.

    In vLLM's order, which is transformers' but where both min_p and top_p cut: there top_p is a share of what min_p has
    left. Of equal logits at the edge top_k keeps all.
    """
    if cut.min_p:
        probabilities = scaled.softmax(-1)
        least = cut.min_p * probabilities.amax(-1, keepdim=True)
        scaled = scaled.masked_fill(probabilities < least, -torch.inf)
    if cut.top_k:
        edge = scaled.topk(min(cut.top_k, scaled.shape[-1]), dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < edge, -torch.inf)
    if cut.top_p < 1:
        ordered, places = scaled.sort(dim=-1)
        without = ordered.softmax(-1).cumsum(-1) <= 1 - cut.top_p  # of the least likely, which may go
        without[:, -1] = False
        scaled = scaled.masked_fill(without.scatter(-1, places, without), -torch.inf)
    return scaled


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout or gradients; all is as it was afterwards, for a learner that goes on training.

    Without gradients means more than inference mode: torch chooses between two ways to multiply by whether the weights
    require gradients, so that a learner's model would differ from a worker's in the last bits.
    """
    training = [module for module in model.modules() if module.training]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in learning:
            parameter.requires_grad = False
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in learning:
            parameter.requires_grad = True
