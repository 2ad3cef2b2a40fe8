"""Programs of users, a process a row, that are sampled through the endpoint of rlhf/gateway and tell their own reward.

task.py reads the rows, environment.py is what a run knows of the program, loop.py has all rows of a step, process.py
one row's process, and guard.py ends the processes of a run that was killed.
"""
