"""Workers that answer at once, or after a while, with what a function says; counted."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext

from rlhf.types import FINISHED, Completion

END = 1


class FakeClient:
    """A client of `workers`; `says(prompt)` gives the ids of an answer, whose end is put behind them."""

    all_logprobs, ends, longest_prompt = True, (END,), None

    def __init__(self, tokenizer, says, continuous=True, workers=1, seconds=0.0):
        self._tokenizer, self._says, self.continuous, self._seconds = tokenizer, says, continuous, seconds
        self.senders = tuple(f"worker {number}" for number in range(workers))
        self.asked, self._guard = [], threading.Lock()

    def of(self, sender):
        return self

    def ending(self, most, stop):
        return self

    def turn_at(self, sender):
        return nullcontext()

    def recover(self, sender):
        return False

    def recoveries(self, sender):
        return 0

    def texts(self, completions):
        return self._tokenizer.batch_decode([c.ids.tolist()[:-1] for c in completions], skip_special_tokens=True)

    def complete(self, prompts, seeds, n, temperature, measured=None, firsts=None):
        with self._guard:
            self.asked.append((len(prompts), n))
        time.sleep(self._seconds)
        rows = [[*self._says(prompt), END] for prompt in prompts for _ in range(n)]
        return [Completion(ids, [-0.5] * len(ids), [3] * len(ids), FINISHED) for ids in rows]
