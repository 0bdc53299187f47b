"""Local files as a source: Parquet, JSON Lines, plain or compressed, and text."""

import glob
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

from common.errors import UserError
from tasks.corpus.columns import Columns
from tasks.corpus.digests import files_digest
from tasks.corpus.formats import Format, file_tables, kind_of, learn_columns
from tasks.corpus.sources import TEXT, ExternalSource, FileStart, Opened, Reading, Rows, with_digest


class FilesSource(ExternalSource):
    """Files, folders of them, or patterns with * and **. Their kinds are told by their endings.

    `.parquet`; `.jsonl`, `.ndjson` and `.json` with an object on each line; `.txt`, `.text` and `.md`; all but the
    first also with `.gz` or `.zst` after them.
    """

    kind: Literal["files"]
    """Local files."""
    path: str | tuple[str, ...]
    """A file, a folder, or a pattern, or several of them, read in this order; in a folder and under a pattern in that
    of their paths. Relative ones start where `cairn` is run; ~ is the user's home."""
    name: str | None = None
    """What the source is called in records and tables; null for the last part of its first path."""
    format: Format | None = None
    """What the files hold, where their endings do not tell: `parquet`, `jsonl` or `text`; of a folder, only files of
    this format are taken."""
    column: str = TEXT
    """The column that has the text."""
    document_per: Literal["file", "line"] = "file"
    """Whether a text file is one document or has one on each line, blank ones left out."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths as they are written."""
        return (self.path,) if isinstance(self.path, str) else self.path

    def resolved(self) -> Self:
        """The source with the digest of its files. Raises UserError where there are none, or others than it says."""
        return with_digest(self, files_digest(self.files()), self.paths[0])

    def files(self) -> dict[str, Path]:
        """The files in order, by the names that are told of them. Raises UserError where there are none."""
        found: dict[str, Path] = {}
        for text in self.paths:
            found |= {name: path for name, path in self._below(text).items() if name not in found}
        formats = {self.format or kind_of(name).format for name in found}
        if len(formats) > 1:
            kinds = " and ".join(sorted(format for format in formats if format))
            raise UserError(f"{self.paths[0]} has files of {kinds}: choose with format, or name the files")
        return found

    def _below(self, text: str) -> dict[str, Path]:
        """The files of one path."""
        path = Path(text).expanduser()
        if path.is_file():
            if self.format is None and kind_of(text).format is None:
                raise UserError(f"what {text} holds is not told by its ending: say it with format")
            return {text: path}
        if path.is_dir():
            found = {os.path.normpath(Path(text, name)): path / name for name in sorted(names_below(path))}
        elif glob.has_magic(text):
            # What is written out may be hidden; what the pattern stands for may not.
            fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
            matches = sorted(fixed.glob(str(path.relative_to(fixed))))
            seen = (match for match in matches if not any(map(_is_hidden, match.relative_to(fixed).parts)))
            found = {str(match): match for match in seen if match.is_file()}
        else:
            raise UserError(f"there is no file or folder {text} (from {Path.cwd()})")
        taken = {name: path for name, path in found.items() if self._fits(kind_of(name).format)}
        if not taken:
            raise UserError(f"{text} has no file {f'of {self.format}' if self.format else 'of a known kind'}")
        return taken

    def _fits(self, format: Format | None) -> bool:
        return format is not None and self.format in (None, format)

    def open(self, reading: Reading) -> Opened:
        """Begins to read. Raises UserError for bad input, at once or while the tables are taken."""
        files = self.files()
        name = self.name or Path(self.paths[0]).name
        description = {"name": name, "kind": self.kind, "files": len(files), "digest": self.digest}
        return Opened(description, self._parts(files, reading))

    def _parts(self, files: dict[str, Path], reading: Reading) -> Iterator[Rows | FileStart]:
        columns = Columns(self.column, reading)
        kinds = {name: kind_of(name)._replace(format=self.format or kind_of(name).format) for name in files}
        learn_columns([(str(path), kinds[name]) for name, path in files.items()], columns)
        for number, (name, path) in enumerate(files.items()):
            if number >= reading.first_file:
                yield FileStart(number)
                per_line = self.document_per == "line"
                for table in file_tables(str(path), name, kinds[name], columns, reading, per_line):
                    yield Rows(table, place=name)


def names_below(folder: Path) -> Iterator[str]:
    """The files below a folder, by their paths in it; what begins with a dot or an underscore is none."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        for name in names:
            if not _is_hidden(name):
                yield Path(place, name).relative_to(folder).as_posix()


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))
