"""What a shell sees of every command: signals, exit codes, locks on folders, the screen, Hydra's search path.

The lowest floor of the harness: it imports nothing else of it, and nothing heavy.
"""
