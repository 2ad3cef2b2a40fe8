"""Engine `hf`: samples from any transformers causal LM, with a decode loop of its own for speed.

Each prompt is prefilled once for its group of n samples, then the key/value cache is repeated; finished rows leave the
batch. Shapes: P prompts, R rows still in the batch (at first P*n), L prompt positions, V vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rlhf.models.model_cache import cache_name, cache_of, parameters_of, recurrent
from rlhf.rollout.sampling import ABORTED, Sample, Sampling, streams, uniforms
from rlhf.types import FINISHED, IDS, LOGPROBS, TRUNCATED, VERSIONS

DROP_SHARE = 0.125  # finished rows leave once they are this share of the batch: leaving costs a copy of the cache
ROW_STEP = 32  # few shapes, as kernels are prepared for each (bfloat16 on CPU: milliseconds at every new one)
EXACT_VOCABULARY = 32768  # up to here the distribution is summed in float64; beyond, its memory counts more


class HfEngine:
    """Samples from `model`, which stays the caller's: its weights may change between two calls."""

    sleep_levels = (1,)  # between completions it holds nothing but the weights

    def __init__(self, model: Any, recomputes: bool = False) -> None:
        """`recomputes`: the cache of rows that new weights find in the middle, with those."""
        self.model = model
        self._recomputes = recomputes

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
        keys = streams(seeds, sampling.n)
        with evaluating(self.model):
            if (version := turn()) is None:
                return rows.samples()
            decoder = make_decoder(self.model, prompts, sampling)
            for position in range(sampling.max_tokens):
                ids, logprobs = draw(decoder.logits, uniforms(keys[rows.live], position), sampling.temperature)
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
                    decoder = make_decoder(self.model, rows.so_far(prompts), rest)
                else:
                    decoder.step(ids)
        return rows.samples()


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


class Decoder:
    """The model with its cache: `logits` [R, V] of the next token of each row.

    Prompts of one length need neither padding nor mask nor position ids, which is what models are fastest at; others
    are padded on the left, so that all rows grow at the right end together.
    """

    logits: torch.Tensor

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._known = parameters_of(model)
        self._name = cache_name(model)
        self._counts = recurrent(model) and "position_ids" in self._known  # some forget what is in their cache
        self._cache: Any = None
        self._width = max(map(len, prompts))
        self._mask: torch.Tensor | None = None  # [R, L + max_tokens], 0 on padding
        ids = torch.tensor([[0] * (self._width - len(prompt)) + list(prompt) for prompt in prompts])
        if min(map(len, prompts)) < self._width:
            mask = torch.ones(len(prompts), self._width + sampling.max_tokens, dtype=torch.long)
            for row, prompt in enumerate(prompts):
                mask[row, : self._width - len(prompt)] = 0
            self._mask = mask.to(self._device)
        self._forward(ids.to(self._device))
        if sampling.n > 1:
            group = np.repeat(np.arange(len(prompts)), sampling.n)
            self.logits = self.logits[torch.from_numpy(group).to(self._device)]
            if sampling.max_tokens > 1:
                self.select(group)

    def select(self, rows: np.ndarray) -> None:
        """Make the batch consist of these of its rows, in this order, repeats allowed."""
        index = torch.from_numpy(rows).to(self._device)
        self._cache.reorder_cache(index)
        if self._mask is not None:
            self._mask = self._mask[index]

    def step(self, ids: torch.Tensor) -> None:
        """Append one token [R] to each row."""
        self._width += 1
        self._forward(ids[:, None])

    def _forward(self, ids: torch.Tensor) -> None:
        arguments: dict[str, Any] = {self._name: self._cache, "use_cache": True}
        if self._mask is not None:
            mask = arguments["attention_mask"] = self._mask[:, : self._width]
            if "position_ids" in self._known:
                arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        elif self._counts:
            first = self._width - ids.shape[1]
            arguments["position_ids"] = torch.arange(first, self._width, device=self._device).expand(len(ids), -1)
        if "logits_to_keep" in self._known:
            arguments["logits_to_keep"] = 1
        output = self._model(input_ids=ids, **arguments)
        self._cache = cache_of(output)
        self.logits = output.logits[:, -1]


class Apart:
    """As Decoder, with prompts of one length in a batch of their own each: nothing is padded."""

    logits: torch.Tensor

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        lengths = np.array([len(prompt) for prompt in prompts])
        self._parts: list[tuple[np.ndarray, Decoder]] = []  # with the places of its rows in the batch
        for length in np.unique(lengths):
            chosen = np.flatnonzero(lengths == length)
            places = (chosen[:, None] * sampling.n + np.arange(sampling.n)).ravel()
            self._parts.append((places, Decoder(model, [prompts[index] for index in chosen.tolist()], sampling)))
        self._join(len(prompts) * sampling.n)

    def select(self, rows: np.ndarray) -> None:
        """As Decoder has it."""
        parts = []
        for places, decoder in self._parts:
            there = np.flatnonzero(np.isin(rows, places))
            if len(there):
                decoder.select(np.searchsorted(places, rows[there]))
                parts.append((there, decoder))
        self._parts = parts

    def step(self, ids: torch.Tensor) -> None:
        """As Decoder has it."""
        for places, decoder in self._parts:
            decoder.step(ids[torch.from_numpy(places).to(ids.device)])
        self._join(len(ids))

    def _join(self, rows: int) -> None:
        first = self._parts[0][1].logits
        self.logits = first.new_empty(rows, first.shape[1])
        for places, decoder in self._parts:
            self.logits[torch.from_numpy(places).to(first.device)] = decoder.logits


def make_decoder(model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Decoder | Apart:
    """Prompts of different lengths are padded, but for a model that would see the padding.

    Recurrent layers do, and positions that nobody can tell.
    """
    mixed = len({len(prompt) for prompt in prompts}) > 1
    sees = mixed and (recurrent(model) or "position_ids" not in parameters_of(model))
    return Apart(model, prompts, sampling) if sees else Decoder(model, prompts, sampling)


def draw(logits: torch.Tensor, uniform: np.ndarray, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One token [R] from softmax(logits / temperature), by inverting its distribution at `uniform` [R], and log-prob.

    Temperature 0 takes the most likely token and the log-prob of the plain softmax. A token of probability zero is
    never drawn: the sum does not rise there.
    """
    scaled = logits.float() / temperature if temperature else logits.float()
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
