"""What a session has sampled: a tree of turns, whose branches are the rows that are learned from.

    asked | answer | asked | answer            a conversation that went on: one row, mask 0 on what was asked later
                   \\ asked | answer            its context was rewritten there: another row, all before it its prompt

Each answer is in one row's learned part, that of the longest branch through it; other branches have it in their
prompts, so that nothing is learned from twice.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from rlhf.types import IDS, LOGPROBS, SAMPLED, VERSIONS, Completion


@dataclass(eq=False, slots=True)
class Turn:
    """An answer, and what was asked: the whole prompt, or what follows the answer of `parent`."""

    number: int
    parent: Turn | None
    asked: tuple[int, ...]
    answer: Completion
    question: str  # what was said to the policy, to be shown
    text: str  # the answer, as its program has got it
    whole: str = ""  # of a text that is gone on with: all of it, with the answer
    continued: bool = False

    @property
    def path(self) -> list[Turn]:
        """The turns of its conversation, with this as the last."""
        turns: list[Turn] = []
        turn: Turn | None = self
        while turn is not None:
            turns.append(turn)
            turn = turn.parent
        return turns[::-1]

    @property
    def ids(self) -> list[int]:
        """All tokens until the end of its answer."""
        return [token for turn in self.path for token in (*turn.asked, *turn.answer.ids)]


@dataclass(frozen=True, slots=True)
class Sequence:
    """A branch as it is learned from, and what was said in it: answer, question, answer, ..."""

    completion: Completion  # with its own prompt
    said: list[str]
    turns: int


@dataclass(slots=True)
class Turns:
    """Those of a session, found by the conversation that they end."""

    all: list[Turn] = field(default_factory=list)
    _by_key: dict[str, Turn] = field(default_factory=dict)

    def find(self, key: str) -> Turn | None:
        """The newest turn that ends this conversation."""
        return self._by_key.get(key)

    def find_text(self, text: str) -> Turn | None:
        """The turn with most of this text's beginning."""
        begins = [turn for turn in self.all if turn.whole and text.startswith(turn.whole)]
        return max(begins, key=lambda turn: len(turn.whole), default=None)

    def find_ids(self, ids: list[int]) -> Turn | None:
        """The turn with most of these tokens' beginning."""
        begins = [(len(own), turn) for turn in self.all if (own := turn.ids) == ids[: len(own)]]
        return max(begins, key=lambda each: each[0], default=(0, None))[1]

    def add(self, turn: Turn, key: str) -> None:
        """Another turn."""
        if turn.parent is not None:
            turn.parent.continued = True
        self.all.append(turn)
        self._by_key[key] = turn

    def sequences(self) -> list[Sequence]:
        """The branches, that of most turns first."""
        paths = [turn.path for turn in self.all if not turn.continued]
        learned: set[int] = set()
        return [_sequence(path, learned) for path in sorted(paths, key=lambda path: (-len(path), path[-1].number))]


def _sequence(path: list[Turn], learned: set[int]) -> Sequence:
    """The branch, whose turns that are `learned` already are its prompt."""
    begun = next(place for place, turn in enumerate(path) if turn.number not in learned)
    own = path[begun:]
    learned.update(turn.number for turn in own)
    prompt = (*(own[0].parent.ids if own[0].parent else ()), *own[0].asked)
    ids, versions, sampled = array(IDS), array(VERSIONS), array(SAMPLED)
    logprobs: array[float] = array(LOGPROBS)
    for turn in own:
        if turn is not own[0]:
            between = len(turn.asked)
            ids.extend(turn.asked)
            logprobs.extend([0.0] * between)
            versions.extend(versions[-1:] * between)
            sampled.extend([0] * between)
        ids.extend(turn.answer.ids)
        logprobs.extend(turn.answer.logprobs or ())
        versions.extend(turn.answer.versions)
        sampled.extend([1] * len(turn.answer.ids))
    said = [text for turn in path for text in (turn.question, turn.text)][1:]
    reason = own[-1].answer.finish_reason
    return Sequence(Completion(ids, logprobs, versions, reason, sampled, prompt), said, len(path))
