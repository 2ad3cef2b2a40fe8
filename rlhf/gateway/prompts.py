"""What a call's policy is asked with: the recorded tokens and what follows them, or a conversation rendered anew.

Tokens that were sampled are never made of texts again. Where a request begins with a conversation that the session has
had, its tokens stay, and those of the new messages follow; where it does not (another system prompt, a history that was
rewritten or compacted, other tools), it is rendered as a whole.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.environments.dialogue import Dialogue
from rlhf.gateway.forms import Request
from rlhf.gateway.messages import key_of, since_answer
from rlhf.gateway.turns import Turn, Turns
from rlhf.models.chat_template import rendered
from rlhf.models.encoding import beginning, begun
from rlhf.models.stop_tokens import stop_ids, turn_end
from rlhf.tasks.chat import Message, in_a_spelling
from rlhf.types import FINISHED, Tokenizer
from transfer.agreement.shown import one_line
from transfer.agreement.wire import Refused


@dataclass(frozen=True, slots=True)
class Asked:
    """What follows the answer of `parent`, or all of it."""

    parent: Turn | None
    ids: tuple[int, ...]
    question: str

    @property
    def prompt(self) -> list[int]:
        """All tokens before the answer."""
        return [*(self.parent.ids if self.parent else ()), *self.ids]


@dataclass(slots=True)
class Prompts:
    """Makes them with a tokenizer, for several threads."""

    tokenizer: Tokenizer
    lock: threading.Lock = field(default_factory=threading.Lock)

    def asked(self, request: Request, turns: Turns) -> Asked:
        """What the request asks with; Refused 400 where the chat template refuses it."""
        with self.lock:
            try:
                return self._of_chat(request, turns) if request.messages else self._of_text(request, turns)
            except ValueError as error:
                raise Refused(400, one_line(str(error), 500)) from None

    def _of_chat(self, request: Request, turns: Turns) -> Asked:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("the model's tokenizer has no chat template: ask at /v1/completions")
        messages, at = request.messages, since_answer(request.messages)
        new = messages[at:]
        question = "\n".join(message["content"] for message in new)
        parent = turns.find(key_of(request.given, messages[:at])) if at else None
        if parent is not None:
            try:
                return Asked(parent, tuple(self._after(parent, messages[at - 1], new, request.given)), question)
            except ValueError:  # the template cannot go on there
                pass
        text = in_a_spelling(
            messages, lambda spelling: rendered(self.tokenizer, list(map(spelling, messages)), request.given, ask=True)
        )
        return Asked(None, tuple(self._encoded(text)), question)

    def _after(self, turn: Turn, answer: Message, new: Sequence[Message], given: Mapping[str, Any]) -> list[int]:
        """What follows an answer; the token that ends it, too, where the policy has not said it."""
        said = turn.answer
        whole = said.finish_reason == FINISHED and said.ids[-1] in stop_ids(self.tokenizer)
        behind = Dialogue(self.tokenizer, given).after(new, called=bool(answer.get("tool_calls")))
        return behind if whole else [*turn_end(self.tokenizer), *behind]

    def _of_text(self, request: Request, turns: Turns) -> Asked:
        (prompt,) = request.prompts
        if isinstance(prompt, str):
            parent = turns.find_text(prompt)
            more = prompt if parent is None else prompt[len(parent.whole) :]
            ids = self._encoded(more)
            if parent is None:
                return Asked(None, tuple(begun(ids, beginning(self.tokenizer), rendered=False)), more)
            return Asked(parent, tuple(ids), more)
        parent = turns.find_ids(prompt)
        more_ids = prompt if parent is None else prompt[len(parent.ids) :]
        return Asked(parent, tuple(more_ids), self.tokenizer.batch_decode([more_ids])[0] if more_ids else "")

    def _encoded(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []
