"""How things end that do not end well."""

import difflib
from collections.abc import Iterable

_LINE = 300
"""Letters of a library's message that there is room for in a line."""


class UserError(Exception):
    """An error that the user can mend: one clear line that says what, where, and what to do.

    Everything else is a defect of Cairn or of the machine and keeps its traceback.
    """


class TransientError(UserError):
    """An error that time may mend, such as a store out of reach: worth another try before the user looks."""


class StageInterrupted(Exception):
    """A stage was told to stop; what it has saved is used when it is run again."""


class StageFailed(Exception):
    """A stage failed with a traceback, which the message has, or its process died."""


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """A `; did you mean …?` for the nearest of `known`, or all of them when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known are: {', '.join(names)}" if names else ""


def one_line(error: Exception) -> str:
    """What went wrong underneath, in a line of no more than 300 letters: without the advice that a library wraps it
    in."""
    first = error.__cause__ or error
    return " ".join(str(first).split())[:_LINE] or type(first).__name__
