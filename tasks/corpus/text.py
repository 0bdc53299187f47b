"""Batches of documents, and what the rules want to know of their texts.

D documents.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa


class Texts:
    """A batch of documents: a table with a column `text` of strings, none of them null. For one thread at a time."""

    def __init__(self, table: "pa.Table") -> None:
        self.table = table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def bytes_D(self) -> NDArray[np.int64]:
        """The UTF-8 bytes of each document."""
        import pyarrow.compute as pc

        return np.asarray(pc.binary_length(self.table["text"]).to_numpy(), np.int64)
