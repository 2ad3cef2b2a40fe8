"""The tokens that follow an answer: what an environment says, as the model's chat template renders it.

They are the difference of two renderings, of a conversation with the messages behind its answer and without. The second
must begin with the first: a template that writes what came before anew would show the policy another past than the one
that it is trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.models.chat_template import ANSWER, behind_an_answer, rendered
from rlhf.models.stop_tokens import stop_ids
from rlhf.types import Tokenizer

Message = dict[str, Any]
THOUGHT = "~thought~"
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}


@dataclass(slots=True)
class Dialogue:
    """A tokenizer's chat template with its other arguments; ValueError where it cannot go on behind an answer."""

    tokenizer: Tokenizer
    given: Mapping[str, Any] = field(default_factory=dict)
    _tail: str | None = None

    def after(self, said: Sequence[Message], called: bool = False, ended: bool = True) -> list[int]:
        """The ids that follow those of an answer, its end included, until the next is asked; `called`: it has calls.

        An answer that a stop text has ended, and no stop id, is not `ended`: its end is among the ids.
        """
        end = self._end() if ended else behind_an_answer(self.tokenizer)
        return self.tokenizer.encode(end + self._difference(said, called), add_special_tokens=False)

    def asked(self, messages: Sequence[Message]) -> str:
        """The text with which these messages are asked."""
        return self._rendered(messages, True)

    def check(self, said: Sequence[Message], called: bool = False) -> None:
        """ValueError if the template would leave out what the policy has thought, once it is spoken to like that."""
        self._difference(said, called)
        thought = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"
        answer: Message = {"role": "assistant", "content": thought, **({"tool_calls": [CALL]} if called else {})}
        asked = [{"role": "user", "content": "?"}, answer]
        if THOUGHT in self._rendered(asked, False) and THOUGHT not in self._rendered([*asked, *said], True):
            roles = ", ".join(sorted({message["role"] for message in said}))
            raise ValueError(
                f"the model's chat template leaves out what was thought before messages of the role {roles}: the "
                "policy would be trained on another past than it is served with; set task.keeps_thoughts=true to let "
                "it see its thoughts, or take a template that keeps them (model.path)"
            )

    def _difference(self, said: Sequence[Message], called: bool) -> str:
        answer: Message = {"role": "assistant", "content": "" if called else ANSWER}
        if called:
            answer["tool_calls"] = [CALL]
        asked = [{"role": "user", "content": "?"}, answer]
        without, whole = self._rendered(asked, False), self._rendered([*asked, *said], True)
        if not whole.startswith(without):
            raise ValueError(
                "the model's chat template renders an answer in another way once messages follow it: take a template "
                f"that keeps what came before (...{without[-60:]!r} is no beginning of ...{whole[-200:]!r})"
            )
        return whole.removeprefix(without)

    def _rendered(self, messages: Sequence[Message], ask: bool) -> str:
        return rendered(self.tokenizer, messages, self.given, ask)

    def _end(self) -> str:
        """What the template puts behind the token that ends an answer."""
        if self._tail is None:
            tail = behind_an_answer(self.tokenizer)
            ends = self.tokenizer.batch_decode([[end] for end in stop_ids(self.tokenizer)], skip_special_tokens=False)
            self._tail = next((tail.removeprefix(end) for end in ends if end and tail.startswith(end)), tail)
        return self._tail
