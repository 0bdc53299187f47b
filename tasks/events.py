"""Progress events as JSON objects, so that they pass from a child process to whoever shows them."""

from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any

Event = dict[str, Any]
Listener = Callable[[Event], None]
ENDINGS = ("Done", "UserError", "Failed", "Interrupted")
"""The events one of which is the last of a work."""


def as_event(event: object) -> Event:
    """A dataclass as an object with its class's name under `event`; such an object as it is."""
    if isinstance(event, dict) and "event" in event:
        return event
    if not is_dataclass(event) or isinstance(event, type):
        raise TypeError(f"{event!r} is no event")
    return {"event": type(event).__name__, **asdict(event)}
