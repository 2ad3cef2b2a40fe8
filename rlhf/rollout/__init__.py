"""Sampling: worker processes with engines of their own (transformers or vLLM), and the client that asks them.

Rewards, losses and optimizers never enter: a worker knows prompts, tokens and versions of weights.
"""
