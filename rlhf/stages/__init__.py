"""What comes before RL, or stands in its place: a supervised warm-up, a reward model, DPO on preference pairs.

Each stage is one file with its loss and its loop over batches; none of them samples.
"""
