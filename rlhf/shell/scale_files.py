"""How somebody tells a run that goes on how many workers it is to have: two files in the run's folder.

    scale.json     the request: one that waits, until the run takes it between two steps, and removes it
    scaled.json    what came of it so far, replaced by the run; whoever has asked removes it

Both are there whole or not at all, and only this user can read or write them: a request may hold a worker's token.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

REQUEST, ANSWER = "scale.json", "scaled.json"
MOST_BYTES = 64 * 1024
MOST_WORKERS = 10**6  # in a request; what is possible the run says


@dataclass(frozen=True, slots=True)
class Request:
    """So many workers, or further ones that run already."""

    workers: int | None = None
    urls: list[str] = field(default_factory=list)
    token: str | None = None  # of those workers
    id: str = field(default_factory=lambda: secrets.token_hex(8))


@dataclass(frozen=True, slots=True)
class Answer:
    """What a run says of the request with this id."""

    id: str
    state: str  # going: it is at it; done; failed
    line: str


def post(folder: Path, request: Request) -> None:
    """Leave a request for the run; FileExistsError if another one waits there."""
    written = _written(folder, request.id, asdict(request))
    try:
        _place(written, folder)
    finally:
        written.unlink(missing_ok=True)


def _place(written: Path, folder: Path) -> None:
    """Let the file be the request that waits; FileExistsError if another one does."""
    try:
        os.link(written, folder / REQUEST)
    except FileExistsError:
        raise
    except OSError:  # a file system without such links
        if waiting(folder):
            raise FileExistsError(str(folder / REQUEST)) from None
        written.rename(folder / REQUEST)


def withdrawn(folder: Path, request: Request) -> bool:
    """Take a request back; False if the run has taken it already."""
    aside = folder / f".{REQUEST}.{request.id}"
    try:
        (folder / REQUEST).rename(aside)
    except FileNotFoundError:
        return False
    try:
        with suppress(OSError, ValueError):
            if _read(aside).get("id") == request.id:
                return True
        with suppress(FileExistsError):
            _place(aside, folder)  # another one: the run has taken ours
        return False
    finally:
        aside.unlink(missing_ok=True)


def waiting(folder: Path) -> bool:
    """Whether a request waits to be taken."""
    return os.path.lexists(folder / REQUEST)


def taken(folder: Path) -> Request:
    """The request that waits, which is then the caller's; ValueError or OSError if it is none."""
    aside = folder / f".{REQUEST}.taken"
    (folder / REQUEST).rename(aside)  # first: whoever has asked can take it back no more
    try:
        return _request(_read(aside))
    finally:
        aside.unlink(missing_ok=True)


def answer(folder: Path, said: Answer) -> None:
    """Say what has come of a request so far."""
    _written(folder, said.id, asdict(said)).replace(folder / ANSWER)


def heard(folder: Path, request: Request) -> Answer | None:
    """What the run says of this request; None: nothing yet."""
    with suppress(OSError, ValueError):
        told = _read(folder / ANSWER)
        if told.get("id") == request.id:
            return Answer(request.id, str(told.get("state")), str(told.get("line")))
    return None


def clear(folder: Path) -> None:
    """Remove what an earlier run, or whoever has asked it, has left."""
    for name in (REQUEST, ANSWER):
        (folder / name).unlink(missing_ok=True)


def _written(folder: Path, name: str, what: Mapping[str, Any]) -> Path:
    path = folder / f".{REQUEST}.{name}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(what) + "\n")
    return path


def _read(path: Path) -> dict[str, Any]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_size > MOST_BYTES:
            raise ValueError("it must be a regular file of this user's, and a small one")
        told = json.loads(file.read(MOST_BYTES))
    if not isinstance(told, dict):
        raise ValueError("it must be a JSON object")
    return told


def _request(told: Mapping[str, Any]) -> Request:
    if unknown := sorted(set(told) - {each.name for each in fields(Request)}):
        raise ValueError(f"unknown keys {unknown}")
    request = Request(**told)
    workers, urls = request.workers, request.urls
    if not isinstance(request.id, str) or not isinstance(request.token, str | None):
        raise ValueError("id and token must be texts")
    if not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
        raise ValueError("urls must be texts")
    if workers is not None and (type(workers) is not int or not 1 <= workers <= MOST_WORKERS):
        raise ValueError(f"workers must be a number from 1 to {MOST_WORKERS}")
    if (workers is None) != bool(urls):
        raise ValueError("it must name a number of workers, or the URLs of some")
    return request
