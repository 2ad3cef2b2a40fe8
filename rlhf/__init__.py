"""RLHF: sample, score, learn, hand the weights over; repeat."""
