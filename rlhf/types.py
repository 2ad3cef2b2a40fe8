"""The nouns that flow around the loop. Shapes: P prompts per step, n samples per prompt, B = P*n sequences, T tokens.

Token rows are ragged columns (`array.array`: no Python object a token), never padded: whoever needs a tensor pads it,
so no mask is ever guessed from token values.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Semaphore
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
FINISHED = "stop"  # finish reasons, vLLM's words: the policy sampled an end-of-sequence token, or a stop text,
TRUNCATED = "length"  # or max_new_tokens cut the row, which then has no end-of-sequence token

TIMED_OUT, RAISED, DIED, GARBAGE = "timed_out", "raised", "died", "garbage"  # what may befall an environment

IDS, LOGPROBS, VERSIONS, SAMPLED = "i", "f", "Q", "b"  # type codes of columns: int32, float32, uint64, int8


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the policy is asked; `columns` are the data set's other fields (answer, ...), handed to rewards by name."""

    text: str
    ids: tuple[int, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    messages: Sequence[Mapping[str, Any]] = ()  # what `text` was rendered from; empty: the data have it as a text
    given: Mapping[str, Any] = field(default_factory=dict)  # what the chat template was given beside them: tools, ...
    where: str = field(default="", compare=False)  # file and line


@dataclass(frozen=True, slots=True)
class Pair:
    """One human (or gold) preference: to `prompt`, the answer `chosen` is better than `rejected`; texts without EOS."""

    prompt: Prompt
    chosen: str
    rejected: str


def column(code: str, values: Iterable[float]) -> array[Any]:
    """The values as a column of this type code; a column of it is taken as it is, not copied."""
    return values if isinstance(values, array) and values.typecode == code else array(code, values)


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer as a worker returns it, or a conversation: answers, and what an environment said in between.

    `ids` end with a stop id, or with the token that completes a stop text, if `finish_reason` is "stop"; `logprobs[t]`
    is the log-probability of `ids[t]` under the sampling distribution (temperature and cut applied), None where nobody
    asked for those of this row; `versions[t]` is the version of the weights that sampled it. Where `sampled[t]` is 0,
    the environment has said the token: its log-prob is 0 and its version the answer's before it. Other sequences of
    numbers become columns.
    """

    ids: array[int]
    logprobs: array[float] | None
    versions: array[int]
    finish_reason: str
    sampled: array[int] | None = None  # None: the policy has sampled all of them
    prompt: tuple[int, ...] | None = None  # the row's own, where that is not the one that its group shares
    earlier: tuple[Completion, ...] = ()  # of the same sample, with prompts of their own: the context was rewritten

    def __post_init__(self) -> None:
        for name, code in (("ids", IDS), ("logprobs", LOGPROBS), ("versions", VERSIONS), ("sampled", SAMPLED)):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, column(code, values))

    @property
    def mask(self) -> array[int]:
        """For each token, 1 if the policy has sampled it, else 0."""
        return array(SAMPLED, b"\x01") * len(self.ids) if self.sampled is None else self.sampled

    @property
    def tokens(self) -> int:
        """How many of them the policy has sampled, with those of `earlier`."""
        own = len(self.ids) if self.sampled is None else self.sampled.count(1)
        return own + sum(each.tokens for each in self.earlier)


@dataclass(frozen=True, slots=True)
class Told:
    """What a conversation was, beside its tokens, and what its environment has told of it."""

    said: list[str]  # answer, reply, answer, ...
    score: float | None = None  # the environment's reward
    failed: str = ""  # the class of failure that has ended it; then there is no reward
    counts: dict[str, float] = field(default_factory=dict)  # of calls of tools, ...
    why: str = ""  # it has failed
    messages: list[dict[str, Any]] = field(default_factory=list)  # all after the prompt; empty: as `said` has them


@dataclass(frozen=True, slots=True)
class Rollouts:
    """One step's samples: row b of the B = P*n rows answers `prompts[b // samples_per_prompt]`."""

    prompts: list[Prompt]  # P
    completions: list[Completion]  # B
    texts: list[str]  # B, decoded without special tokens; of a conversation, the last answer
    seeds: list[int]  # P; no two samples of a run have one seed, unless they are the same sample
    samples_per_prompt: int
    episodes: list[Told] = field(default_factory=list)  # B; empty: one answer each

    @property
    def prompts_B(self) -> list[Prompt]:
        """The prompt of each row."""
        return [prompt for prompt in self.prompts for _ in range(self.samples_per_prompt)]

    @property
    def conversations(self) -> list[list[str]]:
        """Of each row: answer, reply, answer, ...; nothing where each is one answer."""
        return [told.said for told in self.episodes]

    @property
    def version(self) -> int:
        """The oldest version that sampled any token; there is one."""
        rows = (row for completion in self.completions for row in (completion, *completion.earlier))
        return min(min(row.versions) for row in rows if row.sampled is None or 1 in row.sampled)

    def lags(self, version: int) -> npt.NDArray[np.int64]:
        """How many versions each sampled token is behind the trainer's `version`, [tokens]."""
        import numpy as np

        rows = (row for completion in self.completions for row in (completion, *completion.earlier))
        return version - np.concatenate([_of_policy(row) for row in rows])

    @property
    def tokens(self) -> int:
        """How many tokens were sampled."""
        return sum(completion.tokens for completion in self.completions)


def _of_policy(completion: Completion) -> npt.NDArray[np.int64]:
    """The versions of the tokens that the policy has sampled."""
    import numpy as np

    versions = np.asarray(completion.versions, np.int64)
    return versions if completion.sampled is None else versions[np.asarray(completion.sampled, np.bool_)]


@dataclass(frozen=True, slots=True)
class Said:
    """What came of an episode's beginning, or of an answer; `ids` None: it is over, or it has failed."""

    ids: Sequence[int] | None = None  # that follow the answer's own
    text: str = ""  # what was said, to be shown
    score: float | None = None  # of an episode that is over
    failed: str = ""  # the class of failure
    why: str = ""  # it was
    counts: Mapping[str, float] = field(default_factory=dict)  # of what is to be counted: calls of tools, ...
    prompt: tuple[int, ...] | None = None  # in place of the task's own, of an episode that has begun
    answer: Mapping[str, Any] | None = None  # what was heard, as a message with its calls of tools
    messages: Sequence[Mapping[str, Any]] = ()  # what is said to that


Then = Callable[[Said], None]  # told once, from any thread


class Episode(Protocol):
    """One row's environment. A call tells what came of it by `then`: at once, or later from another thread."""

    def begin(self, then: Then) -> None:
        """Before the first answer; the tokens that are said there follow the prompt's."""

    def hear(self, answer: Completion, text: str, then: Then) -> None:
        """An answer, and its text; not of one that the length limit has cut."""

    def end(self, then: Then) -> None:
        """No further answer comes, and the environment has not said that it is over: the score, if there is one."""

    def close(self) -> None:
        """Nothing more is asked of it; also in the middle of a call."""


class Environment(Protocol):
    """What makes episodes; to be used as a context."""

    def __enter__(self) -> Environment: ...
    def __exit__(self, *exception: object) -> None: ...

    @property
    def turns(self) -> int:
        """Answers of a row, at most."""

    @property
    def longest_reply(self) -> int:
        """Tokens that it says after an answer, at most."""

    @property
    def places(self) -> Semaphore | None:
        """One is taken by each episode that runs, whoever else samples at the time; None: there is room for all."""

    @property
    def budget(self) -> int | None:
        """Tokens of a row's answers and replies, after which there is no further answer; None: any number."""

    @property
    def timeout_s(self) -> float | None:
        """Deadline of each call; None: calls tell at once what came of them."""

    @property
    def scores(self) -> bool:
        """Whether episodes tell a score, which is then the task's own."""

    @property
    def opens(self) -> bool:
        """Whether it says something before the first answer."""

    def episode(self, prompt: Prompt) -> Episode:
        """One of its own for a row with this prompt; nothing is done before it begins."""


class Task(Protocol):
    """Prompts and how an answer is scored; what the files or the generator cannot give is an empty list."""

    train: Sequence[Prompt]
    held_out: Sequence[Prompt]
    demonstrations: Sequence[tuple[Prompt, str]]  # for SFT: a good answer, as text without EOS
    preferences: Sequence[Pair]  # human preferences shipped with the data
    environment: Environment | None  # None: one answer a prompt
    notes: Sequence[str]  # what a user should know of the data, a line each

    def score(self, prompt: Prompt, answer: str) -> float | None:
        """The task's own (gold) reward in [0, 1] of the (last) answer; None where the data holds no reference."""


def gold_scores(task: Task, rollouts: Rollouts) -> list[float | None]:
    """The task's own score of each sample [B], its environment's where that tells one; None where there is none."""
    if task.environment is not None and task.environment.scores:
        return [told.score for told in rollouts.episodes]
    return [task.score(prompt, text) for prompt, text in zip(rollouts.prompts_B, rollouts.texts, strict=True)]


class Amounts(Protocol):
    """What a task's texts tell already, before there is a tokenizer: how many rows of each kind, and whether scored."""

    @property
    def train(self) -> Sequence[Any]: ...
    @property
    def demonstrations(self) -> Sequence[Any]: ...
    @property
    def preferences(self) -> Sequence[Any]: ...

    def score(self, prompt: Any, answer: str, /) -> float | None:
        """The gold reward of an answer to one of `train`; None where the data holds no reference."""


class Tokenizer(Protocol):
    """What the harness needs of a transformers tokenizer."""

    @property
    def eos_token_id(self) -> Any: ...
    def __call__(self, text: Any, /, **kwargs: Any) -> Any: ...
    def encode(self, text: Any, /, add_special_tokens: bool = ...) -> list[int]: ...
    def batch_decode(self, sequences: Any, /, skip_special_tokens: bool = ...) -> list[str]: ...

    @property
    def apply_chat_template(self) -> Any: ...


@dataclass(slots=True)
class RewardReport:
    """What a reward noted in its last call, beside the rewards."""

    means: dict[str, float] = field(default_factory=dict)  # of its parts, by name
    errors: int | None = None  # samples without a reward because an exception was raised; None: it counts none
    error: str = ""  # what the last of them was
    counts: dict[str, int] = field(default_factory=dict)  # samples by what else befell their rewards


class Reward(Protocol):
    """(prompt, answer) -> number: the training signal, or None for a sample to leave out; may have a `report`."""

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float | None]: ...


class Sampler(Protocol):
    """What samples: rollout workers behind a sender."""

    def sample(self, prompts: Sequence[Prompt], *, n: int, temperature: float, seed: int) -> Rollouts:
        """Draw n answers a prompt; temperature 0 is greedy; the numbers depend on the seed, not on the workers."""
