"""Conversations as a reward model reads them: by the chat template of its own tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rlhf.models.chat_template import RefusedError, rendered
from rlhf.tasks.chat import Chat, Message, Spelling, before_answer, dated, in_a_spelling
from rlhf.types import Prompt
from transfer.agreement.shown import shown


@dataclass(frozen=True, slots=True)
class OwnTemplate:
    """A reward model's tokenizer that has a chat template; a date in it is that of `moment` (None: today's)."""

    tokenizer: Any
    moment: datetime | None = None

    @classmethod
    def of(cls, tokenizer: Any, given: str | None, moment: datetime | None) -> OwnTemplate | None:
        """With `reward.chat_template`, Jinja or a file of it, in the place of the tokenizer's; None: there is none.

        ValueError where the file cannot be read.
        """
        if given is not None:
            tokenizer.chat_template = given if "{" in given else _read(given)
        return cls(tokenizer, moment) if tokenizer.chat_template else None

    def asked(self, prompt: Prompt, look: bool = False) -> str:
        """The messages of a prompt and what asks for the answer, as a policy of this template would be asked.

        With `look`, ValueError where the template leaves something out.
        """
        with dated(self.tokenizer, self.moment):
            try:
                return Chat(self.tokenizer).asked(prompt.messages, prompt.given, look)  # type: ignore[arg-type]
            except ValueError as error:
                raise ValueError(f"reward.path: of the reward model, {error}") from None

    def whole(self, prompt: Prompt, answer: str) -> str:
        """The conversation with its answer; a prompt of text is the user's message."""
        messages, begun = before_answer(prompt.messages or [{"role": "user", "content": prompt.text}])
        conversation = [*messages, {"role": "assistant", "content": begun + answer}]
        with dated(self.tokenizer, self.moment):
            return in_a_spelling(conversation, lambda spelling: self._rendered(conversation, spelling, prompt))

    def _rendered(self, messages: list[Message], spelling: Spelling, prompt: Prompt) -> str:
        spelt = list(map(spelling, messages))
        try:
            return rendered(self.tokenizer, spelt, prompt.given, ask=False)
        except RefusedError as error:
            said = shown(messages, 300)
            raise ValueError(
                f"reward.path: the reward model's chat template refuses a conversation ({error}): {said}"
            ) from None


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"reward.chat_template must be Jinja, or a file of it (got {path!r}: {error})") from None
