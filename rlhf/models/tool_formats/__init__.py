"""How model families write calls of tools: a file each kind of writing, and table.py, which of them there are.

Each reads an answer's text into pieces.py's `Pieces`. What is no call of its form is said in a line, for the policy.
"""
