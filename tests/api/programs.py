"""What a program gives a run of two steps, and the words of the run."""

from __future__ import annotations

ROWS = [{"prompt": f"say {number}", "answer": str(number)} for number in range(24)]
SMALL = (
    "experiment=smoke", "steps=2", "transfer=local", "logger=[]", "task=given", "task.held_out=4",
    "sft.steps=0", "prompts_per_step=4", "samples_per_prompt=2", "rollout.max_new_tokens=4", "checkpoint.every=1",
)  # fmt: skip


def brevity(prompts, completions, **columns):
    """Short answers."""
    return [-float(len(text)) for text in completions]
