"""`python -m llama_te_infer.serve.engine_process FD`: the engine's process, which the server's process starts.

FD is the number of the socket's file descriptor.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys


def main() -> int:
    """Run the engine until the server's process ends.

    Returns:
        1: the model could not be loaded, or the GPU has failed.
    """
    # The server's process gets the same signals from a terminal or a supervisor. It finishes the running requests and
    # then closes the connection.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    from .server import EngineServer

    # The thread that steps the engine may wait for a GPU forever, so no more is asked of it.
    server = EngineServer(socket.socket(fileno=int(sys.argv[1])), lambda: os._exit(0))
    loaded = server.load()
    if loaded is not None:
        # What loading has made stays, so the garbage collector need not look at it between steps.
        gc.collect()
        gc.freeze()
        server.run(*loaded)
    return 1


if __name__ == "__main__":
    sys.exit(main())
