"""The control plane: how the trainer calls a worker's verbs."""
