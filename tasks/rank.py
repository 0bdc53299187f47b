"""One of the processes that a training stage is done in: `python -m tasks.rank SOCKET NUMBER`.

It connects to the stage's own process (`tasks.ranks`), does the stage with its engine, says how it ended, and then
stays until that process closes the connection: JAX takes one that leaves before the others for one that has crashed.
It ends at once where that process is gone: then nobody holds the stage's lease for it.
"""

import json
import logging
import os
import socket
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from artifacts.errors import full_disk_explained
from artifacts.store import Store
from common.errors import UserError
from models.training.loop import Interrupted
from tasks.child import Forwarded, say_thread_error
from tasks.events import as_event, error_event
from tasks.produce import run_stage
from tasks.work import Work


class _Line:
    """The connection to the stage's own process."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        self._lines = self._socket.makefile("rb")
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._listening = threading.Thread(target=self._heed, daemon=True)
        self._ended = False

    def send(self, event: dict[str, Any]) -> None:
        """Says one thing; any thread may."""
        with self._lock, suppress(OSError):  # where nobody listens any more, `_heed` ends this process
            self._send(event)

    def end(self, event: dict[str, Any]) -> NoReturn:
        """Says the last thing, and ends this process when the other end is closed."""
        with self._lock, suppress(OSError):
            self._send(event)
            self._ended = True
        sys.stdout.flush()
        sys.stderr.flush()
        self._listening.join()
        raise AssertionError("`_heed` ends the process")

    def _send(self, event: dict[str, Any]) -> None:
        self._socket.sendall(json.dumps(event).encode() + b"\n")

    def job(self) -> dict[str, Any]:
        """What there is to do; from then on it is listened for the wish to stop."""
        found: dict[str, Any] = json.loads(self._lines.readline() or sys.exit(1))
        self._listening.start()
        return found

    def should_stop(self) -> bool:
        return self._stopping.is_set()

    def _heed(self) -> None:
        for _ in self._lines:
            self._stopping.set()
        with self._lock:
            # Nothing is to be taken down in order: the others may be gone already, and some libraries would wait for
            # them.
            os._exit(0 if self._ended else 1)


def main(address: str, number: int) -> None:
    """Does the one job."""
    # Standard input is the stage's own; nothing of it is meant for this process.
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    line = _Line(address)
    line.send({"event": "Here", "number": number})
    # Each would say the same.
    logging.getLogger("cairn").addHandler(logging.NullHandler() if number else Forwarded(line))
    logging.getLogger("cairn").setLevel(logging.INFO)
    logging.getLogger("cairn").propagate = False
    threading.excepthook = say_thread_error
    line.end(_ending(line.job(), line, number))


def _ending(job: dict[str, Any], line: _Line, number: int) -> dict[str, Any]:
    work = Work.model_validate(job["work"])

    def report(event: object) -> None:
        if not number:  # each would say the same
            line.send(as_event(event))

    try:
        output = Path(job["output"])
        with full_disk_explained(output):
            metrics = run_stage(Store.open(work.store), work, output, Path(job["logs"]), report, line.should_stop)
    except UserError as error:
        return error_event(error)
    except Interrupted as interrupted:
        return {"event": "Interrupted", "step": interrupted.step}
    except Exception:
        return {"event": "Failed", "traceback": traceback.format_exc()}
    return {"event": "Done", "metrics": metrics if number == 0 else {}}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
