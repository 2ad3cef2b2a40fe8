"""Memory that two processes see, and what is done with bytes where they lie: copied, digested, searched for NaN.

On the host and on GPUs alike. Nothing here knows of versions, workers or messages.
"""
