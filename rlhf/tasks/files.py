"""The rows of a file or a data set as a task: all bad ones are reported together, before anything starts.

Pairs of equal answers are left out. No question is both held out and trained on: rows of one question stay together,
and those of a held-out file or split are left out of what is trained on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence

from rlhf.config import FileTaskConfig, HfTaskConfig, JsonlTaskConfig
from rlhf.tasks.compare import verifier
from rlhf.tasks.json_lines import counted, json_records, report
from rlhf.tasks.jsonl import SYSTEM, TEMPLATE, TEMPLATE_OWN, TieError, parse_row
from rlhf.tasks.raw import RawTask, Row
from rlhf.tasks.source import Source, reading


def jsonl_task(config: JsonlTaskConfig, seed: int) -> RawTask:
    """Read the file; ValueError with file, line numbers and reasons if any line is bad."""
    return task_of(config, seed, *json_sources(config))


def hf_task(config: HfTaskConfig, seed: int) -> RawTask:
    """Read the data set; ValueError names what is missing or wrong, by its rows where any of them is bad."""
    from rlhf.tasks.hf import sources_of

    with reading(config.path):
        sources = sources_of(config)
    return task_of(config, seed, *sources)


def json_sources(config: FileTaskConfig) -> list[Source]:
    """The rows of the file, and of that of held-out rows, if there is one."""
    sources = [Source(config.path, "task.path", json_records(config.path))]
    if (path := config.held_out_path) is not None:
        sources.append(Source(path, "task.held_out_path", json_records(path, "task.held_out_path")))
    return sources


def task_of(config: FileTaskConfig, seed: int, source: Source, own: Source | None = None) -> RawTask:
    """The task of these rows, of which some are held out, or those of `own`."""
    if taken := set(TEMPLATE_OWN) & set(config.template):
        raise ValueError(f"task.template must not have {', '.join(sorted(taken))}: the harness gives that itself")
    groups, notes = _grouped(config, source)
    train, held_out = (
        _split(config, seed, groups, source.key) if own is None else _apart(config, seed, groups, own, notes)
    )
    gold = verifier(config, [*train, *held_out], source.key)
    return RawTask(train, held_out, gold, notes=notes, longest_prompt=config.longest_prompt, template=config.template)


ENOUGH = 1000  # rows that are bad before any is good
Groups = dict[str, list[Row]]  # by question


def _split(config: FileTaskConfig, seed: int, groups: Groups, key: str) -> tuple[list[Row], list[Row]]:
    questions = list(groups)
    if len(questions) == 1:
        raise ValueError(
            f"{config.path} has one prompt, and one at least is held out: add lines with other prompts to {key}"
        )
    if len(questions) <= config.held_out:
        raise ValueError(
            f"{config.path} has {len(questions)} different prompts, too few to hold {config.held_out} out and train on "
            f"the others: set task.held_out below {len(questions)}, or add lines to {key}"
        )
    random.Random(seed).shuffle(questions)
    train = [row for question in questions[: -config.held_out] for row in groups[question]]
    return train, [groups[question][0] for question in questions[-config.held_out :]]


def _apart(
    config: FileTaskConfig, seed: int, groups: Groups, own: Source, notes: list[str]
) -> tuple[list[Row], list[Row]]:
    """Held-out rows of their own, `task.held_out` of them at most, and of the others those of other questions."""
    held, more = _grouped(config, own)
    notes += [note for note in more if note not in notes]
    questions, asked = list(groups), list(held)
    random.Random(seed).shuffle(questions)
    random.Random(seed).shuffle(asked)
    if both := [row.where for question in questions if question in held for row in groups[question]]:
        notes.append(f"warning: rows whose prompt is one of {own.name} are not trained on: {counted(both)}")
    train = [row for question in questions if question not in held for row in groups[question]]
    if not train:
        raise ValueError(f"every prompt of {config.path} is held out by {own.name}: set {own.key} to other rows")
    if len(asked) > config.held_out:
        notes.append(f"held out: {config.held_out} (task.held_out) of the {len(asked)} prompts of {own.name}")
    return train, [held[question][0] for question in asked[: config.held_out]]


def _grouped(config: FileTaskConfig, source: Source) -> tuple[Groups, list[str]]:
    """All rows by their question, and what is to be said of them."""
    rows, notes = _rows(config, source)
    groups: Groups = {}
    for row in rows:
        groups.setdefault(json.dumps(row.question), []).append(row)
    return groups, notes


def _rows(config: FileTaskConfig, source: Source) -> tuple[list[Row], list[str]]:
    """Every row, and what is to be said of them; ValueError with all (at most SHOWN) bad ones."""
    rows: list[Row] = []
    bad: dict[str, str] = {}
    ties: list[str] = []
    with reading(source.name) as seen:
        for where, columns in source.records:
            seen.rows += 1
            try:
                if isinstance(columns, ValueError):
                    raise columns
                rows.append(parse_row(columns, config, where))
            except ValueError as error:
                bad[where] = str(error)
                if isinstance(error, TieError):
                    ties.append(where)
                elif not rows and len(bad) - len(ties) >= ENOUGH:  # a mistake in a key, not in rows
                    raise ValueError(report(list(bad.items()), 0, "the first")) from None
    if len(bad) > len(ties) or (ties and not any(row.preference for row in rows)):
        raise ValueError(report(list(bad.items()), len(rows)))
    if not rows:
        raise ValueError(f"{source.name} is empty: {source.key} must name {source.wanted}")
    return rows, [*source.notes(), *_notes(config, rows, ties)]


def _notes(config: FileTaskConfig, rows: Sequence[Row], ties: Sequence[str]) -> Iterator[str]:
    """What to say of rows that are read."""
    if ties:
        yield f"warning: pairs whose chosen and rejected answers are the same are left out: {counted(ties)}"
    texts = [row for row in rows if isinstance(row.question, str)]
    for column in TEMPLATE:
        if unseen := [row.where for row in texts if column in row.columns]:
            yield f"warning: {column!r} is for chat templates, and these prompts are texts: {counted(unseen)}"
    if config.template and len(texts) == len(rows):
        raise ValueError(
            "task.template is for chat templates, and the prompts are texts: set task.chat=true, which asks each as a "
            "user's message, or leave task.template out"
        )
    if config.template and texts:
        yield f"task.template is not for prompts that are texts: {counted([row.where for row in texts])}"
    if config.system and (other := [row.where for row in rows if _has_another(row, config.system)]):
        yield f"task.system is not put before conversations that have one of their own: {counted(other)}"


def _has_another(row: Row, system: str) -> bool:
    first: Mapping[str, object] = row.question[0]  # type: ignore[assignment]
    return first["role"] in SYSTEM and first["content"] != system
