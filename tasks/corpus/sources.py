"""What a source of documents is, and how its rows come in batches of even size.

D documents.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.config import FrozenModel
from common.errors import UserError, suggestion
from tasks.corpus.sizes import value_sizes

if TYPE_CHECKING:
    import pyarrow as pa

TEXT = "text"
DOCUMENT_LIMIT_BYTES = 8 << 20
"""No document, nor a value of another column, may be longer: a few of them are in memory at once, and rules take up to
90 times the bytes of one."""

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
ConversationFormat = Literal["alpaca", "gsm8k", "dolly", "sharegpt", "messages", "preferences"]
Refusal = Literal["malformed", "not_utf8", "no_text", "no_conversation", "too_long", "unreadable"]
REFUSALS: tuple[Refusal, ...] = ("malformed", "not_utf8", "no_text", "no_conversation", "too_long", "unreadable")
"""Rules under which bad input is dropped: a line that is no JSON object or a value that does not fit its column; text
that is no UTF-8; a row whose text is missing, null, no string or only white space; one whose messages are none, empty,
out of order or without an answer; a document over the limit; what damage to a file took."""


@dataclass
class Count:
    """How many documents, and how many bytes of text they have."""

    documents: int = 0
    bytes: int = 0

    def add(self, documents: int, size: int) -> None:
        """Counts some more."""
        self.documents += documents
        self.bytes += size


@dataclass
class Refused:
    """Bad input that was dropped while reading, by rule."""

    counts: dict[Refusal, Count] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    """What is wrong with each damaged file, a line each."""

    @property
    def bytes(self) -> int:
        """Bytes of all that was dropped."""
        return sum(count.bytes for count in self.counts.values())

    def merge(self, other: "Refused") -> None:
        """Takes in what `other` has."""
        for rule, count in other.counts.items():
            self.counts.setdefault(rule, Count()).add(count.documents, count.bytes)
        self.damaged += other.damaged


class Reading:
    """How a source is to be read, and what becomes of its bad rows."""

    def __init__(
        self,
        others: tuple[str, ...] = (),
        skip: bool = False,
        folder: Path | None = None,
        previous: Mapping[str, Any] | None = None,
        first_file: int = 0,
        schema: "pa.Schema | None" = None,
        tell: Callable[[str], None] = lambda text: None,
        conversations: ConversationFormat | None = None,
    ) -> None:
        self.others = others
        """Columns beside the text's."""
        self.skip = skip
        """Whether bad rows are dropped and counted; else they are errors."""
        self.folder = folder
        """A folder for what a library keeps while it reads."""
        self.previous = previous or {}
        """The description under which an earlier start read, where this one goes on from it."""
        self.first_file = first_file
        """The number of the file that is read first; those before it are done with."""
        self.schema = schema
        """The columns that the source began with, once that is known."""
        self.tell = tell
        """Takes a sentence for people."""
        self.conversations = conversations
        """How rows hold conversations; null where they hold texts."""
        self.keeps_blank = False
        """Whether rows without text are kept, as the empty lines of a text; a source sets it."""
        self._refused = Refused()
        self._told: set[Refusal] = set()

    def refuse(self, rule: Refusal, place: str, problem: str, size: int, documents: int = 1) -> None:
        """Drops and counts bad input of `size` bytes at a place. Raises UserError where it is not to be dropped."""
        if not self.skip:
            raise UserError(f"{place}: {problem}; mend it, or drop and count such input with on_error: skip")
        if rule not in self._told:
            self.tell(f"{place}: {problem}; such input is dropped and counted as {rule}")
            self._told.add(rule)
        self._refused.counts.setdefault(rule, Count()).add(documents, size)

    def leave_out(self, documents: int, size: int) -> None:
        """Counts documents without text, which are no damage: they are dropped always."""
        self._refused.counts.setdefault("no_text", Count()).add(documents, size)

    def lose(self, place: str, problem: str, documents: int) -> None:
        """Drops and counts what a damaged file has lost. Raises UserError where it is not to be dropped."""
        if "unreadable" in self._told:
            self.tell(f"{place}: {problem}")
        self.refuse("unreadable", place, problem, 0, documents)
        self._refused.damaged.append(f"{place}: {problem}")

    def taken(self) -> Refused:
        """What was refused since this was asked last."""
        refused, self._refused = self._refused, Refused()
        return refused


class Rows(NamedTuple):
    """Rows that follow each other in the source."""

    table: "pa.Table"
    """Some MB at most: `text`, strings without nulls and valid in UTF-8, and the other columns that were asked for. Bad
    rows are none of them; they have gone to the Reading."""
    split: Split | None = None
    """The split that the source itself puts them into."""
    place: str = "the source"
    """What errors call the file that they are from."""


class FileStart(NamedTuple):
    """Here a file of the source begins, or another part from which it can be read on."""

    number: int
    """How many are before it."""


@dataclass(frozen=True)
class Opened:
    """A source that is being read."""

    description: Mapping[str, Any]
    """What is read, as JSON: `name`, and what it resolved to."""
    parts: "Iterator[Rows | FileStart]"
    """Its rows in order, from the first file that the Reading wants."""


class SourceConfig(FrozenModel):
    """The base of every source. A new one is added to the union in tasks.documents."""

    @property
    def own_columns(self) -> tuple[str, ...]:
        """Columns beside the text that always come, and are kept."""
        return ()

    def resolved(self) -> Self:
        """The source with the digest of what it points at; asked when a recipe is loaded.

        Raises UserError where it points at nothing, or not at what the digest says.
        """
        return self

    @abstractmethod
    def open(self, reading: Reading) -> Opened:
        """Begins to read. Raises UserError for bad input, at once or while the tables are taken."""


class ExternalSource(SourceConfig):
    """A source outside Cairn, which may change."""

    digest: str | None = None
    """SHA-256 over the names and bytes of its files; Cairn fills it in where they are on this machine, and refuses
    files that are not what it says."""


External = TypeVar("External", bound=ExternalSource)


def with_digest(source: External, digest: str, what: str) -> External:
    """A source with the digest of its content. Raises UserError where it has another one already."""
    written = source.digest
    if written is not None and written != digest:
        raise UserError(
            f"{what} is not what its digest {written[:12]} says ({digest[:12]}): it has changed; run again, and take "
            "the digest out of the recipe where it was written there"
        )
    return source.model_copy(update={"digest": digest})


def check_column(name: str, known: Iterable[str], place: str) -> None:
    """Raises UserError for a column that is not there."""
    names = list(known)
    if name not in names:
        raise UserError(f"{place} has no column '{name}'{suggestion(name, names)}")


def accepted(table: "pa.Table", reading: Reading, place: Callable[[int], str]) -> "pa.Table":
    """The rows of a table whose text is one, neither null nor blank; none of their values is too long, and all strings
    are valid UTF-8.

    `place` says where a row is from; the bad ones go to `reading`, and blank ones are counted there.
    """
    import pyarrow as pa

    size_D = value_sizes(table[TEXT])
    good_D = np.ones(table.num_rows, bool)

    def refuse(rows: Iterable[int], rule: Refusal, problem: str) -> None:
        for row in rows:
            if good_D[row]:
                good_D[row] = False
                reading.refuse(rule, place(row), problem, int(size_D[row]))

    if table[TEXT].null_count:
        refuse(np.flatnonzero(table[TEXT].is_null()).tolist(), "no_text", "the text is null")
    for name, column in zip(table.column_names, table.columns, strict=True):
        value_D = size_D if name == TEXT else value_sizes(column)
        refuse(np.flatnonzero(value_D > DOCUMENT_LIMIT_BYTES).tolist(), "too_long", too_long(name))
        if pa.types.is_string(column.type):
            refuse(_not_utf8(column), "not_utf8", f"the column '{name}' is no valid UTF-8")
    table = table if good_D.all() else table.filter(pa.array(good_D))
    return table if reading.keeps_blank else _with_text(table, reading)


def _with_text(table: "pa.Table", reading: Reading) -> "pa.Table":
    """The rows whose text is more than white space; the others are counted."""
    import pyarrow as pa
    import pyarrow.compute as pc

    size_D = text_sizes(table)
    blank_D = (size_D == 0) | np.asarray(pc.utf8_is_space(table[TEXT]))
    if not blank_D.any():
        return table
    reading.leave_out(int(blank_D.sum()), int(size_D[blank_D].sum()))
    return table.filter(pa.array(~blank_D))


def too_long(column: str = TEXT) -> str:
    """What is said of a document with a value over the limit."""
    what = "the document" if column == TEXT else f"the value of '{column}'"
    return f"{what} is longer than {DOCUMENT_LIMIT_BYTES >> 20} MiB, more than is kept in memory; divide it"


def _not_utf8(column: "pa.ChunkedArray") -> Iterator[int]:
    """The rows of a column of strings that are no valid UTF-8."""
    import pyarrow as pa

    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        for row, value in enumerate(column.cast(pa.binary()).to_pylist()):
            try:
                (value or b"").decode()
            except UnicodeDecodeError:
                yield row


def text_sizes(table: "pa.Table") -> NDArray[np.int64]:
    """The bytes of each document."""
    return value_sizes(table[TEXT])
