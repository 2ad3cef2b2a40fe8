"""A Python in which importing a heavy package fails: what answers at once imports none."""

from __future__ import annotations

import sys

HEAVY = ("torch", "ray", "transformers", "peft", "matplotlib", "starlette", "numpy", "requests")


class Refuse:
    """The first of `sys.meta_path`."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """None, so that another finds it; AssertionError for what is heavy."""
        if name in HEAVY:
            raise AssertionError("imported " + name)


def refuse() -> None:
    """From now on."""
    sys.meta_path.insert(0, Refuse())  # type: ignore[arg-type]
