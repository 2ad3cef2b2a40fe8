"""How the bytes of a version move: the trainer's half and the worker's half of each backend in one file.

arena.py is `ipc` (its memory: slots.py; of a trainer of several ranks: shards.py), collective.py `gloo` and `nccl`
(over process_group.py), disk.py `disk`, local.py `local` and `handles`. base.py says what a backend is, make.py which
one a configuration names. No backend talks to a worker or decides about versions: the session and the receiver do.
"""
