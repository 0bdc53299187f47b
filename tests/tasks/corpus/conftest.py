"""What tests of documents share: files of many kinds, and what a reader makes of them."""

import gzip
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from tasks.corpus.sources import Reading, Refused


class Told(Reading):
    """A Reading that remembers what was said."""

    def __init__(self, *others: str, skip: bool = False) -> None:
        self.said: list[str] = []
        super().__init__(others, skip, tell=self.said.append)

    def counts(self) -> dict[str, int]:
        """Documents that were dropped since this was asked last, by rule."""
        return documents(self.taken())


def documents(refused: Refused) -> dict[str, int]:
    """How many documents were dropped, by rule."""
    return {str(rule): count.documents for rule, count in refused.counts.items()}


def texts(tables: "Iterable[pa.Table]") -> list[str]:
    """The texts of some tables."""
    return [text for table in tables for text in table["text"].to_pylist()]


def json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows as JSON Lines."""
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def parquet_bytes(columns: Mapping[str, Any], **options: Any) -> bytes:
    """Columns as a Parquet file."""
    file = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), file, **options)
    return file.getvalue()


def compressed(data: bytes, ending: str) -> bytes:
    """Bytes as a file with this ending has them."""
    if ending.endswith(".gz"):
        return gzip.compress(data, mtime=0)
    return zstandard.compress(data) if ending.endswith(".zst") else data


def write(folder: Path, name: str, data: bytes) -> Path:
    """A file with these bytes, compressed where its name says so."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compressed(data, name))
    return path
