"""What kind a file is by its first bytes, or its name, and what to do with one that a task does not read."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

HEAD = 1 << 16  # bytes that are looked at
BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
PARQUET, ARROW, STREAM, CSV, TSV = "parquet", "arrow", "an arrow stream", "csv", "tsv"
OF_HF = (PARQUET, ARROW, STREAM, CSV, TSV)
MAGIC = {b"PAR1": PARQUET, b"ARROW1": ARROW, b"\xff\xff\xff\xff": STREAM}
TABLES = {".csv": CSV, ".tsv": TSV}
UTF16 = "write it anew as UTF-8 (iconv -f UTF-16 -t UTF-8 FILE)"
OTHERS = {  # first bytes -> what it is, and what to do with it
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "unpack it (zstd -d FILE), or compress it by gzip"),
    b"BZh": ("compressed by bzip2", "unpack it (bunzip2 FILE), or compress it by gzip"),
    b"\xfd7zXZ": ("compressed by xz", "unpack it (unxz FILE), or compress it by gzip"),
    b"PK\x03\x04": ("a zip archive", "unpack it (unzip FILE), and name the file that was in it"),
    b"\xff\xfe": ("UTF-16", UTF16),
    b"\xfe\xff": ("UTF-16", UTF16),
}
UNREADABLE = (OSError, EOFError, zlib.error)  # of a file, or of what gzip finds in it


class Stream(io.BufferedReader):
    """A binary file from its beginning, unpacked where gzip has packed it; what stands first can be looked at."""

    def head(self) -> bytes:
        """The first bytes, without a byte order mark."""
        return self.peek(HEAD).removeprefix(BOM)


@contextmanager
def opened(path: str, key: str) -> Iterator[Stream]:
    """The file that `key` names; ValueError, in one line, where it cannot be opened or read."""
    try:
        try:
            raw = open(Path(path).expanduser(), "rb", buffering=0)  # noqa: SIM115 - the stream closes it
        except ValueError as error:  # a NUL in the name
            raise ValueError(f"{key}: cannot read {path!r}: {error}") from None
        with Stream(raw) as file:
            if file.peek(HEAD).startswith(GZIP):
                with Stream(cast(io.RawIOBase, gzip.open(cast(IO[bytes], file)))) as unpacked:
                    yield unpacked
            else:
                yield file
    except UNREADABLE as error:  # also while it is read, in the block
        reason = getattr(error, "strerror", None) or f"its gzip is damaged ({error})"
        reason += "; task=hf reads folders" if isinstance(error, IsADirectoryError) else ""
        raise ValueError(f"{key}: cannot read {path} from {Path.cwd()}: {reason}") from None


def kind_of_file(path: str, head: bytes) -> str:
    """One of OF_HF, or nothing: of JSON, say; ValueError for what no task reads."""
    for magic, kind in MAGIC.items():
        if head.startswith(magic):
            return kind
    for magic, (kind, otherwise) in OTHERS.items():
        if head.startswith(magic):
            raise ValueError(f"{path}: that is {kind}: {otherwise}")
    if b"\0" in head[:4]:
        raise ValueError(f"{path}: that is UTF-16 or no text at all: {UTF16}")
    name = Path(path.lower().removesuffix(".gz"))
    return TABLES.get(name.suffix, "") if not head.lstrip().startswith(b"{") else ""
