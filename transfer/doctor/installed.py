"""What is installed, beside what this package declares that it needs; each of the first three functions is a check."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Callable
from contextlib import suppress

from transfer.doctor.finding import Finding, Problem, ok, warn
from transfer.worker.process import SOURCE

DISTRIBUTION = "rlhf-transfer"
NEEDED_FOR = {  # package -> what cannot be done without it
    "torch": "everything",
    "numpy": "transfer=ipc",
    "xxhash": "transfer.verify=digest and transfer=disk",
    "safetensors": "transfer=disk",
    "requests": "transfer/sender=http",
    "starlette": "workers over HTTP",
    "uvicorn": "workers over HTTP",
    "httptools": "workers over HTTP at full speed",
    "rich": "tables in colour",
}


def python(version: str = sys.version.split()[0]) -> Finding:
    """Whether this Python is one that the package supports."""
    wanted = declared()[0]
    if not fits(version, wanted):
        raise Problem(f"Python {version}, supported is {wanted}", f"use a Python {wanted}")
    return ok(f"{version} ({sys.executable})")


def packages(versions: Callable[[str], str | None] | None = None) -> Finding:
    """Whether what a transfer needs is installed, in versions that the package supports."""
    installed = versions or version_of
    found = {name: installed(name) for name in NEEDED_FOR}
    lacking = [f"{name} (for {NEEDED_FOR[name]})" for name, version in found.items() if version is None]
    if lacking:
        names = " ".join(name for name, version in found.items() if version is None)
        raise Problem(f"missing: {', '.join(lacking)}", f"pip install {names}")
    ranges = declared()[1]
    odd = [f"{n} {v} (supported {ranges[n]})" for n, v in found.items() if v and not fits(v, ranges.get(n, ""))]
    if odd:
        return warn(f"outside of the supported range: {', '.join(odd)}", "pip install -e . in the repository")
    return ok(", ".join(f"{name} {version}" for name, version in found.items()))


def ray_installed(version: str | None = None) -> Finding:
    """Whether Ray is there, and in a supported version; it is not imported."""
    found = version or version_of("ray")
    if found is None:
        raise Problem("Ray is not installed", "pip install ray, or stay with transfer/sender=http")
    wanted = declared()[1].get("ray", "")
    if not fits(found, wanted):
        return warn(f"Ray {found}, supported is {wanted}", f'pip install "ray{wanted}"')
    return ok(f"Ray {found}")


def version_of(package: str) -> str | None:
    """The installed version of a package; None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def declared() -> tuple[str, dict[str, str]]:
    """The range of Pythons, and the range of each package, that this package declares; empty where it says none."""
    source = SOURCE / "pyproject.toml"  # of a checkout: newer than the metadata of its installation
    if source.exists():
        project = tomllib.loads(source.read_text(encoding="utf-8"))["project"]
        return project.get("requires-python", ""), _ranges(project.get("dependencies", []))
    with suppress(importlib.metadata.PackageNotFoundError):
        metadata = importlib.metadata.metadata(DISTRIBUTION)
        return metadata["Requires-Python"] or "", _ranges(importlib.metadata.requires(DISTRIBUTION) or [])
    return "", {}


def _ranges(requirements: list[str]) -> dict[str, str]:
    parts = [re.fullmatch(r"([\w.-]+)(?:\[.*\])?\s*([^;]*)", line) for line in requirements]  # extras' have a marker
    return {part[1].lower(): part[2].strip() for part in parts if part}


def fits(version: str, wanted: str) -> bool:
    """Whether a version is within a range like ">=2.11,<2.14"; of the version, only the numbers count."""
    operators: dict[str, Callable[[list[int], list[int]], bool]] = {
        ">=": lambda a, b: a >= b,
        "<=": lambda a, b: a <= b,
        "==": lambda a, b: a == b,
        "!=": lambda a, b: a != b,
        ">": lambda a, b: a > b,
        "<": lambda a, b: a < b,
    }
    clauses = re.findall(r"(>=|<=|==|!=|>|<)\s*([\d.]+)", wanted)
    return all(operators[operator](_numbers(version), _numbers(bound)) for operator, bound in clauses)


def _numbers(version: str) -> list[int]:
    release = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in release[0].split(".")] if release else []
    return (numbers + [0] * 4)[:4]
