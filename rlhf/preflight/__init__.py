"""Before a run: what it will need and write, and whether it fits."""
