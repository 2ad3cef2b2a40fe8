"""What `from rlhf import compose, train` gives a Python program: the run of run.py, with objects of the program's own.

Nothing of a run is done here: a program's objects are handed to it, and what it changes of the process is put back.
"""
