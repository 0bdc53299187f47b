"""A sample of the training documents, the same at every time and in whatever batches it is read."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.errors import StageInterrupted, UserError

if TYPE_CHECKING:
    import pyarrow as pa

DESCRIPTION, SPLIT, TEXT = "documents.json", "train", "text"
ROWS_AT_ONCE = 256
PIECE_CHARACTERS = 8192
SPARE = 2
"""Shards are read that have so many times the text that is wanted, so that it comes from all over a large source."""


class Source(NamedTuple):
    """An artifact of documents."""

    name: str
    """What its stage is called."""
    folder: Path
    weight: float
    """Its share of a sample, relative to the others'."""
    available: int
    """Bytes of training text that it has."""
    shards: Sequence[Mapping[str, Any]]
    """The files with those: name and bytes."""


class Drawn(NamedTuple):
    """What a sample has of one source."""

    source: str
    weight: float
    available_bytes: int
    documents: int
    """The last one may be cut."""
    bytes: int


class Sample:
    """Training text of one or more sources: each gives its share of `limit` bytes, from all over it where it has more,
    and all that it has where it has less. It can be read several times."""

    def __init__(self, sources: Sequence[Source], limit: int, should_stop: Callable[[], bool] = lambda: False) -> None:
        self._sources = sources
        self._limit = limit
        self._should_stop = should_stop
        self.drawn: list[Drawn] = []
        """What came of each source when the sample was last read to its end."""

    def pieces(self) -> Iterator[str]:
        """The documents, in pieces that end with a word where they can: trainers take many times a piece in memory.

        Raises StageInterrupted where the stage is told to stop, and UserError for unreadable documents.
        """
        for document in self.documents():
            yield from cut(document, PIECE_CHARACTERS)

    def documents(self) -> Iterator[str]:
        """The documents, whole but for the last one of each source. Raises as `pieces`."""
        self.drawn = []
        total = sum(source.weight for source in self._sources)
        for source in self._sources:
            documents, size = 0, 0
            for text, text_bytes in self._of(source, int(self._limit * source.weight / total)):
                documents, size = documents + 1, size + text_bytes
                yield text
            self.drawn.append(Drawn(source.name, source.weight, source.available, documents, size))

    def _of(self, source: Source, limit: int) -> Iterator[tuple[str, int]]:
        shards = spread(source.shards, SPARE * limit)
        wanted = limit / max(1, sum(shard["bytes"] for shard in shards))
        taken, passed = 0, 0
        for shard in shards:
            for texts, sizes in _batches(source.folder / shard["name"]):
                if self._should_stop():
                    raise StageInterrupted("the tokenizer was stopped")
                for row, size in enumerate(sizes):
                    # Whatever is next where the sample is behind: no length is taken more often than another.
                    if taken < limit and (wanted >= 1 or taken <= wanted * passed):
                        room = limit - taken
                        yield (
                            _first_bytes(texts[row].as_py(), room) if size > room else texts[row].as_py(),
                            min(size, room),
                        )
                        taken += size
                    passed += size
            if taken >= limit:
                return


def described(name: str, folder: Path, weight: float = 1.0) -> Source:
    """An artifact of documents as a source of text. Raises UserError where it has none for training."""
    try:
        split = json.loads((folder / DESCRIPTION).read_bytes())["splits"].get(SPLIT, {"bytes": 0, "shards": []})
        source = Source(name, folder, weight, int(split["bytes"]), [*split["shards"]])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / DESCRIPTION} does not describe documents ({error}); make them again") from error
    if not source.available:
        raise UserError(f"the documents '{name}' have no {SPLIT} text that a tokenizer could be learnt from")
    return source


def spread(shards: Sequence[Mapping[str, Any]], enough: int) -> list[Mapping[str, Any]]:
    """As many shards as have about `enough` bytes together, from all over the source; all where it has less."""
    size = sum(shard["bytes"] for shard in shards)
    count = len(shards) if size <= enough else max(1, -(-len(shards) * enough // size))
    return [shards[number * len(shards) // count] for number in range(count)]


def cut(text: str, limit: int) -> Iterator[str]:
    """A text in pieces of at most `limit` characters, each but the first beginning with the white space before a word
    where there is any in reach."""
    start = 0
    while len(text) - start > limit:
        end = max(text.rfind(space, start + 1, start + limit + 1) for space in " \n")
        end = start + limit if end < 0 else end
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _batches(path: Path) -> "Iterator[tuple[pa.StringArray, list[int]]]":
    """Some documents at a time, and their sizes in bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches(ROWS_AT_ONCE, columns=[TEXT], use_threads=False):
            yield batch.column(TEXT), pc.binary_length(batch.column(TEXT)).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"documents {path.name} cannot be read ({error}); make them again") from error


def _first_bytes(text: str, size: int) -> str:
    """The beginning of a text, in whole characters."""
    return text.encode()[:size].decode(errors="ignore")
