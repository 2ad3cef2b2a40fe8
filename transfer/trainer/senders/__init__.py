"""The control plane: how the trainer calls a worker's verbs.

A file a way (a call, HTTP, Ray); none of them knows what a verb means.
"""
