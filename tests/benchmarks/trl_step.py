"""Times GRPOTrainer steps of TRL on a checkpoint and prompts; compare_trl.py runs it in TRL's environment.

Arguments: checkpoint folder, prompts file (JSON lines of prompt and answer), number of steps, and JSON of GRPOConfig
settings; prints one JSON line: the seconds of each step, and the mean reward of each.
"""

import json
import sys
import tempfile
import time

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

torch.set_num_threads(1)


class Clock(TrainerCallback):
    """Wall time between the ends of steps."""

    def __init__(self):
        self.seconds = []
        self.last = None

    def on_step_begin(self, args, state, control, **kwargs):
        if self.last is None:
            self.last = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.monotonic()
        self.seconds.append(now - self.last)
        self.last = now


def exact_match(completions, answer, **_):
    return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]


def main(checkpoint, prompts, steps, settings):
    settings = json.loads(settings)
    dtype = torch.bfloat16 if settings.pop("model_bf16") else torch.float32
    attention = settings.pop("attention")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, attn_implementation=attention)
    with open(prompts) as file:
        data = Dataset.from_list([json.loads(line) for line in file])
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=256,
            num_generations=8,
            max_completion_length=8,
            max_steps=int(steps),
            learning_rate=1e-4,
            beta=0.0,
            temperature=1.0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
            **settings,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=exact_match,
            args=config,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(checkpoint),
            callbacks=[clock],
        )
        trainer.train()
        rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
        lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "reward" in row]
    print(json.dumps({"seconds": clock.seconds, "rewards": rewards, "lengths": lengths}))


if __name__ == "__main__":
    main(*sys.argv[1:])
