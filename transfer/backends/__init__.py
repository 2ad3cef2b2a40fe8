"""How the bytes of a version move: a file a backend, the trainer's half and the worker's half side by side.

base.py says what a backend is, make.py which one a configuration names. No backend talks to a worker or decides about
versions: the session and the receiver do.
"""
