"""Whether two answers are the same number or expression, by math-verify (pip install -e ".[math]").

Sympy may compute for hours on a hostile answer, in ways that only the end of its process ends: shell/apart.py is for
that, so that math-verify's own deadlines, which need SIGALRM, are off.
"""

from __future__ import annotations

import logging
import re

import math_verify

MARK = "####"  # GSM8K's: the answer follows the last
NUMBER = re.compile(r"[-+]?\$?[-+]?(\d[\d,]*)?(\.\d+)?\s*%?")

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its deadlines are off


def right(reference: str, answer: str) -> float:
    """1.0 if the answer's last expression equals the reference's, or they are the same text, else 0.0.

    After `####` only what follows the last is looked at, in both. ValueError of a reference in which there is none;
    whatever math-verify raises where it cannot compare.
    """
    if after(reference) == after(answer) != "":
        return 1.0
    gold = _parsed(_as_math(after(reference)))
    if not gold:
        raise ValueError(f"math-verify finds no expression in the reference {reference[-200:]!r}")
    given = _parsed(after(answer))
    if not given:
        return 0.0
    try:
        return float(math_verify.verify(gold, given, timeout_seconds=None, raise_on_error=True))
    except Exception:
        if math_verify.verify(gold, given, timeout_seconds=None):  # another pair of their forms says so
            return 1.0
        raise


def after(text: str) -> str:
    """What follows the last mark; all of it, where there is none."""
    return text.rpartition(MARK)[2].strip()


def _as_math(reference: str) -> str:
    """A bare expression is marked as one, which it is as a whole; a number and a text with marks of its own are not."""
    marked = "\\boxed" in reference or "$" in reference or "\\(" in reference or "\\[" in reference
    return reference if marked or NUMBER.fullmatch(reference) else f"\\boxed{{{reference}}}"


def _parsed(text: str) -> list[object]:
    return math_verify.parse(text, parsing_timeout=None)
