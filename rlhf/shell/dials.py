"""What a run's folder says of its dials, in `.hydra/`: replaced whole, and put back where nothing came of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILES = ("overrides.yaml", "config.yaml", "hydra.yaml")


@contextmanager
def taken_back(folder: Path) -> Iterator[None]:
    """If a resume ends with an error before anything new is saved, the run's dials are again those of before."""
    paths = [folder / ".hydra" / name for name in FILES]
    before, there = {path: path.read_text(encoding="utf-8") for path in paths if path.is_file()}, saved(folder)
    try:
        yield
    except Exception:
        changed = [path for path, text in before.items() if path.read_text(encoding="utf-8") != text]
        if changed and not saved(folder) - there:
            for path in changed:
                replace(path, before[path])
            print("nothing of it is kept: the run's dials are what they were", file=sys.stderr)
        raise


def saved(folder: Path) -> set[str]:
    """The names of a run's checkpoints."""
    return {path.name for path in folder.glob("checkpoints/[0-9]*")}


def replace(path: Path, text: str) -> None:
    """Let a file have this text, or stay as it is."""
    writing = path.with_suffix(".writing")
    try:
        writing.write_text(text, encoding="utf-8")
        os.replace(writing, path)
    except OSError:
        writing.unlink(missing_ok=True)
        raise
