"""Memory that two processes see, and what is done with bytes where they lie: copied, digested, searched for NaN.

On the host and on GPUs alike. Nothing here decides about versions or knows a message; mark.py
only writes down the number that it is given.
"""
