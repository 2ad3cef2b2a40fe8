"""What the messages of an update may hold: their fields, and what each field's value must be.

Forms with an epoch belong to a session; those called ONE_SHOT are vLLM's, which have none. What the verbs do with them
is in receiver.py; schemas.py describes the same forms for others.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transfer.agreement import wire
from transfer.config import InFlight, Verify

MAX_TIMEOUT_S = 3600.0

Check = Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Form:
    """The fields of a JSON object, called `where` in reasons, and what the value of each must pass."""

    fields: dict[str, Check]
    where: str = "body"
    optional: frozenset[str] = frozenset()

    def read(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The body, if it has this form; Refused 422 names the field that is unknown, wrong or missing."""
        body = dict(body)
        wire.only(body, self.fields, self.where)
        for key in self.fields:
            if key not in body and key not in self.optional:
                raise wire.Refused(422, f"{self.where}.{key} is missing")
        return body


def read_start(body: Mapping[str, Any]) -> dict[str, Any]:
    """A session's start, whatever else it is, too; Refused 422 if it is of another form."""
    body = START.read(body)
    if "finish" in body and "where" not in body:
        raise wire.Refused(422, "body.finish needs body.where: weights that were not staged cannot be finished")
    return body


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_timeout(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_TIMEOUT_S


def _is_one_of(kind: type[enum.Enum]) -> Check:
    return tuple(member.value for member in kind).__contains__


def _is_epoch(value: Any) -> bool:
    return wire.is_int(value) and value > 0  # 0 is one-shot's


def _is_version(value: Any) -> bool:
    return isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 18


INIT = Form({"init_info": _is_dict, "boot": wire.is_str}, optional=frozenset({"boot"}))
INIT_INFO = Form(
    {
        "epoch": _is_epoch,
        "trainer": wire.is_str,
        "manifest": _is_dict,
        "timeout_s": _is_timeout,
        "where": _is_dict,
        "verify": _is_one_of(Verify),
        "in_flight": _is_one_of(InFlight),
    },
    "init_info",
    optional=frozenset({"verify", "in_flight"}),
)
START = Form(
    {
        "epoch": _is_epoch,
        "version": wire.is_int,
        "digest": wire.is_str,
        "boot": wire.is_str,
        "where": _is_dict,
        "finish": wire.is_bool,
    },
    optional=frozenset({"digest", "boot", "where", "finish"}),
)
UPDATE = Form({"update_info": _is_dict})
UPDATE_INFO = Form({"epoch": _is_epoch, "version": wire.is_int, "where": _is_dict}, "update_info")
FINISH = Form({"epoch": _is_epoch, "weight_version": _is_version})
ABORT = Form({"epoch": wire.is_int, "version": wire.is_int})
WITHDRAW = Form({"epoch": _is_epoch, "version": wire.is_int})

ONE_SHOT_INIT_INFO = Form({"packed": lambda value: value is False}, "init_info", frozenset({"packed"}))
ONE_SHOT_START = Form(
    {"is_checkpoint_format": lambda value: value is True}, optional=frozenset({"is_checkpoint_format"})
)
ONE_SHOT_FINISH = Form({"weight_version": _is_version}, optional=frozenset({"weight_version"}))
