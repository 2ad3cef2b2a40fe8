"""What is printed outlives who reads it: where a terminal or a pipe is gone, a run goes on, and its words go to a file.

outlast()          once, at the start of a command
into(folder)       once a run has a folder: what nobody reads any more goes to its `screen.txt`
"""

from __future__ import annotations

import codecs
import os
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = "rlhf-shown"  # what is done with what the encoding lacks
UTF8 = "PYTHONUTF8"
FILE = "screen.txt"  # of a run's folder
STDOUT, STDERR = 1, 2  # file descriptors


def _shown(error: UnicodeError) -> tuple[str | bytes, int]:
    """Bytes of a path as they are, other letters as `\\xfc`."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


codecs.register_error(SHOWN, _shown)


def plain_console() -> Console:
    """A console that prints texts as they are: `[console]` in a path is no style, `:100:` behind a file no emoji.

    In a notebook, which is no terminal and has FORCE_COLOR set, they are lines of text.
    """
    from rich.console import Console

    console = Console(markup=False, emoji=False)
    if not console.is_jupyter:
        return console
    return Console(markup=False, emoji=False, force_jupyter=False, force_terminal=False, color_system=None)


class Outlasting:
    """stdout or stderr, whose descriptor is pointed at a file once nothing can be written into what it was."""

    def __init__(self, stream: TextIO, descriptor: int) -> None:
        self._stream, self._descriptor = stream, descriptor
        self._lock = threading.RLock()
        self._folder: Path | None = None  # of the run
        self._gone = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As a text stream; never an OSError."""
        with self._lock:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._point_elsewhere(error)
                return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """As a text stream."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """As a text stream; never an OSError."""
        with self._lock:
            try:
                self._stream.flush()
            except OSError as error:
                self._point_elsewhere(error)

    def into(self, folder: Path) -> None:
        """From now on, or once nobody reads, the folder's file is written."""
        with self._lock:
            self._folder = folder
            if self._gone:
                self._open()

    def _point_elsewhere(self, error: OSError) -> None:
        self._gone = True
        self._open()
        with suppress(OSError):
            self._stream.flush()  # what is still buffered, or nothing
        if self._folder is not None and self._descriptor == STDOUT and sys.stderr is not None:
            where = self._folder / FILE
            print(f"nothing more can be written to stdout ({error.strerror}): the rest is in {where}", file=sys.stderr)

    def _open(self) -> None:
        """Point the descriptor at the run's file, or, where there is none, at nothing."""
        for path in ([] if self._folder is None else [str(self._folder / FILE)]) + [os.devnull]:
            with suppress(OSError):
                opened = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
                os.dup2(opened, self._descriptor)
                os.close(opened)
                return


def outlast() -> None:
    """Let stdout and stderr take whatever is printed, in any encoding, also after who reads them is gone.

    Begins the program anew where the locale has Python use another encoding for paths than UTF-8.
    """
    _use_utf8()
    _fill()
    for name, descriptor in (("stdout", STDOUT), ("stderr", STDERR)):
        stream = getattr(sys, name)
        if isinstance(stream, Outlasting):
            continue
        if stream is None:  # closed before this process began
            stream = open(descriptor, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process
        with suppress(AttributeError, OSError, ValueError):  # a stream of a test, say
            if stream.fileno() == descriptor:
                stream.reconfigure(errors=SHOWN)  # a terminal that is not UTF-8 cannot show all letters
                setattr(sys, name, Outlasting(stream, descriptor))


def into(folder: Path) -> None:
    """What nobody reads any more goes to this folder's file."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Outlasting):
            stream.into(folder)


def _use_utf8() -> None:
    """Libraries in Rust, safetensors and tokenizers, know no other paths; the processes that are started inherit it."""
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get(UTF8) == "1":
        return
    os.environ[UTF8] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _fill() -> None:
    """A descriptor that was closed is nothing's: else the next file that is opened would be printed into."""
    for descriptor in (0, STDOUT, STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest number that is free
