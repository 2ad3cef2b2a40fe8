"""vLLM and its weights: our engine inside of it (plugin.py), and servers that know nothing of us (stock.py)."""
