"""The child process that an engine's stages run in: `python -m tasks.child EVENTS`, a line of JSON per work on
standard input, a line of JSON per event on the file descriptor EVENTS.

It stays warm between stages, because importing an engine takes seconds. When its parent is gone, standard input ends:
the stage under way then writes its checkpoint and the process exits.
"""

import json
import logging
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any, Protocol

from artifacts.store import Store
from common.errors import StageFailed, UserError
from models.machine import release_memory
from models.training.loop import EXIT_GO_ON_LATER, Interrupted
from tasks.events import Event, as_event, error_event
from tasks.produce import produce
from tasks.work import Work

logger = logging.getLogger("cairn.tasks")


class Channel:
    """Events to the parent, each a line; nothing is said to a parent that is gone."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def send(self, event: dict[str, Any]) -> None:
        """Writes one event; any thread may."""
        line = memoryview(json.dumps(event).encode() + b"\n")
        # Where the parent is gone, the end of standard input stops this process; the stage must not fail before.
        with self._lock, suppress(OSError):
            while line:
                line = line[os.write(self._descriptor, line) :]


class Speaker(Protocol):
    """Who takes events."""

    def send(self, event: dict[str, Any]) -> None:
        """Takes one event, from any thread."""


class Forwarded(logging.Handler):
    """Log messages as events, so that the parent prints them beside its progress bar."""

    def __init__(self, channel: Speaker) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.send({"event": "Log", "level": record.levelname, "message": record.getMessage()})


def main(arguments: list[str]) -> int:
    """Does works until standard input ends."""
    channel = Channel(int(arguments[0]))
    signal.signal(signal.SIGTERM, _raise_interrupted)
    signal.signal(signal.SIGINT, _raise_interrupted)
    logging.getLogger("cairn").addHandler(Forwarded(channel))
    logging.getLogger("cairn").setLevel(logging.INFO)
    _leave_others(os.environ)
    threading.excepthook = say_thread_error
    works: queue.Queue[bytes | None] = queue.Queue()
    working = threading.Event()
    threading.Thread(target=_read_works, args=(works, working), daemon=True).start()
    try:
        while (line := works.get()) is not None:
            working.set()
            ending = _done(Work.model_validate_json(line), channel)
            # First: a parent that has heard of the end may close standard input at once, and means no stop by that.
            working.clear()
            channel.send(ending)
            release_memory()
    except (Interrupted, KeyboardInterrupt):
        working.clear()  # the parent closes standard input at what follows, which is no further signal then
        channel.send({"event": "Interrupted"})
        return EXIT_GO_ON_LATER
    finally:
        for late in (signal.SIGTERM, signal.SIGINT):
            signal.signal(late, signal.SIG_IGN)
    return 0


_MEETING = (
    *("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_LOCAL_DEVICE_IDS"),
    *("MLX_RANK", "MLX_HOSTFILE"),
)
"""What tells an engine of other processes that it is to wait for."""


def _leave_others(environment: MutableMapping[str, str]) -> None:
    """Drops what a cluster has set to let processes meet: a stage starts its own, on this machine."""
    found = [name for name in _MEETING if environment.pop(name, None) is not None]
    if found:
        logger.warning(
            "%s in the environment is ignored: a stage starts its processes itself, on one machine, as `layout` says",
            ", ".join(found),
        )


def _raise_interrupted(number: int, frame: object) -> None:
    # Once is enough: a second one would come up in the middle of the ending. Not SIG_IGN: Python says with a traceback
    # that it ignores a signal which came in the same moment.
    for stopping in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stopping, lambda number, frame: None)
    raise KeyboardInterrupt(signal.Signals(number).name)


def say_thread_error(error: threading.ExceptHookArgs) -> None:
    """A full disk in a log writer's thread is a line: the writer raises it again in the stage, which explains it."""
    if isinstance(error.exc_value, OSError):
        logger.warning("%s", error.exc_value)
    else:
        threading.__excepthook__(error)


def _read_works(works: "queue.Queue[bytes | None]", working: threading.Event) -> None:
    rest = b""
    # Not `sys.stdin`: Python aborts where a thread still holds its lock at the end.
    while chunk := os.read(0, 1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            works.put(line)
    works.put(None)
    if working.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


def _done(work: Work, channel: Channel) -> Event:
    """Does a work; gives the event that tells how it ended."""
    store = Store.open(work.store)
    try:
        outcome = produce(store, work, lambda event: channel.send(as_event(event)))
    except UserError as error:
        return error_event(error)
    except (Interrupted, KeyboardInterrupt):
        raise
    except StageFailed as error:
        # It brings what is to be read of the process that failed.
        return {"event": "Failed", "traceback": str(error)}
    except Exception:
        return {"event": "Failed", "traceback": traceback.format_exc()}
    return {"event": "Done", "key": outcome.record.key, "reused": outcome.reused}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
