"""Other people's reward models: what their own forward pass says of the text that their own chat template makes.

Nothing is assumed about the architecture: rows go through the model as `AutoModelForSequenceClassification` has it, in
batches where that is found to be the same as one by one. Shapes: U rows, L tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config.model import AUTO
from rlhf.rewards.model import ModelReward, position_table
from rlhf.rewards.rendering import OwnTemplate
from rlhf.types import Prompt
from transfer.agreement.shown import one_line

BATCH_TOKENS = 2**16  # of a pass, with padding
SAME = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # by how much a score may change in a batch, absolute and relative
AT_ONCE = 1024  # prompts that are tokenised together
NONE = -1  # a pad token that no row has

Row = dict[str, list[int]]  # the tokenizer's columns of one text: input_ids, ...


class PretrainedReward(ModelReward):
    """A sequence classifier's one number for the conversation of prompt and answer, within +-`clip` (auto: as it is).

    A prompt of text is the user's message, and without a chat template, text before the answer's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: OwnTemplate | None = None,
        clip: Any = AUTO,
        batch_size: int = 512,
    ) -> None:
        super().__init__(model, tokenizer, template, None if clip == AUTO else clip, batch_size)
        self.inputs = set(inspect.signature(model.forward).parameters)
        self.positions = _positions(model)
        config: Any = model.config.get_text_config()
        self.pads = config.pad_token_id is not None
        if not self.pads:
            config.pad_token_id = NONE  # without one, transformers takes no two rows, even if nothing is padded
        self.filler = config.pad_token_id

    def check(self, prompts: Sequence[Prompt]) -> None:
        """ValueError where a prompt cannot be rendered or is too long, or scores are not what the model says alone."""
        lengths = [length for part in _parts(prompts) for length in self._lengths(part)]
        order = sorted(range(len(lengths)), key=lambda index: lengths[index])
        longest = lengths[order[-1]]
        if self.positions is not None and longest > self.positions:
            raise ValueError(
                f"reward.path: the longest prompt has {longest} tokens as the reward model reads it, which takes "
                f"{self.positions}: leave long rows out of task.path, or choose another reward model"
            )
        some = [prompts[order[index * (len(order) - 1) // 2]] for index in range(3)]
        try:
            self._try([self._text(p, answer) for p in some for answer in ("", p.text)])
        except (IndexError, KeyError, NotImplementedError, RuntimeError, TypeError) as error:
            reason = one_line(str(error), 300)
            raise ValueError(
                f"reward.path: {type(self.model).__name__} fails on the first prompts ({type(error).__name__}: "
                f"{reason}): choose another reward model"
            ) from error

    def _lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens of each prompt as the model reads it, without an answer."""
        return [_length(row) for row in self._encoded([self._text(prompt, "") for prompt in prompts])]

    @torch.no_grad()
    def _try(self, texts: Sequence[str]) -> None:
        """Compare scores in a batch with those of the same rows alone; without padding, if it changes them."""
        rows = dict(zip(texts, self._encoded(texts), strict=True))
        fit = [text for text, row in rows.items() if self._short(row)]
        alone_U = torch.stack([self._plain(text) for text in fit]).cpu()
        if not bool(alone_U.isfinite().all()):
            raise ValueError(f"reward.path: {type(self.model).__name__} gives scores that are no numbers: {alone_U}")
        most = SAME[self.model.dtype]
        for pads in (True, False) if self.pads else (False,):
            self.pads = pads
            together_U = torch.tensor(self._scores([rows[text] for text in fit * 2]))
            if torch.allclose(together_U, alone_U.repeat(2), rtol=most, atol=most):
                return
        raise ValueError(
            f"reward.path: {type(self.model).__name__} gives other scores in a batch than alone "
            f"({together_U[: len(fit)].tolist()}, {alone_U.tolist()}): choose another reward model"
        )

    def _plain(self, text: str) -> Tensor:
        """The score of one text, as its model card would have it computed."""
        inputs = self.tokenizer(text, add_special_tokens=self._adds_special_tokens(text), return_tensors="pt")
        given = {name: value.to(self.model.device) for name, value in inputs.items() if name in self.inputs}
        return self.model(**given).logits.float().reshape(-1).squeeze(0)

    def _raw(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float | None]:
        texts = [self._text(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        unique = list(dict.fromkeys(texts))
        rows = dict(zip(unique, self._encoded(unique), strict=True))
        fit = [text for text in unique if self._short(rows[text])]
        scores = dict(zip(fit, self._scores([rows[text] for text in fit]), strict=True))
        self._count_long(sum(text not in scores for text in texts))
        return [scores.get(text) for text in texts]

    def _short(self, row: Row) -> bool:
        return self.positions is None or _length(row) <= self.positions

    # --- text ---------------------------------------------------------------------------------------------------------

    def _text(self, prompt: Prompt, answer: str) -> str:
        if self.template is None:
            if prompt.messages:
                raise ValueError(
                    "reward.path: the data are conversations, and the reward model's tokenizer has no chat template: "
                    "give reward.chat_template, or choose another reward model"
                )
            return prompt.text + answer
        return self.template.whole(prompt, answer)

    def _adds_special_tokens(self, text: str) -> bool:
        """Whether the tokenizer's own special tokens belong around the text: not where its template has written them.

        Of a template that has not, those of an encoder do: it says what it has to say at the first of them.
        """
        if self.template is None:
            return True
        tokenizer: Any = self.tokenizer
        first = tokenizer("")["input_ids"][:1]
        return bool(first) and first[0] == tokenizer.cls_token_id and not text.startswith(tokenizer.cls_token)

    def _encoded(self, texts: Sequence[str]) -> list[Row]:
        if not texts:
            return []
        special = self._adds_special_tokens(texts[0])
        columns = self.tokenizer(list(texts), add_special_tokens=special, return_attention_mask=True, verbose=False)
        names = [name for name in columns if name in self.inputs]
        return [{name: columns[name][index] for name in names} for index in range(len(texts))]

    # --- passes -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _scores(self, rows: Sequence[Row]) -> list[float]:
        scores = [0.0] * len(rows)
        for part in self._batches(rows):
            values_U = self.model(**self._together([rows[index] for index in part])).logits[:, 0].float().tolist()
            for index, value in zip(part, values_U, strict=True):
                scores[index] = value
        return scores

    def _batches(self, rows: Sequence[Row]) -> Iterator[list[int]]:
        """The rows by length, in parts of at most BATCH_TOKENS, or one; of one length, where nothing may be padded."""
        part: list[int] = []
        for index in sorted(range(len(rows)), key=lambda index: _length(rows[index])):
            length = _length(rows[index])
            full = len(part) == self.batch_size or length * (len(part) + 1) > BATCH_TOKENS
            if part and (full or (not self.pads and length != _length(rows[part[0]]))):
                yield part
                part = []
            part.append(index)
        if part:
            yield part

    def _together(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The rows [U, L], padded on the right."""
        width = max(map(_length, rows))
        fill = {"input_ids": self.filler}  # and 0 for the mask and for token types
        return {
            name: torch.tensor(
                [row[name] + [fill.get(name, 0)] * (width - len(row[name])) for row in rows], device=self.model.device
            )
            for name in rows[0]
        }


def _parts(prompts: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
    """Some at a time, as a tokenizer keeps much of each text."""
    for start in range(0, len(prompts), AT_ONCE):
        yield prompts[start : start + AT_ONCE]


def _length(row: Row) -> int:
    return len(row["input_ids"])


def _positions(model: PreTrainedModel) -> int | None:
    """Tokens of a row, at most; None: any number."""
    table, told = position_table(model), getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return table or (told if told and told > 0 else None)  # XLNet says -1
