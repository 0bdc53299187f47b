"""What a run tells whoever watches it."""

import logging
import time
from collections.abc import Callable
from typing import Protocol

from artifacts.record import Record
from tasks.events import Event, Listener

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
            if event["event"] == "Progress":
                if time.monotonic() - self._said.get(stage, -LOG_SECONDS) < LOG_SECONDS:
                    return
                self._said[stage] = time.monotonic()
            self._say(stage, line)

        return listen

    def finished(self, stage: str, record: Record, reused: bool, seconds: float) -> None:
        """A stage is done."""
        self._say(stage, f"{'reused' if reused else f'done in {seconds:.1f} s'}; {record.summary}")


def event_line(event: Event) -> str | None:
    """An event in a line; nothing for what people need not see."""
    if event["event"] == "Progress":
        return progress_line(event)
    if event["event"] == "Validation":
        exact = "" if event["exact_match"] is None else f", exact match {event['exact_match']:.2%}"
        each = ", ".join(f"{source} {loss:.4f}" for source, loss in event["by_source"].items())
        return f"step {event['step']:,}: validation loss {event['loss']:.4f}{f' ({each})' if each else ''}{exact}"
    if event["event"] == "Log":
        return str(event["message"])
    if event["event"] == "Note":
        return str(event["text"])
    return None


def progress_line(event: Event) -> str:
    """A training step in a line: step, loss, tokens/s, utilisation or FLOP/s, time to go."""
    loss = "—" if event["loss"] is None else f"{event['loss']:.4f}"
    speed = f"MFU {event['mfu']:.1%}" if event["mfu"] is not None else f"{_short(event['flops_per_second'])}FLOP/s"
    minutes, seconds = divmod(round(event["eta_seconds"]), 60)
    return (
        f"step {event['step']:,}/{event['steps']:,}  loss {loss}  {_short(event['tokens_per_second'])}tokens/s  "
        f"{speed}  ETA {minutes}:{seconds:02d}"
    )


def _short(number: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number:.0f} "
