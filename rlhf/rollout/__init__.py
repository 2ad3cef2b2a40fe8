"""Sampling: workers (processes, Ray actors, vLLM servers) with engines of their own, and the client that asks them.

Rewards, losses and optimizers never enter: a worker knows prompts, tokens and versions of weights.
"""
