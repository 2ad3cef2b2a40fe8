"""A run from Python: rows and a reward of one's own, then the policy that came out of it, with two rewards.

    python examples/train_from_python.py [FOLDER]

Half a minute on two CPU cores. The same cells run in a notebook; docs/python.md says what each argument may be.
"""

import random
import sys
from itertools import pairwise
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import rlhf

random.seed(0)
WORDS = ["".join(random.choices("abcd", k=random.randint(3, 5))) for _ in range(600)]
ROWS = [{"prompt": f"{word}=", "answer": "".join(sorted(word))} for word in dict.fromkeys(WORDS)]


def in_order(prompts: list[str], completions: list[str], **columns: list[str]) -> list[float]:
    """The share of neighbouring letters that are in order."""
    pairs = [list(pairwise(text)) for text in completions]
    return [sum(a <= b for a, b in each) / max(1, len(each)) for each in pairs]


def right_length(completions: list[str], answer: list[str], **columns: list[str]) -> list[float]:
    """1 where an answer has as many letters as the right one; in the form that TRL calls."""
    return [float(len(text) == len(right)) for text, right in zip(completions, answer, strict=True)]


folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/from_python")

# The configuration's own small model learns from these rows, and is rewarded by a function.
config = rlhf.compose(["experiment=smoke", "task=given"], steps=30, task={"held_out": 32})
first = rlhf.train(config, folder=folder / "first", data=ROWS, rewards=in_order)
print(first)

# A model and a tokenizer that are here already; it is trained in place. Both rewards are added up by their weights.
model = AutoModelForCausalLM.from_pretrained(first.policy_folder)
tokenizer = AutoTokenizer.from_pretrained(first.policy_folder)
config = rlhf.compose(["experiment=smoke", "task=given"], steps=30, sft={"steps": 0}, task={"held_out": 32})
second = rlhf.train(
    config,
    folder=folder / "second",
    policy=model,
    tokenizer=tokenizer,
    data=ROWS,
    rewards={in_order: 0.5, right_length: 1.0},
)
print(second)
print(f"reward of {len(second.metrics)} rows of metrics: {second.summary['reward_end']:.3f}")

inputs = tokenizer("dbca=", return_tensors="pt", add_special_tokens=False)
answer = model.generate(input_ids=inputs["input_ids"], max_new_tokens=6, do_sample=False)[0, 5:]
print(f"dbca= -> {tokenizer.decode(answer, skip_special_tokens=True)}")
