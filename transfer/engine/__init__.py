"""One call in place of a session: vLLM's weight-transfer engine, with weights as IPC handles in one message.

It sends and reads handles, and unpickles only what the format needs. It knows no versions, no epochs and no journal.
"""
