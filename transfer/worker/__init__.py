"""The worker's half: takes updates into a module, and serves it over HTTP from a process of its own.

Nothing here samples: an engine of the harness, or vLLM, is handed in. The harness makes Ray actors of the same verbs;
ray_start.py gets into a Ray.
"""
