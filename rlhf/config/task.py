"""Tasks: prompts, and how an answer is scored."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rlhf.config.rules import at_least, in_range
from transfer.agreement.shown import shown
from transfer.config import positive


@dataclass(slots=True, kw_only=True)
class EnvironmentConfig:
    """What answers the policy, so that a row is a conversation."""

    turns: int = 3  # answers of the policy, at most

    def __post_init__(self) -> None:
        at_least("task.environment.turns", self.turns, 1)


@dataclass(slots=True, kw_only=True)
class TaskConfig:
    """Prompts and a gold score; procedural tasks draw their prompts from `seed`, files are read once."""

    held_out: int = 128  # prompts kept for evaluation, never trained on
    environment: EnvironmentConfig | None = None  # null: one answer a prompt, or the task's own conversation

    def __post_init__(self) -> None:
        at_least("task.held_out", self.held_out, 1)

    @property
    def turns_key(self) -> str:
        """By which `most_answers` is changed."""
        return "task.turns" if self.environment is None else "task.environment.turns"

    @property
    def most_answers(self) -> int:
        """Answers of one row, at most."""
        return 1 if self.environment is None else self.environment.turns

    @property
    def waits(self) -> bool:
        """Whether what answers the policy may take long."""
        return False

    @property
    def leaves_out_overlong(self) -> bool:
        """Whether rows beyond the model's context are left out, rather than refused."""
        return False


@dataclass(slots=True, kw_only=True)
class SequenceTaskConfig(TaskConfig):
    """Shared dials of the tasks on a string of letters."""

    letters: int = 6  # size of the alphabet, from "a"
    min_length: int = 3
    max_length: int = 5
    prompts: int = 4096  # distinct training prompts, at most
    demonstration_errors: float = 0.3  # share of a demonstration's letters drawn at random: people err, too

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        in_range("task.demonstration_errors", self.demonstration_errors, 0.0, 1.0)
        in_range("task.letters", self.letters, 2, 26)
        at_least("task.min_length", self.min_length, 1)
        at_least("task.max_length", self.max_length, self.min_length)
        at_least("task.prompts", self.prompts, 1)


@dataclass(slots=True, kw_only=True)
class SortTaskConfig(SequenceTaskConfig):
    """`dbca=` -> `abcd`."""


@dataclass(slots=True, kw_only=True)
class ReverseTaskConfig(SequenceTaskConfig):
    """`dbca=` -> `acbd`."""


@dataclass(slots=True, kw_only=True)
class ArithmeticTaskConfig(TaskConfig):
    """`12+7=` -> `19`."""

    max_number: int = 20  # both operands are drawn from 0..max_number
    operators: str = "+-"
    prompts: int = 4096

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        at_least("task.max_number", self.max_number, 1)
        at_least("task.prompts", self.prompts, 1)
        if not self.operators or set(self.operators) - set("+-*"):
            raise ValueError(f"task.operators must be made of '+', '-' and '*' (got {self.operators!r})")


@dataclass(slots=True, kw_only=True)
class GuessTaskConfig(TaskConfig):
    """`bh?` -> `e`, told `<` -> `c`, told `>` -> `d`: a conversation, whose last answer is scored."""

    held_out: int = 64  # ranges with a secret are few
    letters: int = 12  # size of the alphabet, from "a"
    min_range: int = 3  # letters among which the secret is
    max_range: int = 7
    turns: int = 3  # guesses, at most

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        in_range("task.letters", self.letters, 2, 26)
        in_range("task.min_range", self.min_range, 2, self.letters)
        in_range("task.max_range", self.max_range, self.min_range, self.letters)
        at_least("task.turns", self.turns, 1)
        if self.environment is not None:
            raise ValueError("task=guess is a conversation already: leave out task/environment")

    @property
    def most_answers(self) -> int:
        """Answers of one row, at most."""
        return self.turns


@dataclass(slots=True, kw_only=True)
class ReasoningGymTaskConfig(TaskConfig):
    """A data set of the package reasoning-gym: `task.name=chain_sum task.options={max_terms: 3}`."""

    name: str
    options: Any = None  # the data set's own; a typed dict takes no new name from Hydra
    prompts: int = 2048  # training prompts, at most
    chat: bool = False  # the question is a user's message, for chat models; else a text and a newline

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        at_least("task.prompts", self.prompts, 1)
        self.options = _map("task.options", "{max_terms: 3}", self.options)
        if taken := {"seed", "size"} & set(self.options):
            raise ValueError(f"task.options must not have {', '.join(sorted(taken))}: set seed and task.prompts")


class Overlong(Enum):
    """What becomes of rows beyond the model's context."""

    refuse = "refuse"  # the run, which names them
    drop = "drop"  # the rows, which are counted on the screen


@dataclass(slots=True, kw_only=True)
class FileTaskConfig(TaskConfig):
    """Rows that somebody has, in the forms of rlhf/tasks/jsonl.py."""

    held_out: int = 64  # rows are fewer than a generator's; of rows of their own, at most as many
    path: str
    held_out_path: str | None = None  # held-out rows of their own; null: rows of `path`
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    answer_after: str | None = None  # what follows the last such mark is compared, as '####' of GSM8K; null: all of it
    columns: Any = None  # other names: {prompt: question} takes the data's column question as prompt
    system: str | None = None  # what a system message says before each conversation that has none
    chat: bool = False  # a prompt that is a text is a user's message; so it is with `system`
    template: Any = None  # arguments of the chat template: {enable_thinking: false}; a row's own win
    longest_prompt: int | None = None  # tokens; rows with a longer prompt are left out, and counted on the screen
    overlong: Overlong = Overlong.refuse  # of rows that do not fit the model's context

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        if self.answer_after is not None and not self.answer_after.strip():
            raise ValueError(f"task.answer_after must be a text like '####', or null (got {self.answer_after!r})")
        if self.longest_prompt is not None:
            at_least("task.longest_prompt", self.longest_prompt, 1)
        if self.system is not None and not self.system.strip():
            raise ValueError("task.system is empty: give it a text, or leave it out")
        self.columns = _map("task.columns", "{prompt: question, answer: solution}", self.columns)
        self.template = _map("task.template", "{enable_thinking: false}", self.template)
        if wrong := [name for name in self.columns.values() if not isinstance(name, str)]:
            raise ValueError(f"task.columns must name columns of the data (got {shown(wrong[0])})")

    @property
    def leaves_out_overlong(self) -> bool:
        """Whether rows beyond the model's context are left out, rather than refused."""
        return self.overlong is Overlong.drop

    @property
    def chats(self) -> bool:
        """Whether prompts that are texts are asked as a user's message."""
        return self.chat or self.system is not None


def _map(key: str, example: str, given: Any) -> dict[str, Any]:
    """What was given as a map, as a typed dict takes no new name from Hydra."""
    given = {} if given is None else given
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"{key} must be like {example} (got {shown(given)})")
    return given


@dataclass(slots=True, kw_only=True)
class JsonlTaskConfig(FileTaskConfig):
    """A file of JSON, an object a line or an array of them; it may be compressed by gzip."""


@dataclass(slots=True, kw_only=True)
class HfTaskConfig(FileTaskConfig):
    """A data set: parquet, arrow, csv, a folder of them or of `save_to_disk`, or a name of the Hugging Face hub."""

    split: str | None = None  # also a part of one: train[:1000]; null: `train`, or the only one
    name: str | None = None  # of those that a data set has several of: main, socratic
    held_out_split: str | None = None  # held-out rows of their own, of `held_out_path` or else of `path`


@dataclass(slots=True, kw_only=True)
class AgentTaskConfig(HfTaskConfig):
    """A program a row, which is sampled through an endpoint as OpenAI's, and tells its reward at the end."""

    command: str  # the program with its arguments, as "python my_agent.py"; no shell reads it
    concurrency: int = 32  # programs at once
    timeout_s: float = 300.0  # deadline of each, seconds
    calls: int = 256  # of one program, at most
    host: str = "127.0.0.1"  # on which the endpoint listens
    tool_format: str | None = None  # the family that writes calls of tools as the model does; null: by its tokenizer
    chat: bool = True

    def __post_init__(self) -> None:
        HfTaskConfig.__post_init__(self)
        for key in ("concurrency", "calls"):
            at_least(f"task.{key}", getattr(self, key), 1)
        positive("task.timeout_s", self.timeout_s)
        if self.environment is not None:
            raise ValueError("task=agent is a conversation already: leave out task/environment")
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise ValueError(f"task.command: {error} in {shown(self.command)}") from None
        if not words:
            raise ValueError('task.command is empty: it must be like "python my_agent.py"')


@dataclass(slots=True, kw_only=True)
class GivenTaskConfig(FileTaskConfig):
    """Rows of a Python program: `rlhf.train(config, data=rows, held_out=others)`."""

    path: str = "data"  # as messages call them

    def __post_init__(self) -> None:
        FileTaskConfig.__post_init__(self)
        if self.held_out_path is not None:
            raise ValueError("task=given has no task.held_out_path: give held-out rows by rlhf.train(held_out=...)")


@dataclass(slots=True, kw_only=True)
class EnvironmentTaskConfig(HfTaskConfig):
    """Conversations with an instance of a user's class a row, whose methods are tools, or that has reset and step."""

    path: str = ""  # a file or a data set, as task=jsonl or task=hf reads it; "": the class has rows()
    factory: str | None = None  # the class, as package.module:Class
    tools: list[str] = field(default_factory=list)  # functions that are tools without state, as package.module:name
    turns: int = 4  # answers of the policy, at most
    concurrency: int = 256  # episodes at once
    processes: int = 1  # that hold the instances
    timeout_s: float = 60.0  # deadline of each call of the environment, or of all that an answer calls, seconds
    reply_tokens: int = 256  # of what the environment says to an answer; what is longer is cut
    budget: int | None = None  # tokens of a row's answers and replies, after which there is no further answer
    show_tools: bool = True  # to the policy, by its chat template; false: it knows them from elsewhere
    tool_format: str | None = None  # the family that writes calls as the model does; null: by its tokenizer
    keeps_thoughts: bool = False  # the policy sees what it has thought, also where its template would leave that out

    def __post_init__(self) -> None:
        HfTaskConfig.__post_init__(self)
        for key in ("turns", "concurrency", "processes", "reply_tokens"):
            at_least(f"task.{key}", getattr(self, key), 1)
        positive("task.timeout_s", self.timeout_s)
        if self.budget is not None:
            at_least("task.budget", self.budget, 1)
        if self.environment is not None:
            raise ValueError("task=environment is a conversation already: leave out task/environment")
        for key, named in (("factory", self.factory), *(("tools", each) for each in self.tools)):
            if named is not None and not all(named.partition(":")[::2]):
                raise ValueError(f"task.{key} must be like package.module:name (got {named!r})")
        if self.factory is None and not self.tools:
            raise ValueError(
                "task=environment needs task.factory=package.module:Class, or task.tools=[module:function]"
            )
        if self.factory is None and not self.path:
            raise ValueError("task.tools has no rows of its own: set task.path to a file of prompts")

    @property
    def waits(self) -> bool:
        """Whether what answers the policy may take long."""
        return True

    @property
    def most_answers(self) -> int:
        """Answers of one row, at most."""
        return self.turns
