"""Progress events as JSON objects, so that they pass from a child process to whoever shows them, and as lines."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from artifacts.store import DamagedObject
from common.errors import TransientError, UserError

Event = dict[str, Any]
Listener = Callable[[Event], None]
ENDINGS = ("Done", "UserError", "Failed", "Interrupted")
"""The events one of which is the last of a work."""


def error_event(error: UserError) -> Event:
    """The last event of a work that met an error which the user can mend."""
    kind = next(name for name, of_kind in _KINDS.items() if isinstance(error, of_kind))
    return {"event": "UserError", "kind": kind, "message": str(error)}


def error_of(event: Event) -> UserError:
    """The error that such an event tells of."""
    return _KINDS[event["kind"]](event["message"])


_KINDS: dict[str, type[UserError]] = {"damaged": DamagedObject, "transient": TransientError, "other": UserError}
"""The most special first."""


@dataclass(frozen=True)
class Counted:
    """How far something is that goes on by counting."""

    what: str
    done: int
    total: int
    unit: str
    """What is counted, in the plural."""
    seconds: float
    """Since it began."""


def as_event(event: object) -> Event:
    """A dataclass as an object with its class's name under `event`; such an object as it is."""
    if isinstance(event, dict) and "event" in event:
        return event
    if not is_dataclass(event) or isinstance(event, type):
        raise TypeError(f"{event!r} is no event")
    return {"event": type(event).__name__, **asdict(event)}


def part_done(event: Event) -> tuple[int, int] | None:
    """How much of how much is done, of an event that says so, many of which follow each other."""
    if event["event"] == "Progress":
        return event["step"], event["steps"]
    return (event["done"], event["total"]) if event["event"] == "Counted" else None


def event_line(event: Event) -> str | None:
    """An event in a line; nothing for what people need not see."""
    if event["event"] == "Progress":
        return progress_line(event)
    if event["event"] == "Counted":
        return counted_line(event)
    if event["event"] == "Validation":
        exact = "" if event["exact_match"] is None else f", exact match {event['exact_match']:.2%}"
        preferences = event.get("preferences")
        share = "" if preferences is None else f", accuracy {preferences['accuracy']:.2%}"
        tasks = "".join(f", {score['task']} {score['value']:.1%}" for score in event["tasks"])
        each = ", ".join(f"{source} {loss:.4f}" for source, loss in event["by_source"].items())
        loss = f"{event['loss']:.4f}{f' ({each})' if each else ''}"
        return f"step {event['step']:,}: validation loss {loss}{exact}{share}{tasks}"
    if event["event"] == "Log":
        return str(event["message"])
    if event["event"] == "Note":
        return str(event["text"])
    return None


def counted_line(event: Event) -> str:
    """A count in a line: how many of how many, and time to go."""
    left = event["seconds"] * (event["total"] - event["done"]) / max(1, event["done"])
    minutes, seconds = divmod(round(left), 60)
    return f"{event['what']}: {event['done']:,} of {event['total']:,} {event['unit']}, ETA {minutes}:{seconds:02d}"


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
