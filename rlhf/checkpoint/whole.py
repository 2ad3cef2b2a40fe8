"""A run's products, `policy/` and the like: there whole, or as they were."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.shell.ending import RunError
from transfer.agreement.shown import one_line


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` at the end of the block.

    RunError where the disk does not take it, being full, say; then what was there stays.
    """
    from safetensors import SafetensorError

    writing = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        yield writing
        _replace(folder, writing)
    except Exception as error:
        if not (isinstance(error, (OSError, SafetensorError)) or type(error) is Exception):  # tokenizers' Rust half
            raise
        reason = one_line(str(error))
        raise RunError(f"{folder}/ cannot be written ({reason}): make room on its disk") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def _replace(folder: Path, new: Path) -> None:
    """Put `new` in the folder's place; what is there stays beside it until then, also if this process is killed."""
    before = folder.with_name(f".before-{folder.name}")
    if os.path.lexists(folder):
        shutil.rmtree(before, ignore_errors=True)
        os.rename(folder, before)
    try:
        os.rename(new, folder)
    except OSError:
        if os.path.lexists(before):
            os.rename(before, folder)
        raise
    shutil.rmtree(before, ignore_errors=True)
