"""How many bytes rows have, by which batches, row groups and shards are bounded.

D rows.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

ROW_BYTES = 16
"""What a row takes beside its strings, so that empty ones fill what they are put into too."""


def row_sizes(table: "pa.Table") -> NDArray[np.int64]:
    """The bytes of each row: those of its values of any length, and ROW_BYTES. They depend on the row alone."""
    size_D = np.full(table.num_rows, ROW_BYTES, np.int64)
    for column in table.columns:
        if not _width(column.type):
            size_D += value_sizes(column)
    return size_D


def value_sizes(column: "pa.ChunkedArray") -> NDArray[np.int64]:
    """The bytes of each value of a column: of its string, or of all in its list or struct; none for a null."""
    return np.concatenate([np.empty(0, np.int64), *(_array_sizes(chunk) for chunk in column.chunks)])


def _array_sizes(array: "pa.Array") -> NDArray[np.int64]:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, types = array.type, pa.types
    if types.is_struct(kind):
        return _sum([np.zeros(len(array), np.int64), *(_array_sizes(child) for child in array.flatten())])
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        inner = [array.keys, array.items] if types.is_map(kind) else [array.values]
        end = np.append(0, np.cumsum(_sum([_array_sizes(values) for values in inner])))
        return np.asarray(np.diff(end[np.asarray(array.offsets)]), np.int64)
    if types.is_fixed_size_list(kind):
        values = array.values.slice(array.offset * kind.list_size, len(array) * kind.list_size)
        return np.asarray(_array_sizes(values).reshape(len(array), kind.list_size).sum(axis=1), np.int64)
    if width := _width(kind):
        return np.full(len(array), width, np.int64)
    try:
        return np.asarray(pc.binary_length(array).fill_null(0)).astype(np.int64)
    except pa.ArrowNotImplementedError:
        # Views of strings have no such function.
        return _array_sizes(array.cast(pa.large_binary() if types.is_binary_view(kind) else pa.large_string()))


def _sum(sizes: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.asarray(np.sum(sizes, axis=0), np.int64)


def _width(kind: "pa.DataType") -> int:
    """The bytes of a value of a type, 0 where it may have any."""
    import pyarrow as pa

    if pa.types.is_null(kind) or pa.types.is_dictionary(kind):
        return 1
    if pa.types.is_nested(kind):
        return 0
    try:
        return max(1, int(kind.bit_width) // 8)
    except ValueError:
        return 0
