"""The kinds of answer that a question may have, and what each says of a right one."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Discriminator, Field, JsonValue, Tag, model_validator

from common.config import FrozenModel
from tasks.asking.words import normalised


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from error
    return pattern


def _says_something(text: str) -> str:
    if not normalised(text):
        raise ValueError("has nothing to compare: it is all quotes and full stops")
    return text


Pattern = Annotated[str, AfterValidator(_compiles)]
Words = Annotated[str, AfterValidator(_says_something)]


def _check_at_least(at_least: int | None, things: Sequence[str], of: str) -> None:
    if at_least is not None and at_least > len(things):
        raise ValueError(f"at_least {at_least} exceeds the {len(things)} of {of}")


class Exact(FrozenModel):
    """The answer is one of some texts."""

    exact: tuple[Words, ...] = Field(min_length=1)
    """What it may be, case, white space and surrounding quotes and full stops apart."""

    @property
    def described(self) -> str:
        """What is asked for, for people."""
        return " / ".join(self.exact)


class Numeric(FrozenModel):
    """The answer ends on a number."""

    numeric: float = Field(allow_inf_nan=False)
    """The number."""
    tolerance: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """How far the answer's may be from it."""

    @property
    def described(self) -> str:
        """What is asked for, for people."""
        return f"{self.numeric:.15g}" + (f" ± {self.tolerance:g}" if self.tolerance else "")


class Regex(FrozenModel):
    """Something in the answer matches a pattern."""

    regex: Pattern
    """What is searched for, whatever the case."""

    @property
    def described(self) -> str:
        """What is asked for, for people."""
        return f"/{self.regex}/"


class Set(FrozenModel):
    """The answer names some things and none of others."""

    set: tuple[Words, ...] = Field(min_length=1)
    """What it has to name, as whole words."""
    others: tuple[Words, ...] = ()
    """What it must not name."""
    at_least: int | None = Field(default=None, gt=0)
    """How many of the set it has to name; null for all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_at_least(self.at_least, self.set, "set")
        return self

    @property
    def described(self) -> str:
        """What is asked for, for people."""
        number = "" if self.at_least is None else f"{self.at_least} of "
        others = f", not {', '.join(self.others)}" if self.others else ""
        return f"{number}{', '.join(self.set)}{others}"


class Checks(FrozenModel):
    """What has to hold of an open answer: all that is given here."""

    min_lines: int | None = Field(default=None, gt=0)
    """Fewest lines that are not blank."""
    max_lines: int | None = Field(default=None, gt=0)
    """Most lines that are not blank."""
    min_words: int | None = Field(default=None, gt=0)
    """Fewest words."""
    max_words: int | None = Field(default=None, gt=0)
    """Most words."""
    contains: tuple[Words, ...] | None = Field(default=None, min_length=1)
    """What stands in it, as whole words or their plural."""
    at_least: int | None = Field(default=None, gt=0)
    """How many of `contains` stand in it; null for all."""
    min_distinct: float | None = Field(default=None, gt=0, le=1)
    """Smallest share of its words that are distinct."""
    starts_with: Words | None = None
    """What it begins with, whatever the case."""
    matches: Pattern | None = None
    """What is searched for in it, whatever the case."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = self.model_dump(exclude_none=True)
        if not given:
            raise ValueError("has no check, which any answer would meet")
        for what in ("lines", "words"):
            least, most = given.get(f"min_{what}"), given.get(f"max_{what}")
            if least is not None and most is not None and least > most:
                raise ValueError(f"min_{what} {least} exceeds max_{what} {most}")
        _check_at_least(self.at_least, self.contains or (), "contains")
        return self


class Form(FrozenModel):
    """The answer is of some form: for what has no one right answer."""

    form: Checks
    """What has to hold of it."""

    @property
    def described(self) -> str:
        """What is asked for, for people."""
        return ", ".join(f"{name}: {value}" for name, value in self.form.model_dump(mode="json").items() if value)


class Case(FrozenModel):
    """A call of a function."""

    arguments: tuple[JsonValue, ...]
    """What it is called with."""
    returns: JsonValue
    """What it has to return."""


class Program(FrozenModel):
    """A function that an answer has to define."""

    function: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Its name."""
    cases: tuple[Case, ...] = Field(min_length=1)
    """Calls that all have to return what they should."""


class Python(FrozenModel):
    """The answer holds a function in Python that works."""

    python: Program
    """The function."""

    @property
    def described(self) -> str:
        """What is asked for, for people."""
        first = self.python.cases[0]
        arguments = ", ".join(map(repr, first.arguments))
        return f"{self.python.function}({arguments}) == {first.returns!r}, {len(self.python.cases)} cases in all"


SCORERS: Mapping[type[FrozenModel], str] = {
    Exact: "exact",
    Numeric: "numeric",
    Regex: "regex",
    Set: "set",
    Python: "python",
    Form: "form",
}
"""Each kind by the key that it is written with."""


def _named(value: Any) -> str | None:
    """Which kind of answer this is; None where it is not exactly one."""
    if isinstance(value, FrozenModel):
        return SCORERS.get(type(value))
    named = [kind for kind in SCORERS.values() if kind in value] if isinstance(value, dict) else []
    return named[0] if len(named) == 1 else None


Answer = Annotated[
    Annotated[Exact, Tag("exact")]
    | Annotated[Numeric, Tag("numeric")]
    | Annotated[Regex, Tag("regex")]
    | Annotated[Set, Tag("set")]
    | Annotated[Python, Tag("python")]
    | Annotated[Form, Tag("form")],
    Discriminator(
        _named,
        custom_error_type="one_answer",
        custom_error_message=f"has to have exactly one of {', '.join(SCORERS.values())}",
    ),
]
