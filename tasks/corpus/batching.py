"""Rows of a source in batches of even size, at bounds that depend on the rows alone."""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from common.errors import UserError, one_line
from tasks.corpus.sizes import row_sizes
from tasks.corpus.sources import TEXT, FileStart, Reading, Refused, Rows, Split, check_column

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_BYTES = 2 << 20
ANCHOR_BYTES = 1 << 19
"""A file begins a batch of its own where the one before has so much already: small files share batches."""


@dataclass(frozen=True)
class Batch:
    """Rows that follow each other in the source."""

    table: "pa.Table"
    """`text` and the other columns that were asked for, in one chunk."""
    split: Split | None
    """The split that the source itself puts them into."""
    refused: Refused
    """What was dropped between the batch before and the end of this one."""
    file: int | None
    """The number of the file that it begins with, so that reading can go on there; null where it begins inside one."""


class Batcher:
    """Gathers rows into batches."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._waiting: list[pa.Table] = []
        self._size = 0
        self._split: Split | None = None
        self._refused = Refused()
        self._file: int | None = None

    def batches(self, parts: "Iterable[Rows | FileStart]") -> Generator[Batch, None, None]:
        """The rows in batches of about BATCH_BYTES.

        Raises UserError for a table whose columns do not fit those of the first one.
        """
        for part in parts:
            self._refused.merge(self._reading.taken())
            if isinstance(part, FileStart):
                if self._size >= ANCHOR_BYTES or self._refused.counts:
                    yield self._batch()
                if not self._waiting:
                    self._file = part.number
                continue
            if part.split != self._split and self._waiting:
                yield self._batch()
            self._split = part.split
            yield from self._added(self._fitted(part.table, part.place))
        self._refused.merge(self._reading.taken())
        if self._waiting or self._refused.counts:
            yield self._batch()

    def _added(self, table: "pa.Table") -> Generator[Batch, None, None]:
        """Takes in rows; gives the batches that they fill."""
        end_D = np.cumsum(row_sizes(table))
        row, passed = 0, 0
        while row < table.num_rows:
            # The row that fills the batch is its last.
            last = int(np.searchsorted(end_D, passed + BATCH_BYTES - self._size))
            stop = min(last + 1, table.num_rows)
            self._waiting.append(table.slice(row, stop - row))
            self._size += int(end_D[stop - 1]) - passed
            row, passed = stop, int(end_D[stop - 1])
            if self._size >= BATCH_BYTES:
                yield self._batch()

    def _batch(self) -> Batch:
        import pyarrow as pa

        schema = self._reading.schema or pa.schema([(TEXT, pa.string())])
        table = pa.concat_tables(self._waiting).combine_chunks() if self._waiting else schema.empty_table()
        batch = Batch(table, self._split, self._refused, self._file)
        self._waiting, self._size, self._refused, self._file = [], 0, Refused(), None
        return batch

    def _fitted(self, table: "pa.Table", place: str) -> "pa.Table":
        """The table with the columns that the source began with. Raises UserError where they are of other types."""
        import pyarrow as pa

        if self._reading.schema is None:
            self._reading.schema = table.schema.remove_metadata()
        schema = self._reading.schema
        if table.schema.equals(schema):
            return table.replace_schema_metadata(None)
        for wanted in schema:
            check_column(wanted.name, table.column_names, place)
            found = table.schema.field(wanted.name).type
            if not _fits(found, wanted.type):
                raise UserError(f"{place}: the column '{wanted.name}' is {found}, and it was {wanted.type} before")
        try:
            return table.select(schema.names).cast(schema)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError(f"{place}: its columns do not fit those before: {one_line(error)}") from error


def _fits(found: "pa.DataType", wanted: "pa.DataType") -> bool:
    """Whether values of one type are such of another, but for the width of numbers; "7" is not 7."""
    from pyarrow import types

    if found == wanted or types.is_null(found):
        return True
    if types.is_integer(found):
        return bool(types.is_integer(wanted) or types.is_floating(wanted))
    if types.is_floating(found):
        return bool(types.is_floating(wanted))
    if types.is_list(found) and types.is_list(wanted):
        return _fits(found.value_type, wanted.value_type)
    if types.is_struct(found) and types.is_struct(wanted):
        inner, expected = list(found), list(wanted)
        same = [field.name for field in inner] == [field.name for field in expected]
        return same and all(_fits(own.type, other.type) for own, other in zip(inner, expected, strict=True))
    return bool(found.id == wanted.id and not types.is_nested(found))
