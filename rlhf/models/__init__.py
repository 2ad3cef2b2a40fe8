"""Policies, reward models, critics and tokenizers: made small, loaded from folders or the hub, adapted, saved.

What a model means by its stop tokens, cache and chat template is asked here; nothing here learns or samples.
"""
