"""Answers that end with a text (`rollout.stop`), whichever engine has sampled them.

Workers know tokens alone: of a stop text they are told the tokens that have all of it in them, at which they stop;
other answers they sample until a stop id or the limit, and those are cut here. Either way an answer ends with the token
that completes the first stop text, which is kept with all of its characters, as vLLM keeps it, and no EOS follows. The
distribution is what it was, and so are the log-probs of the tokens that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rlhf.types import FINISHED, Completion, Tokenizer

MOST_TOKENS = 4096  # that a worker is told of


def completing_tokens(stop: Sequence[str], tokenizer: Tokenizer, vocabulary: int) -> list[int]:
    """The tokens that complete a stop text wherever they are; none where they are too many to tell."""
    known = getattr(tokenizer, "__len__", lambda: vocabulary)()
    ids = range(min(vocabulary, known))
    texts = tokenizer.batch_decode([[token] for token in ids], skip_special_tokens=False)
    found = [token for token, text in zip(ids, texts, strict=True) if _ends(stop, text)]
    return found if len(found) <= MOST_TOKENS else []


def cut_at(stop: Sequence[str], completions: list[Completion], tokenizer: Tokenizer) -> list[Completion]:
    """The completions, each up to the token with which one of these texts is there; special tokens count as texts."""
    if not stop or not completions:
        return completions
    whole = tokenizer.batch_decode([row.ids.tolist() for row in completions], skip_special_tokens=False)
    cut = list(completions)
    for place, text in enumerate(whole):
        if _ends(stop, text):
            row = completions[place]
            cut[place] = _first(row, _tokens(stop, row.ids.tolist(), tokenizer))
    return cut


def _tokens(stop: Sequence[str], ids: list[int], tokenizer: Tokenizer) -> int:
    """How many tokens have one of the texts, at least; all of them have."""
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        (text,) = tokenizer.batch_decode([ids[:middle]], skip_special_tokens=False)
        low, high = (low, middle) if _ends(stop, text) else (middle + 1, high)
    return high


def _ends(stop: Sequence[str], text: str) -> bool:
    return any(each in text for each in stop)


def _first(row: Completion, tokens: int) -> Completion:
    logprobs = None if row.logprobs is None else row.logprobs[:tokens]
    return replace(row, ids=row.ids[:tokens], logprobs=logprobs, versions=row.versions[:tokens], finish_reason=FINISHED)
