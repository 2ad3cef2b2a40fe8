"""The message of `/v1/completions`, in vLLM's form: token ids in, token ids and their log-probs out.

    {"prompt": [[1, 5, 9], [1, 7]], "n": 2, "max_tokens": 8, "temperature": 1.0, "seeds": [3, 4], "stop_token_ids": [2],
     "logprobs": 0}
    {"choices": [{"index": 0, "token_ids": [5, 2], "logprobs": {"token_logprobs": [-0.7, -0.1]}, "text": "",
     "finish_reason": "stop", "weight_version": 3, "weight_versions": [[3, 2]]}, ...],
     "usage": {"prompt_tokens": 5, "completion_tokens": 9}}

Choice i*n + j is sample j of prompt i. Without `stop_token_ids` rows stop at the end-of-sequence tokens of the model's
config. Ours, not vLLM's: `seeds` (one a prompt; `seed` gives prompt i its own seed, made of `seed` and i) and
`weight_versions`, [version, tokens] for each run of tokens that one version sampled, the first in `weight_version`. An
answer with finish_reason "abort" was cut short by new weights or by a pause. There is no tokenizer here, so `text` is
empty and a prompt of text is refused. `top_p`, `top_k` and `min_p` cut tokens off the distribution, as vLLM does; log-
probs are of the distribution that is sampled from, at its temperature, of what is left of it. `firsts` (one a prompt)
says which of its samples is the first, so that the samples of a prompt can be asked of several workers. Two more fields
are ours: `logprobs_rows` names the choices that are to have log-probs where `logprobs` is given, others have null; and
with `"encoding": "columns"` the answer is not JSON but the bytes of columns.py.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

from rlhf.config.cut import WHOLE, Cut
from rlhf.rollout import columns
from rlhf.rollout.sampling import Sample, Sampling, seed_of
from transfer.agreement import wire
from transfer.agreement.wire import Refused

COLUMNS = "columns"  # the other encoding is json
MAX_ROWS = 65536  # prompts * n of one message
MIN_TEMPERATURE = 1e-3  # below, logits / temperature may overflow; 0 is greedy


@dataclass(frozen=True, slots=True)
class Limits:
    """What the model can take: ids below `vocabulary`, at most `positions` of prompt and answer (None: any number)."""

    vocabulary: int
    positions: int | None
    stop_ids: tuple[int, ...]  # where a message without stop_token_ids stops


@dataclass(frozen=True, slots=True)
class Request:
    """One checked message."""

    prompts: list[list[int]]
    seeds: list[int]
    sampling: Sampling
    as_columns: bool


def parse(body: Mapping[str, Any], limits: Limits) -> Request:
    """Check a message against the model's limits; Refused 422 names the field."""
    wire.only(dict(body), KNOWN)
    prompts = _prompts(body, limits)
    sampling = Sampling(
        n=_between(body, "n", 1, 1, MAX_ROWS // len(prompts)),
        max_tokens=_max_tokens(body, prompts, limits),
        temperature=_temperature(body),
        stop_ids=tuple(_ids("stop_token_ids", body.get("stop_token_ids", limits.stop_ids), limits)),
        cut=_cut(body),
        firsts=_firsts(body, len(prompts)),
        with_logprobs=_with_logprobs(body, len(prompts) * body.get("n", 1)),
    )
    return Request(prompts, _seeds(body, len(prompts)), sampling, body.get("encoding") == COLUMNS)


def answer(request: Request, samples: Sequence[Sample]) -> dict[str, Any] | bytes:
    """The samples as vLLM's choices, each with the versions of the weights that sampled it, or as columns."""
    for row, sample in enumerate(samples):
        if not request.sampling.wants_logprobs(row):
            sample.logprobs = None
    return columns.encode(samples) if request.as_columns else _choices(request, samples)


def _choices(request: Request, samples: Sequence[Sample]) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "text": "",
            "token_ids": sample.ids.tolist(),
            "logprobs": _logprobs(sample),
            "finish_reason": sample.finish_reason,
            "weight_version": sample.versions[0] if sample.versions else None,
            "weight_versions": [[version, len(list(run))] for version, run in groupby(sample.versions)],
        }
        for index, sample in enumerate(samples)
    ]
    usage = {
        "prompt_tokens": sum(map(len, request.prompts)),
        "completion_tokens": sum(len(sample.ids) for sample in samples),
    }
    return {"choices": choices, "usage": usage}


def _logprobs(sample: Sample) -> dict[str, list[float]] | None:
    return None if sample.logprobs is None else {"token_logprobs": sample.logprobs.tolist()}


def _is_row(value: Any) -> bool:
    return wire.is_int(value) and value < MAX_ROWS


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


KNOWN = {  # field -> is its value of the right type?
    "model": wire.is_str,  # OpenAI clients always name one; there is only one here
    "prompt": lambda value: isinstance(value, list),
    "n": wire.is_int,
    "max_tokens": wire.is_int,
    "temperature": _is_number,
    "top_p": _is_number,
    "top_k": wire.is_int,
    "min_p": _is_number,
    "seed": wire.is_int,
    "seeds": lambda value: isinstance(value, list),
    "firsts": lambda value: isinstance(value, list) and all(map(_is_row, value)),
    "stop_token_ids": lambda value: isinstance(value, list),
    "logprobs": lambda value: value is None or (wire.is_int(value) and value <= 1),  # of the sampled token only
    "logprobs_rows": lambda value: isinstance(value, list) and all(map(_is_row, value)),
    "return_token_ids": lambda value: value is True,  # ids are all that there is
    "encoding": lambda value: value in ("json", COLUMNS),
}


def _prompts(body: Mapping[str, Any], limits: Limits) -> list[list[int]]:
    prompt = body.get("prompt")
    if not prompt:
        raise Refused(422, "body.prompt must be token ids, or a list of lists of token ids, and not empty")
    batch = prompt if isinstance(prompt[0], list) else [prompt]
    if len(batch) > MAX_ROWS:
        raise Refused(422, f"body.prompt has {len(batch)} prompts, at most {MAX_ROWS} are allowed")
    return [_ids(f"prompt[{index}]", ids, limits) for index, ids in enumerate(batch)]


def _ids(field: str, ids: Any, limits: Limits) -> list[int]:
    if not isinstance(ids, list | tuple) or (not ids and field.startswith("prompt")):
        raise Refused(422, f"body.{field} must be a list of token ids, and a prompt has at least one")
    for token in ids:
        if not wire.is_int(token) or token >= limits.vocabulary:
            raise Refused(422, f"body.{field}: {str(token)[:40]!r} is no token id below {limits.vocabulary}")
    return list(ids)


def _between(body: Mapping[str, Any], field: str, default: int, low: int, high: int) -> int:
    value = body.get(field, default)
    if not low <= value <= high:
        raise Refused(422, f"body.{field} must be between {low} and {high} (got {value})")
    return value


def _max_tokens(body: Mapping[str, Any], prompts: list[list[int]], limits: Limits) -> int:
    longest = max(map(len, prompts))
    room = 2**20 if limits.positions is None else limits.positions - longest
    if room < 1:
        raise Refused(422, f"body.prompt: {longest} tokens leave no room in the model's {limits.positions} positions")
    return _between(body, "max_tokens", min(16, room), 1, room)


def _with_logprobs(body: Mapping[str, Any], rows: int) -> frozenset[int]:
    if "logprobs_rows" not in body:
        return frozenset(range(rows) if body.get("logprobs") is not None else ())
    if body.get("logprobs") is None:
        raise Refused(422, "body.logprobs_rows needs body.logprobs beside it")
    chosen = frozenset(body["logprobs_rows"])
    if max(chosen, default=0) >= rows:
        raise Refused(422, f"body.logprobs_rows: {max(chosen)} is no row of the {rows} that are asked for")
    return chosen


def _temperature(body: Mapping[str, Any]) -> float:
    value = body.get("temperature", 1.0)
    if value != 0 and not MIN_TEMPERATURE <= value <= 1000:
        raise Refused(422, f"body.temperature must be 0 (greedy) or between {MIN_TEMPERATURE} and 1000 (got {value})")
    return float(value)


def _cut(body: Mapping[str, Any]) -> Cut:
    cut = Cut(*(body.get(each.name, each.default) for each in fields(Cut)))
    try:
        cut.check("body")
    except ValueError as error:
        raise Refused(422, str(error)) from None
    return cut if _temperature(body) else WHOLE


def _seeds(body: Mapping[str, Any], count: int) -> list[int]:
    if "seeds" not in body:
        seed = body.get("seed", secrets.randbits(63))
        return [seed_of(seed, index) for index in range(count)] if _is_seed(seed) else _no_seed("seed")
    seeds = body["seeds"]
    if "seed" in body or len(seeds) != count:
        raise Refused(
            422, f"body.seeds must have one seed for each of the {count} prompts, without body.seed beside it"
        )
    return seeds if all(map(_is_seed, seeds)) else _no_seed("seeds")


def _firsts(body: Mapping[str, Any], count: int) -> tuple[int, ...] | None:
    firsts = body.get("firsts")
    if firsts is not None and len(firsts) != count:
        raise Refused(422, f"body.firsts must have one number for each of the {count} prompts (got {len(firsts)})")
    return None if firsts is None else tuple(firsts)


def _is_seed(value: Any) -> bool:
    return wire.is_int(value) and value < 2**64


def _no_seed(field: str) -> list[int]:
    raise Refused(422, f"body.{field} must be made of integers from 0 to 2**64 - 1")
