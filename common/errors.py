"""The one kind of error that is shown to people as a single line."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can mend: one clear line that says what, where, and what to do.

    Everything else is a defect of Cairn or of the machine and keeps its traceback.
    """


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """A `; did you mean …?` for the nearest of `known`, or all of them when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known are: {', '.join(names)}" if names else ""
