"""What a run is put together from: its folder, task, policy, workers and rewards, in the order of run.py's story.

Parts are chosen and connected here and nowhere else; none of them is implemented here.
"""
