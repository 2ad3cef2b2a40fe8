"""`/v1/completions` of an unmodified vLLM server, in the form of our own worker: token ids in, ids and log-probs out.

What 0.24 and 0.32 do, from their code, and of 0.32 tried:

- `return_token_ids` gives `token_ids` in each choice, with the stop token that ended it as the last.
- `logprobs: 0` is the sampled token's alone (1 would add the likeliest token's), in `logprobs.token_logprobs`, never
  below -9999. By `--logprobs-mode raw_logprobs`, the default, it is the log-softmax of the model's logits *before* the
  temperature; `processed_logprobs` is that of the distribution that was sampled from.
- Whatever a request leaves out (top_p, top_k, min_p, penalties, temperature) comes from the model's
  generation_config.json, so every one is told. Unknown fields are ignored.
- A sample also ends at the end-of-sequence tokens of the model and of generation_config.json, unless `ignore_eos`;
  `stop_token_ids` count all the same.
- `seed` is a signed 64-bit number, sample j of a prompt gets seed + j, and every prompt of a batch gets the same: so a
  prompt is a request of its own here. The random numbers are vLLM's, other than our worker's, and so are the samples.
- `n` above 1 with temperature 0 is refused: one sample is taken and given n times.
- There is no weight version in the answer (0.32 has it in /inference/v1/generate only).
- A paused server answers when it is resumed: requests queue (0.33: 503). Those that a pause cut short end with "abort".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transfer.agreement.shown import shown
from transfer.agreement.wire import MAX_LOGPROB, RemoteError
from transfer.vllm.stock_routes import Routes

CONNECTIONS = 128  # at once; each carries one prompt's n samples
MAX_ID = 2**31  # of a token
REASONS = ("stop", "length", "abort")
SEEDS = 2**62  # vLLM adds the sample's index, and the sum must stay below 2**63
PLAIN = {  # the model's own distribution, whatever its generation_config.json says
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": True,  # stop_token_ids are all that ends a sample
}
CUTS = ("top_p", "top_k", "min_p")


def complete(routes: Routes, body: Mapping[str, Any], timeout_s: float) -> list[dict[str, Any]]:
    """The choices, ordered, n a prompt, without versions, for a message like our worker's; RemoteError.

    `body` has prompt (lists of ids), seeds (one a prompt), n, max_tokens, temperature and stop_token_ids, and may have
    top_p, top_k and min_p.
    """
    requests = [_request(body, prompt, seed) for prompt, seed in zip(body["prompt"], body["seeds"], strict=True)]
    pool = ThreadPoolExecutor(max(1, min(len(requests), CONNECTIONS)), thread_name_prefix="completions")
    try:
        answers = list(pool.map(lambda request: _choices(routes, request, timeout_s), requests))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after a failure, do not wait for the others
    choices = [choice for answer in answers for choice in answer * (body["n"] // len(answer))]
    return [{**choice, "index": index} for index, choice in enumerate(choices)]


def _request(body: Mapping[str, Any], prompt: Sequence[int], seed: int) -> dict[str, Any]:
    greedy = body["temperature"] == 0
    return {
        **PLAIN,
        **{name: body[name] for name in CUTS if name in body},
        "prompt": list(prompt),
        "seed": seed % SEEDS,
        "n": 1 if greedy else body["n"],
        "max_tokens": body["max_tokens"],
        "temperature": body["temperature"],
        "stop_token_ids": list(body["stop_token_ids"]),
        "logprobs": 0,
        "return_token_ids": True,
    }


def _choices(routes: Routes, request: Mapping[str, Any], timeout_s: float) -> list[dict[str, Any]]:
    answer = routes.post("/v1/completions", request, timeout_s)
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if [choice["index"] for choice in choices] != list(range(request["n"])):
            raise ValueError(f"{len(choices)} choices where {request['n']} were asked for")
        return [_choice(choice, request["max_tokens"]) for choice in choices]
    except (KeyError, TypeError, ValueError) as error:
        raise RemoteError(routes.name, "v1/completions", 0, f"the answer makes no sense: {error!r}") from None


def _choice(choice: Mapping[str, Any], max_tokens: int) -> dict[str, Any]:
    """One sample; ValueError, TypeError or KeyError unless all of it is what a sampler can have said."""
    ids, reason = choice["token_ids"], choice["finish_reason"]
    logprobs = choice["logprobs"]["token_logprobs"] if ids else []
    if not isinstance(ids, list) or not isinstance(logprobs, list) or len(logprobs) != len(ids):
        raise ValueError("token_ids and token_logprobs are not two lists of one length")
    if len(ids) > max_tokens:
        raise ValueError(f"{len(ids)} tokens where {max_tokens} were asked for")
    for token, logprob in zip(ids, logprobs, strict=True):
        if type(token) is not int or not 0 <= token < MAX_ID:
            raise ValueError(f"{shown(token)} is no token id")
        if type(logprob) not in (int, float) or not -math.inf < logprob <= MAX_LOGPROB:
            raise ValueError(f"{shown(logprob)} is no log-prob")
    if reason not in REASONS:
        raise ValueError(f"finish_reason is {shown(reason)}, not one of {', '.join(REASONS)}")
    return {"token_ids": ids, "logprobs": {"token_logprobs": logprobs}, "finish_reason": reason}
