"""Data sets of the Hugging Face hub as a source, below `CAIRN_HUB` or streamed from the network."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from common.errors import UserError, one_line, suggestion
from tasks.corpus.columns import Columns, row_place
from tasks.corpus.digests import files_digest
from tasks.corpus.file_source import names_below
from tasks.corpus.formats import file_tables, kind_of, learn_columns
from tasks.corpus.parquet import as_documents
from tasks.corpus.sources import (
    DOCUMENT_LIMIT_BYTES,
    SPLITS,
    TEXT,
    ExternalSource,
    FileStart,
    Opened,
    Reading,
    Rows,
    with_digest,
)
from tasks.hub import HUB_VARIABLE, hub_folder, local_copy, not_found

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_AT_ONCE = 64
Reader = Callable[[], "Iterator[pa.Table]"]


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
            found = with_digest(self, files_digest(files), f"data set '{self.id}' in {folder}")
            # What is said where it is not there has no part in what is made of it.
            return found.model_copy(update={"obtain": None})
        if self.digest is not None or self.obtain is not None:
            where = f"below {HUB_VARIABLE}={hub_folder()}" if hub_folder() else f"here: {HUB_VARIABLE} is not set"
            raise UserError(f"data set '{self.id}' is not {where}. {self.obtain or 'Its digest is that of a copy.'}")
        return self

    def open(self, reading: Reading) -> Opened:
        """Begins to read. Raises UserError for bad input, at once or while the rows are taken."""
        folder = local_copy("dataset", self.id)
        revision = None if folder else reading.previous.get("revision") or self.commit()
        builder = self._builder(folder, revision, reading)
        files = {split: [str(file) for file in builder.config.data_files.get(split, ())] for split in self.splits}
        for split, named in files.items():
            if not named:
                problem = f"data set '{self.id}' has no split '{split}'"
                raise UserError(problem + suggestion(split, map(str, builder.config.data_files)))
        if revision is not None and revision != self.revision:
            reading.tell(f"{self.id} is read at its commit of now; to read the same for ever: revision: {revision}")
        description = {
            "name": self.id,
            "kind": self.kind,
            "config": self.config,
            "split": list(self.splits),
            "revision": revision,
            "digest": self.digest,
        }
        return Opened(description, self._parts(builder, files, reading))

    def commit(self) -> str:
        """The commit that is read from the network. Raises UserError where the hub has no such data set."""
        import huggingface_hub

        try:
            return str(huggingface_hub.HfApi().dataset_info(self.id, revision=self.revision).sha)
        except Exception as error:  # the network has as many errors as libraries
            raise not_found("dataset", self.id, one_line(error)) from error

    def _builder(self, folder: Path | None, revision: str | None, reading: Reading) -> Any:
        """What `datasets` knows of the data set: its splits and their files. Raises UserError where it knows none."""
        import datasets

        # Neither place can be taken for the other: a folder's path is absolute.
        place = str(folder) if folder else f"hf://datasets/{self.id}"
        cache = str(reading.folder / "datasets") if reading.folder else None
        datasets.disable_progress_bars()
        try:
            return datasets.load_dataset_builder(place, self.config, revision=revision, cache_dir=cache)
        except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
            raise UserError(f"data set '{self.id}' cannot be read from {place}: {one_line(error)}") from error

    def _parts(self, builder: Any, files: Mapping[str, list[str]], reading: Reading) -> Iterator[Rows | FileStart]:
        """Every split, file by file. Parquet and JSON Lines are read here, which tells where a bad row is and takes
        little memory for long rows; other formats are streamed by `datasets`, as one file."""
        columns = Columns(self.column, reading)
        learn_columns([(file, kind_of(file)) for named in files.values() for file in named], columns)
        reading.keeps_blank = self.rows == "lines"
        number = 0
        for split, named in files.items():
            own_split = next((known for known in SPLITS if known == split), None)
            readers = {self._name(file): partial(self._file, file, columns, reading) for file in named}
            if not all(_is_read_here(file) for file in named):
                readers = {f"{self.id} {split}": partial(self._streamed, builder, split, columns, reading)}
            if self.rows == "lines":
                readers = {f"{self.id} {split}": partial(self._joined, list(readers.values()), split, reading)}
            for name, reader in readers.items():
                if number >= reading.first_file:
                    yield FileStart(number)
                    yield from (Rows(table, own_split, name) for table in reader())
                number += 1

    def _name(self, file: str) -> str:
        """What a file is called."""
        return f"{self.id}/{file.partition(f'/{self.id}')[2].partition('/')[2]}"

    def _file(self, file: str, columns: Columns, reading: Reading) -> "Iterator[pa.Table]":
        return file_tables(file, self._name(file), kind_of(file), columns, reading)

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
            columns.check(table.column_names, name)
            yield as_documents(table, columns, name, reading, row_place(name, row))
            row += table.num_rows

    def _joined(self, readers: "Iterable[Reader]", split: str, reading: Reading) -> "Iterator[pa.Table]":
        """The rows as the lines of one document; those that bring their line's end keep it."""
        import pyarrow as pa

        if reading.others:
            raise UserError(f"data set '{self.id}': rows that are joined keep no column '{reading.others[0]}'")
        lines: list[str] = []
        size = 0
        for reader in readers:
            for table in reader():
                size += table.nbytes
                if size > DOCUMENT_LIMIT_BYTES:
                    raise UserError(f"data set '{self.id}': the split '{split}' is too long to be one document")
                lines += (row if row.endswith("\n") else row + "\n" for row in table[TEXT].to_pylist())
        if lines:
            yield pa.table({TEXT: pa.array(["".join(lines)], pa.string())})


def _is_read_here(file: str) -> bool:
    # What ends in .json may be one array.
    return kind_of(file).format in ("parquet", "jsonl") and not file.lower().endswith(".json")
