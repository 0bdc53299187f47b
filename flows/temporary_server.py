"""Prefect's server for one run: `python -m flows.temporary_server` serves until standard input ends.

Prefect can start such a server itself, but that one outlives a killed parent for good (195 MB and its hold on the
terminal), and a Ctrl-C reaches it before the run that needs it. This one takes half as long to start, too.
"""

import os
import signal
import socket
import threading
import time
from typing import TextIO

import uvicorn
from prefect.server.api.server import create_app

GRACE_SECONDS = 5.0


def main() -> None:
    """Serves on a free port of the loopback interface."""
    output = os.fdopen(os.dup(1), "w")
    # Whatever else prints must not come before the port.
    os.dup2(2, 1)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(create_app, factory=True, log_level="error", lifespan="on", timeout_graceful_shutdown=2)
    _Server(config, output).run([listening])


class _Server(uvicorn.Server):
    """Says its port when it is ready."""

    def __init__(self, config: uvicorn.Config, output: TextIO) -> None:
        super().__init__(config)
        self._output = output

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            print(sockets[0].getsockname()[1], file=self._output, flush=True)


def _end_with_the_parent() -> None:
    while os.read(0, 1):
        """Nothing is ever written: the read ends when the parent has gone, however it went."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
