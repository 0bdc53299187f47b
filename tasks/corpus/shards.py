"""Documents gathered into Parquet files of bounded size, which a kill leaves whole.

D documents.
"""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.files import fsync_file
from tasks.corpus.sources import text_sizes

if TYPE_CHECKING:
    import pyarrow as pa

ROW_GROUP_BYTES = 4 << 20
Submit = Callable[..., "Future[int]"]


def shard_name(split: str, index: int, suffix: str) -> str:
    """The file name of one shard of a split, in documents and tokens alike."""
    return f"{split}-{index:05d}.{suffix}"


@dataclass
class _Split:
    """What one split has so far."""

    shards: list[dict[str, Any]] = field(default_factory=list)
    """Finished shards: name, documents, bytes; `size` of the file once it is written."""
    waiting: "list[pa.Table]" = field(default_factory=list)
    """Documents of the shard that is not full yet."""
    size: int = 0
    """Bytes of text that wait."""
    kept: int = 0
    """How many of the waiting tables lie in segments on the disk."""
    segments: list[str] = field(default_factory=list)
    """Files with those, so that a document is written once before its shard is."""


class Shards:
    """The shards of every split, in a folder. A shard is written in the background, one at a time."""

    def __init__(self, folder: Path, limit: int, submit: Submit) -> None:
        self._folder = folder
        self._limit = limit
        self._submit = submit
        self._splits: dict[str, _Split] = {}
        self._writing: tuple[dict[str, Any], Future[int]] | None = None
        self._segments = 0
        self.unsaved = False
        """Whether a shard was finished since `state` was asked."""

    def append(self, split: str, table: "pa.Table") -> None:
        """Adds documents to a split; a shard is full when the next document would exceed the limit."""
        if not table.num_rows:
            return
        here = self._splits.setdefault(split, _Split())
        end_D = np.cumsum(text_sizes(table))
        row, passed = 0, 0
        while row < table.num_rows:
            stop = int(np.searchsorted(end_D, passed + self._limit - here.size, "right"))
            if stop <= row and not here.waiting:
                stop = row + 1
            if stop > row:
                here.waiting.append(table.slice(row, stop - row))
                here.size += int(end_D[stop - 1]) - passed
                row, passed = stop, int(end_D[stop - 1])
            if row < table.num_rows:
                self._finish(split, here)

    def _finish(self, split: str, here: _Split) -> None:
        """Gives the waiting documents to the writer."""
        import pyarrow as pa

        self.wait()
        # In one chunk: how the documents came must not show in the file.
        table = pa.concat_tables(here.waiting).combine_chunks()
        name = shard_name(split, len(here.shards), "parquet")
        shard = {"name": name, "documents": table.num_rows, "bytes": here.size}
        here.shards.append(shard)
        here.waiting, here.size, here.kept, here.segments = [], 0, 0, []
        self._writing = shard, self._submit(write_parquet, table, self._folder / name)
        self.unsaved = True

    def wait(self) -> None:
        """Waits until the shard that is being written lies on the disk. Raises what its writing raised."""
        if self._writing is not None:
            shard, writing = self._writing
            shard["size"] = writing.result()
            self._writing = None

    @property
    def writing(self) -> bool:
        """Whether a shard is being written."""
        return self._writing is not None and not self._writing[1].done()

    def state(self) -> dict[str, Any]:
        """Makes durable what was added, and describes it as JSON for `restore`."""
        self.wait()
        for here in self._splits.values():
            if here.kept < len(here.waiting):
                name = f"segment-{self._segments}.arrow"
                self._segments += 1
                _write_segment(here.waiting[here.kept :], self._folder / name)
                here.kept = len(here.waiting)
                here.segments.append(name)
        fsync_file(self._folder)
        self.unsaved = False
        splits = {
            split: {"shards": [dict(shard) for shard in here.shards], "segments": list(here.segments)}
            for split, here in self._splits.items()
        }
        return {"segments": self._segments, "splits": splits}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a state; files that are newer are removed. Raises ValueError where one is missing."""
        import pyarrow as pa

        self._segments = state["segments"]
        known: set[str] = set()
        for split, described in state["splits"].items():
            shards = [dict(shard) for shard in described["shards"]]
            here = self._splits[split] = _Split(shards, segments=list(described["segments"]))
            for shard in here.shards:
                if not _has_size(self._folder / shard["name"], shard["size"]):
                    raise ValueError(f"{shard['name']} is gone")
            for name in here.segments:
                with pa.OSFile(str(self._folder / name)) as file:
                    here.waiting.append(pa.ipc.open_file(file).read_all())
            here.kept = len(here.waiting)
            here.size = sum(int(text_sizes(table).sum()) for table in here.waiting)
            known |= {shard["name"] for shard in here.shards} | set(here.segments)
        for path in self._folder.iterdir():
            if path.name not in known:
                path.unlink()

    def forget(self, states: dict[str, Any]) -> None:
        """Removes the segments that a state does not need."""
        needed = {name for described in states["splits"].values() for name in described["segments"]}
        for path in self._folder.glob("segment-*.arrow"):
            if path.name not in needed:
                path.unlink()

    def publish(self, output: Path) -> dict[str, dict[str, Any]]:
        """Finishes every shard and puts them into a folder; gives what `documents.json` says of each split."""
        for split, here in self._splits.items():
            if here.waiting:
                self._finish(split, here)
        self.wait()
        described = {}
        for split, here in self._splits.items():
            shards = [{key: shard[key] for key in ("name", "documents", "bytes")} for shard in here.shards]
            for shard in shards:
                _place(self._folder / shard["name"], output / shard["name"])
            totals = {key: sum(shard[key] for shard in shards) for key in ("documents", "bytes")}
            described[split] = {**totals, "shards": shards}
        return described


def write_parquet(table: "pa.Table", path: Path) -> int:
    """Writes a table of one chunk as Parquet and forces it onto the disk; gives the file's size.

    The bytes depend on the table alone. Row groups have about ROW_GROUP_BYTES of text, so that readers need little.
    """
    import pyarrow.parquet as pq

    end_D = np.cumsum(text_sizes(table))
    with pq.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=False) as writer:
        row, passed = 0, 0
        while row < table.num_rows:
            stop = max(row + 1, int(np.searchsorted(end_D, passed + ROW_GROUP_BYTES, "right")))
            writer.write_table(table.slice(row, stop - row), row_group_size=stop - row)
            row, passed = stop, int(end_D[stop - 1])
    fsync_file(path)
    return path.stat().st_size


def _write_segment(tables: "list[pa.Table]", path: Path) -> None:
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    fsync_file(path)


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _place(source: Path, target: Path) -> None:
    """A link, so that a kill before the artifact is complete leaves the source; a copy where there are no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
