"""Environments as people write them: classes with tools, or with reset and step; their instances in another process.

factory.py says what a class is, host.py is the process with its instances, hosts.py asks it, and dialogue.py has the
tokens of what an environment says. tools.py and played.py are the two kinds of episode.
"""
