"""What trainer and worker hold each other to: messages and their routes, versions, manifest, journal.

shown.py prints what others sent.

Standard library, and torch for the dtypes of the manifest. No sockets, no processes, no shared memory: here it is
decided, elsewhere it is done.
"""
