"""Rows of Parquet files, in order and in bounded memory, with a place for each of them."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from tasks.corpus.columns import Columns, row_place
from tasks.corpus.conversations import conversation_columns
from tasks.corpus.sizes import value_sizes
from tasks.corpus.sources import TEXT, Reading, Refusal, accepted
from tasks.corpus.streams import BLOCK_BYTES, ERRORS, damage

if TYPE_CHECKING:
    import pyarrow as pa

TABLE_BYTES = 1 << 20
ROWS_AT_ONCE = 256


def parquet_tables(file: Any, name: str, columns: Columns, reading: Reading) -> "Iterator[pa.Table]":
    """The rows of a Parquet file; `file` is a path or an open file.

    Raises UserError for a column that is missing or holds no text, and for a damaged file unless those are skipped.
    """
    import pyarrow.parquet as pq

    options = {"buffer_size": BLOCK_BYTES, "pre_buffer": False, "page_checksum_verification": True}
    try:
        # Without pre_buffer a group's pages are read as they are needed, however large the group is.
        parquet = pq.ParquetFile(file, **options)
    except ERRORS as error:
        reading.lose(name, f"it is no whole Parquet file ({damage(error)})", 0)
        return
    with parquet:
        columns.check(parquet.schema_arrow.names, name)
        row = 0
        for group in range(parquet.num_row_groups):
            taken = 0
            rows = parquet.metadata.row_group(group).num_rows
            try:
                for table in _group_tables(parquet, group, columns):
                    place = row_place(name, row + taken)
                    taken += table.num_rows
                    yield as_documents(table, columns, name, reading, place)
            except ERRORS as error:
                reading.lose(row_place(name, row)(taken), f"it is damaged ({damage(error)})", rows - taken)
            row += rows


def _group_tables(parquet: Any, group: int, columns: Columns) -> "Iterator[pa.Table]":
    """The rows of a row group in tables of about TABLE_BYTES, or of a few rows where those are long."""
    import pyarrow as pa

    metadata = parquet.metadata.row_group(group)
    if not metadata.num_rows:
        return
    wanted = [column for column in columns.read if column in parquet.schema_arrow.names]
    chunks = (metadata.column(index) for index in range(metadata.num_columns))
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in wanted)
    # A dictionary may make a column larger than this says.
    rows = max(1, min(ROWS_AT_ONCE, TABLE_BYTES // max(1, size // metadata.num_rows)))
    waiting, size = [], 0
    for batch in parquet.iter_batches(rows, row_groups=[group], columns=wanted, use_threads=False):
        waiting.append(batch)
        size += batch.nbytes
        if size >= TABLE_BYTES:
            yield pa.Table.from_batches(waiting)
            waiting, size = [], 0
    if waiting:
        yield pa.Table.from_batches(waiting)


def as_documents(
    table: "pa.Table", columns: Columns, name: str, reading: Reading, place: Callable[[int], str]
) -> "pa.Table":
    """The documents in the rows of a table, with the other columns without dictionaries; bad rows go to `reading`.

    `place` says where a row is from. Raises UserError for a column that holds no text, and as `Reading.refuse`.
    """
    import pyarrow as pa

    others = _others(table, columns)
    if columns.conversations is None:
        return accepted(pa.table({TEXT: _text(table[columns.text], columns, name), **others}), reading, place)

    def refuse(row: int, rule: Refusal, problem: str) -> None:
        size = sum(int(value_sizes(table[column].slice(row, 1))[0]) for column in columns.needed)
        reading.refuse(rule, place(row), problem, size)

    found, rows = conversation_columns(table, columns.conversations, refuse)
    kept = {other: column.take(pa.array(rows, pa.int64())) for other, column in others.items()}
    return accepted(pa.table({**found, **kept}), reading, lambda row: place(rows[row]))


def _text(text: "pa.ChunkedArray", columns: Columns, name: str) -> "pa.ChunkedArray":
    """The column of the text as strings."""
    import pyarrow as pa

    if pa.types.is_dictionary(text.type):
        text = text.cast(text.type.value_type)
    if pa.types.is_binary(text.type):
        # Old writers mark no strings as such; whether it is UTF-8 is seen later.
        text = pa.chunked_array([chunk.view(pa.string()) for chunk in text.chunks], pa.string())
    elif pa.types.is_null(text.type):
        text = text.cast(pa.string())
    text = text.cast(_plain(text.type))
    if not pa.types.is_string(text.type):
        raise UserError(f"{name}: the column '{columns.text}' is of the type {text.type}, no text")
    return text


def _others(table: "pa.Table", columns: Columns) -> "dict[str, pa.ChunkedArray]":
    import pyarrow as pa

    others = {}
    for other in columns.others:
        kind = table[other].type
        kind = columns.later_types.get(other, kind) if pa.types.is_null(kind) else _plain(kind)
        others[other] = table[other].cast(kind)
    return others


def _plain(kind: "pa.DataType") -> "pa.DataType":
    """The type without a dictionary, and one type for all strings."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    return pa.string() if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) else kind


def learn_later_types(files: Iterable[Callable[[], Any]], columns: Columns) -> None:
    """Finds out the types of columns that hold nulls alone in the first Parquet files, by the schemas of later ones.

    A file that cannot be read is left to whoever reads its rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    unknown = set(columns.others)
    for opened in files:
        if not unknown:
            return
        try:
            schema = pq.read_schema(opened())
        except ERRORS as error:
            damage(error)
            continue
        for name in unknown & set(schema.names):
            if not pa.types.is_null(schema.field(name).type):
                columns.later_types[name] = _plain(schema.field(name).type)
                unknown.discard(name)
