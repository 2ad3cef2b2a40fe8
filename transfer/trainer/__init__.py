"""The trainer's half: a session that carries versions to all workers, and the senders that reach them.

What a worker answers is checked here before it is used. No bytes of weights move here: backends do that.
"""
