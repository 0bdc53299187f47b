"""The columns of a source's files, and where a row is from."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tasks.corpus.sources import TEXT, Reading

if TYPE_CHECKING:
    import pyarrow as pa

_TYPES = {str: "text", float: "a number", bool: "true or false"}


def row_place(name: str, first: int) -> Callable[[int], str]:
    """Says where a row of a table is from, whose first is the row `first` of a file."""
    return lambda row: f"{name} row {first + row} (from 0)"


def line_place(name: str, lines: list[int]) -> Callable[[int], str]:
    """Says where a row of a table is from, each of which is a line of a file."""
    return lambda row: f"{name} line {lines[row]}"


class Columns:
    """The columns that are read: the text's and others, of which JSON tells the types by their first values."""

    def __init__(self, text: str, reading: Reading) -> None:
        self.text = text
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
        """JSON objects as a table; a column without a value so far is one of text."""
        import pyarrow as pa

        arrow = self._arrow_types()
        arrays = {TEXT: pa.array([row[self.text] for row in rows], pa.string())}
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
