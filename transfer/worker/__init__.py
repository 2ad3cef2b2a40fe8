"""The worker's half: takes updates into a module, and serves it over HTTP or as a Ray actor, in a process of its own.

Nothing here samples: an engine of the harness, or vLLM, is handed in.
"""
