"""TRL's GRPOTrainer with colocated vLLM on the same work; all variants share one vLLM, so that it starts once.

python -m tests.benchmarks.trl_gpu.trl_trainer FOLDER ROW [ROW ...]     rows: those of VARIANTS

Prompts come in the order of the file, which is the order of ours. Times are those between the ends of steps, with the
GPU synchronised; the trainer's memory is what is allocated beyond what vLLM took.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoTokenizer, TrainerCallback

from tests.benchmarks.trl_gpu.common import (
    DEFAULTS,
    GIB,
    LIGER,
    TUNED,
    GpuMemory,
    counted,
    median,
    most_allocated,
    reward,
    say,
    synchronise,
    work_of,
)
from tests.benchmarks.trl_gpu.shapes import Site

Settings = dict[str, Any]


def variants(site: Site) -> dict[str, Settings]:
    """What differs between the rows: the dtype of weights, the number of steps, and settings of GRPOConfig."""
    shape = site.shape
    tuned = dict(vllm_importance_sampling_correction=False, generation_kwargs={"detokenize": False})
    tuned |= dict(gradient_checkpointing=False)
    return {
        TUNED: dict(tuned, dtype="bfloat16", steps=site.steps, per_device_train_batch_size=shape.trl_rows),
        LIGER: dict(tuned, dtype="bfloat16", steps=site.steps, per_device_train_batch_size=shape.liger_rows)
        | dict(use_liger_kernel=True),
        DEFAULTS: dict(dtype="float32", steps=min(site.steps, 2), per_device_train_batch_size=min(8, shape.rows))
        | dict(gradient_checkpointing=True),
    }


@dataclass(slots=True)
class SharedLlm:
    """vLLM's LLM as TRL makes it, made once."""

    make: Callable[..., Any]
    llm: Any = None
    start: float | None = None  # seconds, until they are told
    gib: float = 0.0

    def __call__(self, **settings: Any) -> Any:
        """The LLM."""
        if self.llm is None:
            before, began = torch.cuda.memory_allocated(), time.perf_counter()
            self.llm = self.make(**settings)
            self.start = time.perf_counter() - began
            self.gib = (torch.cuda.memory_allocated() - before) / GIB
        return self.llm


@dataclass
class Watch(TrainerCallback):
    """Seconds of each step and of its parts, and what was sampled."""

    steps: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    sampled: list[tuple[list[list[int]], int]] = field(default_factory=list)  # prompts, and how many tokens
    _now: dict[str, float] = field(default_factory=dict)
    _last: float | None = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Of the first step, the clock starts."""
        if self._last is None:
            synchronise()
            self._last = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The step is done."""
        synchronise()
        now = time.perf_counter()
        assert self._last is not None
        self.steps.append(now - self._last)
        self.parts.append(self._now)
        self._last, self._now = now, {}

    def around(self, thing: Any, name: str, part: str) -> None:
        """Time a method."""
        inner = getattr(thing, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronise()
            began = time.perf_counter()
            out = inner(*args, **kwargs)
            synchronise()
            self._now[part] = self._now.get(part, 0.0) + time.perf_counter() - began
            if part == "sample":
                self.sampled.append((kwargs["prompts"], sum(map(len, out[1]))))
            return out

        setattr(thing, name, timed)

    def part(self, name: str) -> float:
        """The median over the steps that count."""
        return median([parts.get(name, 0.0) for parts in counted(self.parts)]) or 0.0


def main(folder: str, *rows: str) -> None:
    """Measure the rows, one after the other; one that fails says why."""
    from datasets import Dataset
    from trl.generation import vllm_generation

    site = Site.read(folder)
    data = Dataset.from_list([{"prompt": line["prompt"]} for line in site.lines()])
    vllm_generation.LLM = shared = SharedLlm(vllm_generation.LLM)
    for row in rows:
        try:
            alone()
            measure(row, site, data, shared, variants(site)[row])
        except Exception as error:  # the next row may fit
            traceback.print_exc()
            say(row, error=f"{type(error).__name__}: {error}"[:300])
        gc.collect()
        torch.cuda.empty_cache()


def alone() -> None:
    """Forget what the last trainer and vLLM have set, or the next trainer wraps its model into DDP."""
    from accelerate.state import AcceleratorState

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    AcceleratorState._reset_state(reset_partial_state=True)


def measure(row: str, site: Site, data: Any, shared: SharedLlm, settings: Settings) -> None:
    """Train for some steps, and say what they took."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder, GpuMemory() as memory:
        trainer = trainer_of(site, data, settings, folder, watch)
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        peak = most_allocated()
    step, scored = median(counted(watch.steps)), watch.part("generate and score")
    assert step is not None and peak is not None
    say(
        row,
        step=step,
        sample=watch.part("sample"),
        learn=step - scored,
        transfer=watch.part("transfer"),
        steps=[round(seconds, 3) for seconds in watch.steps],
        trainer_gib=peak - shared.gib,
        gpu_gib=memory.peak,
        start=shared.start,
        work=[work_of(prompts, tokens) for prompts, tokens in watch.sampled],
    )
    shared.start = None
    trainer.vllm_generation.llm = None
    trainer.accelerator.free_memory()


def trainer_of(site: Site, data: Any, settings: Settings, folder: str, watch: Watch) -> Any:
    """A trainer whose parts are timed."""
    from trl import GRPOTrainer

    trainer = GRPOTrainer(
        model=str(site.model),
        reward_funcs=reward,
        args=_config(site, dict(settings), folder),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(site.model),
        callbacks=[watch],
    )
    watch.around(trainer.vllm_generation, "generate", "sample")
    watch.around(trainer.vllm_generation, "sync_weights", "transfer")
    watch.around(trainer, "_generate_and_score_completions", "generate and score")
    return trainer


def _config(site: Site, settings: Settings, folder: str) -> Any:
    from trl import GRPOConfig

    shape, dtype, steps = site.shape, settings.pop("dtype"), settings.pop("steps")
    return GRPOConfig(
        output_dir=folder,
        gradient_accumulation_steps=shape.rows // settings["per_device_train_batch_size"],
        num_generations=shape.group,
        max_completion_length=shape.new,
        max_steps=steps,
        shuffle_dataset=False,
        learning_rate=1e-6,
        beta=0.0,
        temperature=1.0,
        loss_type="grpo",
        bf16=True,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=shape.share,
        vllm_max_model_length=shape.longest,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        seed=0,
        model_init_kwargs={"dtype": dtype, "attn_implementation": "sdpa"},
        **settings,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
