"""Before a run: whether task, model and lengths fit, what it will need and write.

Everything here ends in a refusal of one line, a note or a table; nothing is trained and nothing stays.
"""
