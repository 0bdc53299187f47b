"""Data sets of the Hugging Face hub as a source, below `CAIRN_HUB` or streamed from the network."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from common.errors import UserError, suggestion
from tasks.corpus.digests import files_digest
from tasks.corpus.file_source import names_below
from tasks.corpus.formats import Columns, as_text, file_tables, kind_of, row_place
from tasks.corpus.sources import (
    DOCUMENT_LIMIT_BYTES,
    SPLITS,
    TEXT,
    ExternalSource,
    Opened,
    Reading,
    Split,
    accepted,
    check_column,
    one_line,
    with_digest,
)
from tasks.hub import local_copy, not_found

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_AT_ONCE = 64


class HubSource(ExternalSource):
    """Rows of a data set, from the folder `CAIRN_HUB` where it is there, else streamed from the network."""

    kind: Literal["hub"]
    """A data set of the Hugging Face hub."""
    id: str
    """Its id, such as `HuggingFaceFW/fineweb-edu`."""
    config: str | None = None
    """Its configuration, such as `sample-10BT`; null where it has only one."""
    split: str | tuple[str, ...] = "train"
    """Its split, or several, read in this order."""
    column: str = TEXT
    """The column that has the text."""
    revision: str | None = None
    """The commit (40 hexadecimal digits) that is read from the network; null for the newest one, which is then
    recorded. What lies below `CAIRN_HUB` is told by its digest."""
    rows: Literal["documents", "lines"] = "documents"
    """Whether each row is a document, or the rows of a split are the lines of one text, which is the document, as of
    `Salesforce/wikitext`."""
    obtain: str | None = None
    """Where the data come from and how to get them, for a data set that is not on the network; the recipe is then
    refused with this text unless the data set lies below `CAIRN_HUB`."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits as they are written."""
        return (self.split,) if isinstance(self.split, str) else self.split

    def resolved(self) -> Self:
        """The source with the digest of its local copy, where there is one.

        Raises UserError where it has to be one and is not there, or is not what the digest says.
        """
        folder = local_copy("dataset", self.id)
        if folder is not None:
            files = {name: folder / name for name in sorted(names_below(folder))}
            return with_digest(self, files_digest(files), f"data set '{self.id}' in {folder}")
        if self.digest is not None:
            raise not_found("dataset", self.id, "it was not asked, for the source has the digest of a local copy")
        if self.obtain is not None:
            raise not_found("dataset", self.id, f"it was not asked, for the data are not there. {self.obtain}")
        return self

    def open(self, reading: Reading) -> Opened:
        """Begins to read. Raises UserError for bad input, at once or while the tables are taken."""
        folder = local_copy("dataset", self.id)
        revision = None if folder else reading.previous.get("revision") or self._commit()
        builder = self._builder(str(folder or self.id), revision, reading.folder)
        for split in self.splits:
            if split not in builder.config.data_files:
                problem = f"data set '{self.id}' has no split '{split}'"
                raise UserError(problem + suggestion(split, map(str, builder.config.data_files)))
        if revision is not None and revision != self.revision:
            reading.tell(f"{self.id} is read at its newest commit; to read the same for ever: revision: {revision}")
        description = {
            "name": self.id,
            "kind": self.kind,
            "config": self.config,
            "split": list(self.splits),
            "revision": revision,
            "digest": self.digest,
        }
        return Opened(description, self._all_tables(builder, reading))

    def _commit(self) -> str:
        """The commit that is read from the network. Raises UserError where the hub has no such data set."""
        import huggingface_hub

        try:
            return str(huggingface_hub.HfApi().dataset_info(self.id, revision=self.revision).sha)
        except Exception as error:  # the network has as many errors as libraries
            raise not_found("dataset", self.id, one_line(error)) from error

    def _builder(self, place: str, revision: str | None, folder: Path | None) -> Any:
        """What `datasets` knows of the data set: its splits and their files. Raises UserError where it knows none."""
        import datasets

        try:
            return datasets.load_dataset_builder(
                place if revision is None else f"hf://datasets/{self.id}",
                self.config,
                revision=revision,
                cache_dir=None if folder is None else str(folder / "datasets"),
            )
        except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
            raise UserError(f"data set '{self.id}' cannot be read from {place}: {one_line(error)}") from error

    def _all_tables(self, builder: Any, reading: Reading) -> "Iterator[tuple[Split | None, pa.Table]]":
        for split in self.splits:
            own_split = next((known for known in SPLITS if known == split), None)
            tables = self._tables(builder, split, reading)
            for table in self._joined(tables, split, reading) if self.rows == "lines" else tables:
                yield own_split, table

    def _tables(self, builder: Any, split: str, reading: Reading) -> "Iterator[pa.Table]":
        """The rows of a split. Parquet and JSON Lines are read here, which tells where a bad row is and takes little
        memory for long rows; for other formats `datasets` streams."""
        files = [str(file) for file in builder.config.data_files[split]]
        columns = Columns(self.column, reading.others)
        if all(kind_of(file).format in ("parquet", "jsonl") and not file.lower().endswith(".json") for file in files):
            for file in files:
                name = f"{self.id}/{_inside(file, self.id)}"
                yield from file_tables(file, name, kind_of(file), columns, reading)
        else:
            yield from self._streamed(builder, split, columns, reading)

    def _streamed(self, builder: Any, split: str, columns: Columns, reading: Reading) -> "Iterator[pa.Table]":
        import datasets

        name, row = f"{self.id} {split}", 0
        rows = builder.as_streaming_dataset(split=split).with_format("arrow").iter(batch_size=ROWS_AT_ONCE)
        while True:
            try:
                table = next(rows, None)
            except (datasets.exceptions.DatasetsError, ValueError) as error:
                raise UserError(f"{name} cannot be read after row {row} (from 0): {one_line(error)}") from error
            if table is None:
                return
            for wanted in (self.column, *columns.others):
                check_column(wanted, table.column_names, name)
            yield accepted(as_text(table, columns, name), reading, row_place(name, row))
            row += table.num_rows

    def _joined(self, tables: "Iterator[pa.Table]", split: str, reading: Reading) -> "Iterator[pa.Table]":
        """The rows as the lines of one document; those that bring their line's end keep it."""
        import pyarrow as pa

        if reading.others:
            raise UserError(f"data set '{self.id}': rows that are joined keep no column '{reading.others[0]}'")
        lines: list[str] = []
        size = 0
        for table in tables:
            size += table.nbytes
            if size > DOCUMENT_LIMIT_BYTES:
                raise UserError(
                    f"data set '{self.id}': the split '{split}' is too long to be one document; take rows: documents"
                )
            lines += (row if row.endswith("\n") else row + "\n" for row in table[TEXT].to_pylist())
        if lines:
            yield pa.table({TEXT: pa.array(["".join(lines)], pa.string())})


def _inside(file: str, hub_id: str) -> str:
    """The path of a file inside its data set, from its path or URL."""
    return file.partition(f"/{hub_id}")[2].partition("/")[2]
