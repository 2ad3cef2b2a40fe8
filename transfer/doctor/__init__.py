"""`python -m transfer.doctor`: what of the weight transfer works on this machine, what does not, why, and what to do.

Each check runs in a process beside this one (runner.py, child.py), with a deadline; a transfer counts as working only
after a real one of 1 MiB, to a real worker, whose live weights then have the right digest.
"""
