"""Samples of the steps to come, drawn while the trainer learns (`rollout.ahead`).

exact.py has the samples of the next step, in an order that is the same in every run. free.py has a queue: groups are
learned from as they come, and slots.py says which may be drawn and which are learned from. kept.py writes both into
checkpoints. How samples are drawn and rewarded is gather.py's; nothing here knows how weights travel.
"""
