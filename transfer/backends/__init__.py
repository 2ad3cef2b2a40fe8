"""How the bytes of a version move: the trainer's half and the worker's half of each backend.

arena.py is `ipc` (its memory: slots.py; of a trainer of several ranks: shards.py), collective.py and
collective_intake.py are `gloo` and `nccl` (over process_group.py; of several ranks: collective_shards.py), disk.py is
`disk` (of several ranks: disk_shards.py), local.py `local` and `handles`. base.py says what a backend is, make.py which
one a configuration names. No backend talks to a worker or decides about versions: the session and the receiver do.
"""
