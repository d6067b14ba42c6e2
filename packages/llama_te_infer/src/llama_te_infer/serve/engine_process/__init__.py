"""The engine in a process of its own, so that HTTP, JSON and tokenizing never hold the GIL of the thread that steps it.

The server's process starts the engine's process and speaks with it over a pair of sockets. The engine's process ends
when the other end of its socket is closed, in whatever way the server's process has ended.
"""
