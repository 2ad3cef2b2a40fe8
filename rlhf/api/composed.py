"""`rlhf.compose`: a run's configuration, of the words that a command line has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rlhf.compose import CONF, checked, misplaced, prepare, register, unknown_choices
from rlhf.config import RunConfig
from transfer.agreement.shown import one_line, shown

MOST = 500  # characters of an error
SEARCHED = "\nConfig search path"  # where Hydra's errors begin to tell what no choice depends on


def compose(overrides: Sequence[str] = (), **dials: Any) -> RunConfig:
    """The configuration that `python -m rlhf.train` makes of the same words, checked.

        compose(["experiment=smoke", "task=reverse"], steps=5, optim={"lr": 1e-4})

    A keyword is a word, too: `steps=5`, `task="reverse"`, a dict for keys of a group. ValueError, of one line, where
    the command line would end with it; nothing is printed, and a program's own Hydra stays as it is.
    """
    from hydra.errors import HydraException

    words = [overrides] if isinstance(overrides, str) else [str(each) for each in overrides]
    words += [f"{key}={_written(value)}" for key, value in dials.items()]
    if flags := [word for word in words if word.startswith("-")]:
        raise ValueError(f"{flags[0]} is a flag of the command line: compose takes words like steps=5")
    with _own_hydra():
        register()
        prepare(words)
        if unknown := unknown_choices(words):
            raise ValueError("; ".join(unknown))
        try:
            return checked(_composed(words))
        except HydraException as error:
            raise ValueError(_in_one_line(error, words)) from error


def _composed(words: list[str]) -> Any:
    from hydra import initialize_config_dir

    from rlhf.shell.search_path import of_command

    where, overrides = of_command(words)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return where.compose("config", overrides)


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Hydra, which a process has once, also in a program that is made with it."""
    from hydra.core.global_hydra import GlobalHydra

    held = GlobalHydra.instance()
    before, held.hydra = held.hydra, None
    try:
        yield
    finally:
        held = GlobalHydra.instance()
        held.hydra = before


def _in_one_line(error: Exception, words: list[str]) -> str:
    """What Hydra says in ten lines, and the hints that the command line gives."""
    said = " ".join(str(error).partition(SEARCHED)[0].split())
    cause = str(error.__cause__ or "").strip().partition("\n")[0]
    whole = [said, *([cause] if cause and cause not in said else []), *misplaced(words)]
    return one_line("; ".join(whole), MOST)


def _written(value: Any) -> str:
    """A value as Hydra's grammar has it."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str():
            return value if value.isidentifier() else _quoted(value)
        case Mapping():
            return "{" + ",".join(f"{key}:{_written(each)}" for key, each in value.items()) + "}"
        case list() | tuple():
            return "[" + ",".join(map(_written, value)) + "]"
    raise ValueError(f"a dial is a number, text, list or dict, true, false or None (got {shown(value)})")


def _quoted(text: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()
