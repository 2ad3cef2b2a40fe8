"""What the runs that sample ahead have in common."""

SMALL = (
    *("experiment=smoke", "logger=jsonl", "task.held_out=16", "task.prompts=256", "sft.steps=10", "prompts_per_step=4"),
    *("checkpoint.every=1", "algo.correction=tis"),
)
