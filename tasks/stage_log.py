"""A stage's log as a file among what hangs on its record, so that it is read where the artifact is."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tasks.events import as_event, event_line, part_done

NAME = "stage.log"
_PROGRESS_SECONDS = 10.0


@contextmanager
def stage_log(folder: Path, report: Callable[[object], None]) -> Iterator[Callable[[object], None]]:
    """Writes what a stage tells and logs to `stage.log` in a folder, after what an interrupted start wrote there.

    Gives what takes events in place of `report`, which still gets them all.
    """
    log = _Log(folder / NAME)
    cairn = logging.getLogger("cairn")
    # Stages beside this one in threads log here too: their messages say whose they are.
    cairn.addHandler(log)
    try:
        yield lambda event: log.tell(event, report)
    except BaseException as error:
        log.say(logging.ERROR, f"{type(error).__name__}: {error}")
        raise
    finally:
        cairn.removeHandler(log)
        with suppress(OSError):
            log.close()


class _Log(logging.FileHandler):
    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        formatter = logging.Formatter("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        formatter.converter = time.gmtime
        self.setFormatter(formatter)
        self._said = -_PROGRESS_SECONDS

    def handleError(self, record: logging.LogRecord) -> None:
        """A disk that takes no line stops no stage by that; what the stage itself cannot write does."""
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)

    def say(self, level: int, line: str) -> None:
        self.handle(logging.LogRecord("cairn", level, "", 0, line, None, None))

    def tell(self, event: object, report: Callable[[object], None]) -> None:
        known = as_event(event)
        line = event_line(known)
        part = part_done(known)
        if part is not None and part[0] < part[1]:
            if time.monotonic() - self._said < _PROGRESS_SECONDS:
                line = None
            else:
                self._said = time.monotonic()
        if line is not None:
            self.say(logging.INFO, line)
        report(event)
