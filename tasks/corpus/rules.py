"""The rules that drop documents: each a frozen config, which says of every document of a batch whether it may stay.

D documents.
"""

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from common.config import FrozenModel
from common.errors import UserError, suggestion
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

    def passes(self, texts: Texts) -> NDArray[np.bool_]:
        """Whether each document stays."""
        import pyarrow.compute as pc

        characters_D = pc.utf8_length(texts.table["text"]).to_numpy()
        words_D = np.array([len(text.split()) for text in texts.table["text"].to_pylist()], np.int64)
        stays_D = np.ones(len(texts), np.bool_)
        for values_D, low, high in (
            (characters_D, self.min_characters, self.max_characters),
            (words_D, self.min_words, self.max_words),
        ):
            stays_D &= (values_D >= low) if low is not None else True
            stays_D &= (values_D <= high) if high is not None else True
        return stays_D


class Column(FrozenModel):
    """Documents whose value in a column lies between two bounds, or is one of some."""

    rule: Literal["column"] = "column"
    """The rule's name."""
    column: str
    """The column, as FineWeb-Edu's `score` or `language`; a null in it fails."""
    minimum: float | None = None
    """The least number that may stay."""
    maximum: float | None = None
    """The greatest number that may stay."""
    one_of: tuple[str | int | bool, ...] | None = None
    """The values that may stay."""

    def passes(self, texts: Texts) -> NDArray[np.bool_]:
        """Whether each document stays. Raises UserError where the source has no such column."""
        import pyarrow as pa
        import pyarrow.compute as pc

        names = texts.table.column_names
        if self.column not in names:
            raise UserError(f"rule column: the source has no column '{self.column}'{suggestion(self.column, names)}")
        values = texts.table[self.column]
        stays_D = pc.is_valid(values).to_numpy()
        if self.minimum is not None:
            stays_D &= pc.fill_null(pc.greater_equal(values, self.minimum), False).to_numpy()
        if self.maximum is not None:
            stays_D &= pc.fill_null(pc.less_equal(values, self.maximum), False).to_numpy()
        if self.one_of is not None:
            stays_D &= pc.is_in(values, value_set=pa.array(self.one_of, values.type)).to_numpy()
        return np.asarray(stays_D)


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


Rule = Annotated[Length | Column | Regex, Field(discriminator="rule")]
"""Any rule; `rule` in its config says which."""
