"""From samples and their rewards to new weights: the learner, and the mathematics that it is made of.

Advantages, losses and corrections are pure functions; how sequences pass through a model (padded, packed, recomputed,
compiled) is chosen in pass_choice.py. Nothing here samples, gives rewards or moves weights.
"""
