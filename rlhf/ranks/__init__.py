"""The ranks of a trainer: processes that run the same program, each on its share of a step's micro-batches.

The first rank alone speaks with the outside (workers, rewards, files, signals) and tells the others what it has heard,
errors too. How ranks find each other, talk, and notice that one is gone lives here; what they compute never does.
"""
