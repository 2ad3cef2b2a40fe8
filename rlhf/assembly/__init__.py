"""What a run is put together from, in the order of run.py's story: folder, matter, parts, trainer, outcome.

Parts are chosen and connected here and nowhere else; none of them is implemented here.
"""
