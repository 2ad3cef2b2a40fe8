"""A run's state on the disk: folders that are whole or not there, what is in them, and when they are written.

state.py is what parts give and take back, whose meaning is theirs; whole.py does the same for folders like `policy/`.
"""
