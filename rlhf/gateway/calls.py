"""What a session's calls do: prompts are made, asked, and what was sampled is recorded and told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rlhf.gateway.answers import Choice, said_by
from rlhf.gateway.forms import Request
from rlhf.gateway.messages import key_of
from rlhf.gateway.prompts import Asked, Prompts
from rlhf.gateway.session import CALLS, MALFORMED, Session
from rlhf.gateway.turns import Turn
from rlhf.models.stop_tokens import stop_ids
from rlhf.models.tool_calls import Parsed, ToolFormat
from rlhf.types import FINISHED, Completion, Tokenizer
from transfer.agreement.shown import shown
from transfer.agreement.wire import Refused


@dataclass(frozen=True, slots=True)
class Wanted:
    """Answers that workers are asked for."""

    prompt: Sequence[int]
    seed: int
    first: int  # number of the first sample
    n: int
    temperature: float
    most: int  # tokens of each
    stop: tuple[str, ...]


Ask = Callable[[Wanted], "Future[list[Completion]]"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the run's workers."""

    answer: int  # tokens (rollout.max_new_tokens)
    context: int | None
    vocabulary: int | None


@dataclass(frozen=True, slots=True)
class Pending:
    """A call that workers have been asked for."""

    session: Session
    request: Request
    asked: Asked
    prompt: list[int]
    reserved: int
    answers: Future[list[Completion]]


@dataclass(slots=True)
class Calls:
    """All sessions' calls."""

    tokenizer: Tokenizer
    ask: Ask
    limits: Limits
    tool_format: str | None = None
    prompts: Prompts = field(init=False)

    def __post_init__(self) -> None:
        self.prompts = Prompts(self.tokenizer)

    def begin(self, session: Session, request: Request, nbytes: int) -> Pending:
        """Ask for the answers; Refused 400 where that cannot be."""
        if request.calls:
            self._format()
        call = session.admit(nbytes)
        with session.lock:
            asked = self.prompts.asked(request, session.turns)
        prompt = asked.prompt
        most = self._most(request, prompt)
        reserved = len(prompt) + request.n * most
        session.take(reserved)
        seed, first = session.seed(call, request.n, request.seed)
        wanted = Wanted(prompt, seed, first, request.n, session.terms.temperature, most, request.stop)
        return Pending(session, request, asked, prompt, reserved, self.ask(wanted))

    def _most(self, request: Request, prompt: list[int]) -> int:
        """How long answers may be."""
        limits = self.limits
        if not prompt:
            raise Refused(400, "the prompt has no tokens")
        if limits.vocabulary is not None and max(prompt) >= limits.vocabulary:
            raise Refused(400, f"the prompt has a token beyond the model's vocabulary of {limits.vocabulary}")
        room = limits.answer if limits.context is None else limits.context - len(prompt)
        if room < 1:
            raise Refused(400, f"the prompt has {len(prompt)} tokens, and the model's context {limits.context}")
        return min(request.most or limits.answer, limits.answer, room)

    def _format(self) -> ToolFormat:
        try:
            return ToolFormat.of(self.tokenizer, self.tool_format)
        except ValueError as error:
            raise Refused(400, str(error)) from None

    def finish(self, pending: Pending) -> list[Choice]:
        """Record the answers, which are there, and tell them."""
        session, completions = pending.session, pending.answers.result()
        choices = [self._choice(pending, completion) for completion in completions]
        session.take(len(pending.prompt) + sum(len(each.ids) for each in completions) - pending.reserved)
        with session.lock:
            if session.closed or session.rewarded:
                raise Refused(400, "the session has ended meanwhile")
            session.counts[CALLS] += 1
            for choice in choices:
                session.counts[MALFORMED] += len(choice.errors)
                self._record(pending, choice)
        return choices

    def _record(self, pending: Pending, choice: Choice) -> None:
        turns, request, asked = pending.session.turns, pending.request, pending.asked
        text, made = choice.text or choice.message.get("content") or "", choice.message.get("tool_calls")
        shown_as = text or (json.dumps(made) if made else "")
        turn = Turn(len(turns.all), asked.parent, asked.ids, choice.completion, asked.question, shown_as)
        if request.messages:
            turns.add(turn, key_of(request.given, [*request.messages, {**choice.message, "content": text}]))
        else:
            prompt = request.prompts[0]
            turn.whole = prompt + text if isinstance(prompt, str) else ""
            turns.add(turn, f"text {turn.number}")

    def _choice(self, pending: Pending, completion: Completion) -> Choice:
        ids, request = completion.ids.tolist(), pending.request
        tokens = self.tokenizer.batch_decode([[each] for each in ids]) if request.logprobs else []
        ended = completion.finish_reason == FINISHED and ids[-1] in stop_ids(self.tokenizer)
        spoken = ids[:-1] if ended else ids
        if not request.messages:
            (text,) = self.tokenizer.batch_decode([spoken], skip_special_tokens=True)
            return Choice(completion, tokens, text=_before(text, request.stop))
        (text,) = self.tokenizer.batch_decode([spoken], skip_special_tokens=False)
        parsed = self._parsed(_before(text, request.stop), pending)
        return Choice(completion, tokens, said_by(parsed.message), errors=parsed.errors)

    def _parsed(self, text: str, pending: Pending) -> Parsed:
        request = pending.request
        try:
            known = ToolFormat.of(self.tokenizer, self.tool_format)
        except ValueError:  # nobody knows how calls are written, nor are there any
            return Parsed({"role": "assistant", "content": text})
        (prefix,) = self.tokenizer.batch_decode([pending.prompt])
        return known.parse(text, request.given.get("tools", ()) if request.calls else (), prefix)


def _before(text: str, stop: Sequence[str]) -> str:
    """The text before the first of these."""
    return text[: min((at for each in stop if (at := text.find(each)) >= 0), default=len(text))]


def read_reward(body: Mapping[str, Any]) -> float | None:
    """The reward that ends a session; Refused 400 if it is none."""
    value = body.get("reward")
    if set(body) != {"reward"} or isinstance(value, bool) or not isinstance(value, int | float | None):
        raise Refused(400, f'the body must be like {{"reward": 1.0}}, or null to leave the row out (got {shown(body)})')
    if value is not None and not (math.isfinite(value) and abs(value) <= 1e30):
        raise Refused(400, f"reward must be a finite number (got {shown(value)})")
    return None if value is None else float(value)
