"""RLHF: sample, score, learn, hand the weights over; repeat."""

__version__ = "0.3.0"
