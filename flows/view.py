"""What a run tells whoever watches it."""

import logging
import time
from collections.abc import Callable
from typing import Protocol

from artifacts.record import Record
from tasks.events import Event, Listener, event_line, part_done

LOG_SECONDS = 10.0
logger = logging.getLogger("cairn.flows")


class View(Protocol):
    """Takes what happens in a run; called from any thread."""

    def listener(self, stage: str) -> Listener:
        """Takes a stage's events."""
        ...

    def finished(self, stage: str, record: Record, reused: bool, seconds: float) -> None:
        """A stage is done."""
        ...


def _to_log(stage: str, line: str) -> None:
    logger.info("%s: %s", stage, line)


class LogView:
    """Tells a run line by line, training every few seconds."""

    def __init__(self, say: Callable[[str, str], None] = _to_log) -> None:
        self._say = say
        self._said: dict[str, float] = {}

    def listener(self, stage: str) -> Listener:
        """Takes a stage's events."""

        def listen(event: Event) -> None:
            line = event_line(event)
            if line is None:
                return
            if part_done(event) is not None:
                if time.monotonic() - self._said.get(stage, -LOG_SECONDS) < LOG_SECONDS:
                    return
                self._said[stage] = time.monotonic()
            self._say(stage, line)

        return listen

    def finished(self, stage: str, record: Record, reused: bool, seconds: float) -> None:
        """A stage is done."""
        self._say(stage, f"{'reused' if reused else f'done in {seconds:.1f} s'}; {record.summary}")
