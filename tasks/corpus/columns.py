"""The columns of a source's files, and where a row is from."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from tasks.corpus.conversations import FORMATS
from tasks.corpus.sources import TEXT, Reading, Refusal, check_column

if TYPE_CHECKING:
    import pyarrow as pa

_TYPES = {str: "text", float: "a number", bool: "true or false"}


def row_place(name: str, first: int) -> Callable[[int], str]:
    """Says where a row of a table is from, whose first is the row `first` of a file."""
    return lambda row: f"{name} row {first + row} (from 0)"


def line_place(name: str, lines: list[int]) -> Callable[[int], str]:
    """Says where a row of a table is from, each of which is a line of a file."""
    return lambda row: f"{name} line {lines[row]}"


class BadRow(Exception):
    """A row that is no document; the message says why."""

    def __init__(self, rule: Refusal, problem: str) -> None:
        super().__init__(problem)
        self.rule = rule


class Columns:
    """The columns that are read: those of the text or the conversation, and others, of which JSON tells the types by
    their first values."""

    def __init__(self, text: str, reading: Reading) -> None:
        self.text = text
        self.conversations = FORMATS[reading.conversations] if reading.conversations else None
        """How rows hold conversations; None where they hold texts."""
        self.needed = self.conversations.columns if self.conversations else (text,)
        """The columns that a document is made from."""
        self.written = self.conversations.written if self.conversations else (TEXT,)
        """The columns of strings that it has."""
        self.others = tuple(other for other in reading.others if other != TEXT)
        known = {str(arrow): kind for kind, arrow in self._arrow_types().items()}
        schema = reading.schema
        # What an earlier start found in files that are not read again.
        types = {name: str(schema.field(name).type) for name in self.others} if schema is not None else {}
        self.later_types: dict[str, pa.DataType] = {}
        """Types of other columns in Parquet, for files in which they hold nulls alone."""
        self._types = {name: known[arrow] for name, arrow in types.items() if arrow in known}

    @property
    def known(self) -> bool:
        """Whether the types of all columns are known."""
        return len(self._types) == len(self.others)

    @property
    def read(self) -> list[str]:
        """All columns that are read where they are there, each once."""
        optional = self.conversations.optional if self.conversations else ()
        return list(dict.fromkeys([*self.needed, *optional, *self.others]))

    def check(self, names: Iterable[str], place: str) -> None:
        """Raises UserError for a column that is not there."""
        known = list(names)
        for wanted in (*self.needed, *self.others):
            check_column(wanted, known, place)

    def document(self, row: dict[str, Any]) -> dict[str, Any]:
        """The document of a JSON object, with its other columns. Raises BadRow where it has none, or where another
        column is of another type than its first value was."""
        document = self._text(row) if self.conversations is None else self._conversation(row)
        misfit = self.misfit(row)
        if misfit is not None:
            raise BadRow("malformed", misfit)
        return {**{other: row.get(other) for other in self.others}, **document}

    def _text(self, row: dict[str, Any]) -> dict[str, str]:
        value = row.get(self.text)
        if not isinstance(value, str):
            null = f"'{self.text}' is {'null' if value is None else 'no string'}"
            raise BadRow("no_text", null if self.text in row else self._missing(row))
        return {TEXT: value}

    def _conversation(self, row: dict[str, Any]) -> dict[str, str]:
        assert self.conversations is not None
        if not all(column in row for column in self.needed):
            raise BadRow("no_conversation", self._missing(row))
        try:
            return self.conversations.document(row)
        except UserError as error:
            raise BadRow("no_conversation", str(error)) from error

    def _missing(self, row: dict[str, Any]) -> str:
        """Says which column a JSON object has not."""
        try:
            for column in self.needed:
                check_column(column, row, "the row")
        except UserError as error:
            return str(error)
        raise AssertionError(self.needed)

    def misfit(self, row: dict[str, Any]) -> str | None:
        """What is wrong with another column of a JSON object: it is of another type than its first value was."""
        for other in self.others:
            value = row.get(other)
            if value is None:
                continue
            found = float if type(value) is int else type(value)
            if found not in (str, float, bool):
                return f"'{other}' is neither text nor a number nor true or false"
            if self._types.setdefault(other, found) is not found:
                return f"'{other}' is {_TYPES[found]}, and it was {_TYPES[self._types[other]]} before"
        return None

    def table(self, rows: list[dict[str, Any]]) -> "pa.Table":
        """What `document` gave as a table; a column without a value so far is one of text."""
        import pyarrow as pa

        arrow = self._arrow_types()
        arrays = {name: pa.array([row[name] for row in rows], pa.string()) for name in self.written}
        for other in self.others:
            kind = self._types.setdefault(other, str)
            values = [row.get(other) for row in rows]
            floats = [None if value is None else float(value) for value in values] if kind is float else values
            arrays[other] = pa.array(floats, arrow[kind])
        return pa.table(arrays)

    @staticmethod
    def _arrow_types() -> dict[type, Any]:
        import pyarrow as pa

        return {str: pa.string(), float: pa.float64(), bool: pa.bool_()}
