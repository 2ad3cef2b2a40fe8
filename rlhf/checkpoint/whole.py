"""A run's products, `policy/` and the like: there whole, or as they were."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.ending import RunError


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
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(writing, folder)
    except Exception as error:
        if not (isinstance(error, (OSError, SafetensorError)) or type(error) is Exception):  # tokenizers' Rust half
            raise
        reason = " ".join(str(error).split())
        raise RunError(f"{folder}/ cannot be written ({reason}): make room on its disk") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
