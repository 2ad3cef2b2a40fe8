"""What trainer and worker hold each other to: messages, versions and epochs, the manifest, the journal.

Standard library, and torch for the dtypes of the manifest. No sockets, no processes, no memory: here it is decided,
elsewhere it is done.
"""
