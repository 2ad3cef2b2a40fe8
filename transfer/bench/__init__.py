"""`python -m transfer.bench`: every way to move a model's weights to another process, timed side by side in one run.

memcpy          the limit: the same bytes into memory that is there already
ours            make_transfer with every backend, staging, take and sender
peers           the one-shot API, torch's shared tensors, Ray's object store, HTTP, gloo, a file in /dev/shm

`--device cuda` does the same between GPUs: gpu_measure.py, with the peers in gpu_peers.py.
"""
