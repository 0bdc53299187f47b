"""The rules that drop documents: each a frozen config, which says of every document of a batch whether it may stay.

D documents.
"""

from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from common.config import FrozenModel
from common.errors import UserError, suggestion
from tasks.corpus.quality import C4, Symbols
from tasks.corpus.repetition import Repetition
from tasks.corpus.text import Texts


class Length(FrozenModel):
    """Documents of a length between two bounds."""

    rule: Literal["length"] = "length"
    """The rule's name."""
    min_characters: int | None = Field(default=None, ge=0)
    """Characters (code points) that a document has at least."""
    max_characters: int | None = Field(default=None, ge=0)
    """Characters (code points) that it has at most."""
    min_words: int | None = Field(default=None, ge=0)
    """Words, which white space separates, that it has at least; Gopher asks for 50."""
    max_words: int | None = Field(default=None, ge=0)
    """Words that it has at most; Gopher allows 100,000."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for what in ("characters", "words"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if low is not None and high is not None and low > high:
                raise ValueError(f"min_{what} {low} exceeds max_{what} {high}: no document would stay")
        return self

    def passes(self, texts: Texts) -> NDArray[np.bool_]:
        """Whether each document stays."""
        stays_D = np.ones(len(texts), np.bool_)
        if self.min_characters is not None:
            stays_D &= texts.characters_D >= self.min_characters
        if self.max_characters is not None:
            stays_D &= texts.characters_D <= self.max_characters
        if self.min_words is not None:
            stays_D &= texts.words.count_D >= self.min_words
        if self.max_words is not None:
            stays_D &= texts.words.count_D <= self.max_words
        return stays_D


class Column(FrozenModel):
    """Documents whose value in a column lies between two bounds, or is one of some."""

    rule: Literal["column"] = "column"
    """The rule's name."""
    column: str
    """The column, as FineWeb-Edu's `score` (which it keeps from 2.5 on), `int_score` (3), `language_score` (0.65) or
    `language`; a null in it fails, and so does NaN."""
    minimum: float | None = None
    """The least number that may stay."""
    maximum: float | None = None
    """The greatest number that may stay."""
    one_of: tuple[str | int | float | bool, ...] | None = None
    """The values that may stay."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.minimum is None and self.maximum is None and self.one_of is None:
            raise ValueError("minimum, maximum or one_of: one of them at least is wanted")
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError(f"minimum {self.minimum} exceeds maximum {self.maximum}: no document would stay")
        return self

    def passes(self, texts: Texts) -> NDArray[np.bool_]:
        """Whether each document stays.

        Raises UserError where there is no such column, or its values cannot be compared with the bounds.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        names = texts.table.column_names
        if self.column not in names:
            raise UserError(f"rule column: the source has no column '{self.column}'{suggestion(self.column, names)}")
        values = texts.table[self.column]
        stays_D = np.ones(len(texts), np.bool_)
        try:
            if self.minimum is not None:
                stays_D &= pc.fill_null(pc.greater_equal(values, self.minimum), False).to_numpy()
            if self.maximum is not None:
                stays_D &= pc.fill_null(pc.less_equal(values, self.maximum), False).to_numpy()
            if self.one_of is not None:
                stays_D &= pc.is_in(values, value_set=pa.array(self.one_of, values.type)).to_numpy()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise UserError(
                f"rule column: the values of '{self.column}' are of type {values.type}, which cannot be compared with "
                f"what is asked for ({' '.join(str(error).split())})"
            ) from error
        return stays_D


class Regex(FrozenModel):
    """Documents in which a regular expression is found, or is not."""

    rule: Literal["regex"] = "regex"
    """The rule's name."""
    pattern: str
    """In the syntax of RE2, whose time is linear in the text whatever the pattern."""
    keep: Literal["matching", "others"] = "others"
    """Whether the documents stay in which it is found, or the others."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        import pyarrow as pa
        import pyarrow.compute as pc

        try:
            pc.match_substring_regex(pa.array([""]), pattern)
        except pa.ArrowInvalid as error:
            raise ValueError(str(error)) from error
        return pattern

    def passes(self, texts: Texts) -> NDArray[np.bool_]:
        """Whether each document stays."""
        import pyarrow.compute as pc

        found_D = np.asarray(pc.match_substring_regex(texts.table["text"], self.pattern).to_numpy(), np.bool_)
        return found_D if self.keep == "matching" else ~found_D


Rule = Annotated[Length | Column | Symbols | C4 | Repetition | Regex, Field(discriminator="rule")]
"""Any rule; `rule` in its config says which."""
