"""Conversations of the policy with an environment: each row goes on by itself, as soon as it has been answered.

row.py has one conversation so far, episode.py what it talks to, and loop.py all rows of a step.
"""
