"""The doctor's findings on the screen, or as JSON."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby

from transfer.doctor.choice import Choice
from transfer.doctor.finding import FAIL, LATE, OK, SKIP, WARN, Result

STYLES = {OK: "green", WARN: "yellow", FAIL: "bold red", SKIP: "dim", LATE: "magenta"}
WORDS = {OK: "ok", WARN: "ok, but", FAIL: "FAILS", SKIP: "-", LATE: "no time"}
WIDTH = 140  # of what is not a terminal


def as_json(results: Sequence[Result], choice: Choice) -> str:
    """One JSON object: every check, and what to choose."""
    return json.dumps({"checks": [result.to_json() for result in results], "choice": choice.to_json()}, indent=1)


def show(results: Sequence[Result], choice: Choice) -> None:
    """Print a table a group, then what to choose and why."""
    rows = {group: list(_rows(found)) for group, found in groupby(results, key=lambda result: result.check.group)}
    if importlib.util.find_spec("rich") is None:
        _plain(rows)
    else:
        _coloured(rows)
    print()
    if choice.overrides:
        print(f"Choose here: {' '.join(choice.overrides)}")
    elif any(result.finding.status == LATE for result in results):
        print("Nothing is known to work here: there was no time to try all.")
    else:
        print("Nothing works here.")
    for line in choice.why:
        print(f"  - {line}")


def _rows(results: Iterable[Result]) -> Iterable[tuple[str, str, str, str]]:
    """Name, status, what was seen, what to do; neighbours with the same to say are one row."""
    for _, alike in groupby(results, key=lambda r: r.check.name if r.works else r.finding.seen):
        first, *more = alike
        name = first.check.name if not more else f"{first.check.name} and {len(more)} more"
        yield name, first.finding.status, first.finding.seen, first.finding.do


def _coloured(rows: dict[str, list[tuple[str, str, str, str]]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for group, found in rows.items():
        table = Table(title=group, title_justify="left", title_style="bold", show_header=False, expand=True)
        table.add_column(ratio=2)
        table.add_column(no_wrap=True)
        table.add_column(ratio=6)
        for name, status, seen, do in found:
            words = Text(seen)
            if do:
                words.append(f"\n-> {do}", STYLES[status])
            table.add_row(Text(name), Text(WORDS[status], STYLES[status]), words)
        console.print(table)


def _plain(rows: dict[str, list[tuple[str, str, str, str]]]) -> None:
    for group, found in rows.items():
        print(f"\n{group}")
        for name, status, seen, do in found:
            print(f"  {name:32} {WORDS[status]:8} {seen}" + (f"\n{'':44}-> {do}" if do else ""))
