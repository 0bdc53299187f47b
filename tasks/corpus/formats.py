"""Files of text: Parquet, JSON Lines and plain text, read in order, in bounded memory, with a place for every row."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from common.errors import UserError, one_line
from tasks.corpus.columns import BadRow, Columns, line_place
from tasks.corpus.parquet import learn_later_types, parquet_tables
from tasks.corpus.sources import DOCUMENT_LIMIT_BYTES, TEXT, Reading, accepted, check_column, too_long
from tasks.corpus.streams import BLOCK_BYTES, BOM, DamagedFile, Decompressed, Readable, line_blocks

if TYPE_CHECKING:
    import pyarrow as pa

Format = Literal["parquet", "jsonl", "text"]
ENDINGS: dict[str, Format] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
LEARNED_BYTES = 64 << 20


class Kind(NamedTuple):
    """What a file's name says of it."""

    format: Format | None
    compression: str | None


def kind_of(name: str) -> Kind:
    """The format and the compression that a file's ending stands for, in small or capital letters."""
    name = name.lower()
    ending = next((ending for ending in COMPRESSIONS if name.endswith(ending)), None)
    inner = name.removesuffix(ending) if ending else name
    format = next((format for known, format in ENDINGS.items() if inner.endswith(known)), None)
    return Kind(format, COMPRESSIONS[ending] if ending else None)


def learn_types(files: Iterable[tuple[str, Kind]], columns: Columns) -> None:
    """Finds out the types of other columns by their first values in files of JSON Lines, of which it reads as much as
    that takes, and LEARNED_BYTES at most.

    Raises UserError for a column that no object in there has, not even as null.
    """
    left = LEARNED_BYTES
    keys: set[str] = set()
    for path, kind in files:
        if columns.known or left <= 0:
            break
        with _stream(path, kind) as file:
            for _, block in line_blocks(file, path, Reading(skip=True)):
                for row in _objects(block):
                    columns.misfit(row)
                    keys.update(row)
                left -= len(block)
                if columns.known or left <= 0:
                    break
    if keys and not columns.known:
        for other in columns.others:
            read = "the source" if left > 0 else f"what comes first in the source ({LEARNED_BYTES >> 20} MiB)"
            check_column(other, sorted(keys), read)


def _objects(block: bytes) -> Iterator[dict[str, Any]]:
    """The objects of some lines of JSON; others are left out."""
    import orjson

    for line in block.split(b"\n"):
        with suppress(orjson.JSONDecodeError):
            row = orjson.loads(line)
            if isinstance(row, dict):
                yield row


def learn_columns(files: Sequence[tuple[str, Kind]], columns: Columns) -> None:
    """Finds out the types of other columns, of JSON Lines and of Parquet files. Raises UserError as learn_types."""
    if columns.others:
        learn_types((one for one in files if one[1].format == "jsonl"), columns)
        parquet = (path for path, kind in files if kind == ("parquet", None))
        learn_later_types((partial(_opened, path) for path in parquet), columns)


def _stream(path: str, kind: Kind) -> AbstractContextManager[Any]:
    """A file at a path or fsspec URL, decompressed."""
    if kind.compression:
        return closing(Decompressed(partial(_raw, path), kind.compression))
    return closing(_raw(path))


def _opened(path: str) -> Any:
    """What pyarrow opens a Parquet file by."""
    return path if "://" not in path else _raw(path)


def _raw(path: str) -> Any:
    if "://" not in path:
        return Path(path).open("rb", buffering=0)
    import fsspec

    return fsspec.open(path).open()


def file_tables(
    path: str, name: str, kind: Kind, columns: Columns, reading: Reading, per_line: bool = False
) -> "Iterator[pa.Table]":
    """The rows of a file at a path or fsspec URL: tables with `text` and the other columns, checked.

    `name` is what errors call it; `per_line` is for texts alone. Raises UserError for bad input that is not skipped.
    """
    if kind.format == "parquet":
        if kind.compression:
            raise UserError(f"{name}: Parquet is compressed inside; decompress the file")
        yield from parquet_tables(_opened(path), name, columns, reading)
        return
    with _stream(path, kind) as file:
        if kind.format == "jsonl":
            yield from json_tables(file, name, columns, reading)
        elif wanted := (*(columns.needed if columns.conversations else ()), *columns.others):
            raise UserError(f"{name} is a text, and has no column '{wanted[0]}'")
        else:
            yield from text_tables(file, name, per_line, reading)


def json_tables(file: Readable, name: str, columns: Columns, reading: Reading) -> "Iterator[pa.Table]":
    """The rows of JSON Lines: each line an object; blank ones hold none.

    Numbers of the other columns are read as float64. Raises UserError for a line that is no object or has no text or
    conversation, or another column of another type than before, unless those are skipped.
    """
    # By lines: pyarrow's reader crashed on a line `null`, and names no lines.
    import orjson

    for number, block in line_blocks(file, name, reading):
        rows: list[dict[str, Any]] = []
        lines: list[int] = []
        for line, text in enumerate(block.split(b"\n"), number):
            if not text or text.isspace():
                continue
            try:
                row = orjson.loads(text)
            except orjson.JSONDecodeError as error:
                _refuse_line(text, f"{name} line {line}", one_line(error), reading)
                continue
            if not isinstance(row, dict):
                _refuse_line(text, f"{name} line {line}", "it is no object", reading)
                continue
            try:
                rows.append(columns.document(row))
                lines.append(line)
            except BadRow as bad:
                reading.refuse(bad.rule, f"{name} line {line}", str(bad), len(text))
        if rows:
            yield accepted(columns.table(rows), reading, line_place(name, lines))


def _refuse_line(line: bytes, place: str, problem: str, reading: Reading) -> None:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        reading.refuse("not_utf8", place, f"it is no valid UTF-8 ({error.reason} at byte {error.start})", len(line))
    else:
        reading.refuse("malformed", place, f"the line is no JSON object ({problem})", len(line))


def text_tables(file: Readable, name: str, per_line: bool, reading: Reading) -> "Iterator[pa.Table]":
    """A text as one document, or each of its lines as one; blank texts and lines are none.

    Raises UserError for a text that is no UTF-8, unless that is skipped.
    """
    import pyarrow as pa

    if not per_line:
        whole = _whole(file, name, reading)
        if whole is not None and whole.strip():
            yield accepted(pa.table({TEXT: _strings([whole])}), reading, lambda row: name)
        return
    for number, block in line_blocks(file, name, reading):
        lines = [(line, text.removesuffix(b"\r")) for line, text in enumerate(block.split(b"\n"), number)]
        filled = [(line, text) for line, text in lines if text and not text.isspace()]
        table = pa.table({TEXT: _strings([text for _, text in filled])})
        yield accepted(table, reading, line_place(name, [line for line, _ in filled]))


def _strings(texts: list[bytes]) -> "pa.Array":
    """Texts that may turn out to be no UTF-8."""
    import pyarrow as pa

    return pa.array(texts, pa.binary()).view(pa.string())


def _whole(file: Readable, name: str, reading: Reading) -> bytes | None:
    try:
        parts, size = [], 0
        while size <= DOCUMENT_LIMIT_BYTES and (part := file.read(BLOCK_BYTES)):
            parts.append(part)
            size += len(part)
    except DamagedFile as error:
        reading.lose(name, str(error), 1)
        return None
    if size > DOCUMENT_LIMIT_BYTES:
        reading.refuse("too_long", name, too_long(), size)
        return None
    return b"".join(parts).removeprefix(BOM)
