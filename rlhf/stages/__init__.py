"""What comes before RL, or stands in its place: a supervised warm-up, a reward model, DPO on preference pairs.

Each stage is one file with its loop over batches; losses that have a name in the literature are in learning/losses.py.
"""
