"""Documents written into Parquet files of bounded size, in little memory, so that a kill loses nothing that was saved.

D documents.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.files import fsync_file
from tasks.corpus.sizes import row_sizes
from tasks.corpus.sources import text_sizes

if TYPE_CHECKING:
    import pyarrow as pa

ROW_GROUP_BYTES = 1 << 20
Submit = Callable[..., "Future[None]"]


def shard_name(split: str, index: int, suffix: str) -> str:
    """The file name of one shard of a split, in documents and tokens alike."""
    return f"{split}-{index:05d}.{suffix}"


class Filling:
    """Something of bounded size (see row_sizes) that documents fill, one after the other: full when the next would
    exceed the limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self.bytes = 0
        """Bytes of text in it."""
        self.documents = 0

    def parts(self, table: "pa.Table", full: Callable[[], None]) -> "Iterator[pa.Table]":
        """A table cut where it is full, which `full` is called for; a document over the limit is alone in it."""
        end_D, text_D = np.cumsum(row_sizes(table)), text_sizes(table)
        row, passed = 0, 0
        while row < table.num_rows:
            stop = int(np.searchsorted(end_D, passed + self._limit - self._size, "right"))
            if stop <= row and self.documents:
                full()
                self._size = self.bytes = self.documents = 0
                continue
            stop = max(stop, row + 1)
            self._size += int(end_D[stop - 1]) - passed
            self.bytes += int(text_D[row:stop].sum())
            self.documents += stop - row
            yield table.slice(row, stop - row)
            row, passed = stop, int(end_D[stop - 1])


class ParquetFile:
    """A Parquet file that is written group by group, in the background; its bytes depend on the documents alone.

    A group has about ROW_GROUP_BYTES, so that readers need little memory, and so does this.
    """

    def __init__(self, path: Path, submit: Submit) -> None:
        self._path = path
        self._submit = submit
        self._group = Filling(ROW_GROUP_BYTES)
        self._waiting: list[pa.Table] = []
        self._writer: Any = None
        self._writing: Future[None] | None = None

    def append(self, table: "pa.Table") -> None:
        """Adds documents. Raises what went wrong with those before."""
        for part in self._group.parts(table, self._flush):
            self._waiting.append(part)

    def _flush(self) -> None:
        import pyarrow.parquet as pq

        self.wait()
        if self._writer is None:
            schema = self._waiting[0].schema
            options = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}
            self._writer = pq.ParquetWriter(self._path, schema, **options)
        waiting, self._waiting = self._waiting, []
        self._writing = self._submit(self._write, waiting)

    def _write(self, tables: "list[pa.Table]") -> None:
        import pyarrow as pa

        # In one chunk: how the documents came must not show in the file.
        table = pa.concat_tables(tables).combine_chunks()
        self._writer.write_table(table, row_group_size=table.num_rows)

    def wait(self) -> None:
        """Waits for what is being written. Raises what went wrong with it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> int:
        """Writes the rest and forces the file onto the disk; gives its size."""
        self._flush()
        self.wait()
        self._writer.close()
        fsync_file(self._path)
        return self._path.stat().st_size

    def abandon(self) -> None:
        """Lets go of a file that is not finished."""
        if self._writing is not None:
            self._writing.exception()
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()


class Segment:
    """Documents of a shard that is not full yet, in a file from which the shard can be begun again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None
        self._writer: Any = None

    def append(self, table: "pa.Table") -> None:
        """Adds documents."""
        import pyarrow as pa

        if self._writer is None:
            self._file = pa.OSFile(str(self.path), "wb")
            self._writer = pa.ipc.new_file(self._file, table.schema)
        self._writer.write_table(table)

    def close(self) -> bool:
        """Finishes the file; tells whether there is one."""
        if self._writer is None:
            return False
        self._writer.close()
        self._file.close()
        return True

    @staticmethod
    def read(path: Path) -> "Iterator[pa.Table]":
        """The documents of a finished segment."""
        import pyarrow as pa

        with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
            for number in range(reader.num_record_batches):
                yield pa.Table.from_batches([reader.get_batch(number)])


class _Split:
    """The shards of one split."""

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self.shard = Filling(limit)
        self.shards: list[dict[str, Any]] = []
        """The finished ones: name, documents, bytes, and the file's size."""
        self.file: ParquetFile | None = None
        """The one that is being filled."""
        self.saved: list[str] = []
        """Segments that have its documents up to the last state."""
        self.segment: Segment | None = None
        """Has those since then."""


class Shards:
    """The shards of every split, in a folder."""

    def __init__(self, folder: Path, limit: int, submit: Submit) -> None:
        self._folder = folder
        self._limit = limit
        self._submit = submit
        self._splits: dict[str, _Split] = {}
        self._segments = 0
        self.unsaved = False
        """Whether a shard was finished since `state` was asked."""

    def append(self, split: str, table: "pa.Table") -> None:
        """Adds documents to a split. Raises OSError where the disk is full."""
        if not table.num_rows:
            return
        here = self._splits.setdefault(split, _Split(split, self._limit))
        for part in here.shard.parts(table, lambda: self._finish(here)):
            self._add(here, part)
            if here.segment is None:
                here.segment = Segment(self._folder / f"segment-{self._segments}.arrow")
                self._segments += 1
            here.segment.append(part)

    def _add(self, here: _Split, table: "pa.Table") -> None:
        if here.file is None:
            path = self._folder / shard_name(here.name, len(here.shards), "parquet")
            here.file = ParquetFile(path, self._submit)
        here.file.append(table)

    def _finish(self, here: _Split) -> None:
        """Ends the shard that is being filled."""
        assert here.file is not None
        name = shard_name(here.name, len(here.shards), "parquet")
        counts = {"documents": here.shard.documents, "bytes": here.shard.bytes}
        here.shards.append({"name": name, **counts, "size": here.file.close()})
        if here.segment is not None and here.segment.close():
            here.segment.path.unlink()
        here.file, here.segment, here.saved = None, None, []
        self.unsaved = True

    def state(self) -> dict[str, Any]:
        """Makes durable what was added, and describes it as JSON for `restore`."""
        for here in self._splits.values():
            if here.segment is not None and here.segment.close():
                fsync_file(here.segment.path)
                here.saved.append(here.segment.path.name)
            here.segment = None
        fsync_file(self._folder)
        self.unsaved = False
        splits = {
            name: {"shards": [dict(shard) for shard in here.shards], "segments": list(here.saved)}
            for name, here in self._splits.items()
        }
        return {"segments": self._segments, "splits": splits}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a state; files that are newer are removed. Raises ValueError or OSError where one is damaged."""
        self._segments = state["segments"]
        known: set[str] = set()
        for name, described in state["splits"].items():
            here = self._splits[name] = _Split(name, self._limit)
            here.shards = [dict(shard) for shard in described["shards"]]
            here.saved = list(described["segments"])
            for shard in here.shards:
                path = self._folder / shard["name"]
                if not path.is_file() or path.stat().st_size != shard["size"]:
                    raise ValueError(f"{path} is not what was written")
            known |= {shard["name"] for shard in here.shards} | set(here.saved)
        for path in self._folder.iterdir():
            if path.name not in known:
                path.unlink()
        for here in self._splits.values():
            for segment in here.saved:
                for table in Segment.read(self._folder / segment):
                    for part in here.shard.parts(table, lambda: None):
                        self._add(here, part)

    def forget(self, state: dict[str, Any]) -> None:
        """Removes the segments that a state does not need."""
        needed = {name for described in state["splits"].values() for name in described["segments"]}
        for path in self._folder.glob("segment-*.arrow"):
            if path.name not in needed:
                path.unlink()

    def publish(self, output: Path) -> dict[str, dict[str, Any]]:
        """Ends every shard and puts them into a folder; gives what `documents.json` says of each split."""
        described = {}
        for name, here in self._splits.items():
            if here.file is not None:
                self._finish(here)
            shards = [{key: shard[key] for key in ("name", "documents", "bytes")} for shard in here.shards]
            for shard in shards:
                _place(self._folder / shard["name"], output / shard["name"])
            totals = {key: sum(shard[key] for shard in shards) for key in ("documents", "bytes")}
            described[name] = {**totals, "shards": shards}
        return described

    def close(self) -> None:
        """Lets go of the files that are open; what was not saved is forgotten."""
        for here in self._splits.values():
            if here.file is not None:
                here.file.abandon()
            if here.segment is not None:
                with suppress(OSError):
                    here.segment.close()


def _place(source: Path, target: Path) -> None:
    """A link, so that a kill before the artifact is complete leaves the source; a copy where there are no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
