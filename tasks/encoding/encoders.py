"""Libraries that turn text into token ids. `tokenizers` is the reference that every other has to agree with.

N tokens, D documents. Texts are a pyarrow array of strings, whose buffers go to a library as they are where it can.
"""

from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from models.tokenizer import Tokenizer, in_parts


class Encoded(NamedTuple):
    """The ids of some documents, one after the other."""

    ids_N: NDArray[Any]
    """uint32 or int32."""
    ends_D: NDArray[np.int64]
    """The exclusive end of each document among the ids."""


class Encoder(Protocol):
    """A library with a tokenizer loaded. Special tokens that stand in a text are ordinary text to it."""

    name: str

    def encode(self, texts: Any) -> Encoded:
        """The ids of each text. Raises UserError for a text that cannot be encoded."""


class Reference:
    """`models.tokenizer.Tokenizer`: slow, and right by definition."""

    name = "tokenizers"

    def __init__(self, folder: Path, parallel: bool) -> None:
        self.tokenizer = Tokenizer(folder)
        self._parallel = parallel

    def encode(self, texts: Any) -> Encoded:
        return joined(self.ids(texts.to_pylist()))

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        if self._parallel:
            return [encoding.ids for part in in_parts(texts) for encoding in self.tokenizer.encode_batch(part)]
        # The library takes a thread per core for a batch, and one for a single text.
        return [self.tokenizer.encode(text) for text in texts]

    def parts(self, prompts: Sequence[str], targets: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """The ids of each prompt and of the target behind it, as `Tokenizer.encode_parts`."""
        if self._parallel:
            return self.tokenizer.encode_parts(prompts, targets)
        pairs = zip(prompts, targets, strict=True)
        return [self.tokenizer.encode_parts([prompt], [target])[0] for prompt, target in pairs]


class Candidate:
    """One of the other libraries, together with the reference: documents with bytes that the vocabulary lacks, or
    with ids beyond it, are the reference's."""

    def __init__(self, make: Callable[[], Encoder], reference: Reference) -> None:
        """Raises whatever the library raises for a tokenizer that it does not know, ImportError where it is absent."""
        self._reference = reference
        self._vocab_size = len(reference.tokenizer)
        self._encoder = explained(make)
        self.name = self._encoder.name

    def encode(self, texts: Any) -> Encoded:
        """Raises whatever the library raises."""
        encoded = explained(lambda: self._encoder.encode(texts))
        if not encoded.ids_N.size or int(encoded.ids_N.max()) < self._vocab_size:
            return encoded
        places_N = np.flatnonzero(encoded.ids_N >= self._vocab_size)
        documents_D = np.unique(np.searchsorted(encoded.ends_D, places_N, side="right"))
        parts = np.split(encoded.ids_N, encoded.ends_D[:-1])
        again = self._reference.ids([texts[int(document)].as_py() for document in documents_D])
        for document, ids in zip(documents_D.tolist(), again, strict=True):
            parts[document] = np.array(ids, np.uint32)
        return joined(parts)


class EncoderFailed(Exception):
    """A library panicked, or gave other ids than the reference."""


T = TypeVar("T")


def explained(call: Callable[[], T]) -> T:
    """What `call` returns. A panic of Rust code, which is no Exception in Python, is raised as EncoderFailed."""
    try:
        return call()
    except Exception:
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise EncoderFailed(str(error)) from error


def joined(ids: Sequence[Any]) -> Encoded:
    """The ids of several documents, arrays or lists, as one array."""
    ends_D = np.cumsum([len(one) for one in ids], dtype=np.int64)
    if not len(ids):
        return Encoded(np.zeros(0, np.uint32), ends_D)
    return Encoded(np.concatenate([np.asarray(one, np.uint32) for one in ids]), ends_D)


def first_difference(one: Encoded, other: Encoded) -> int | None:
    """The first document whose ids are not the same in both; None where all are."""
    if np.array_equal(one.ends_D, other.ends_D) and np.array_equal(one.ids_N, other.ids_N):
        return None
    parts = (np.split(encoded.ids_N, encoded.ends_D[:-1]) for encoded in (one, other))
    rows = enumerate(zip(*parts, strict=True))
    return next(row for row, (ours, theirs) in rows if not np.array_equal(ours, theirs))


def version_of(library: str) -> str:
    """The installed version of a library."""
    return metadata.version(library)


def shown(text: str) -> str:
    """A text in quotes for a message, cut where it is long."""
    return repr(text if len(text) <= 60 else f"{text[:60]}…")


def text_of(error: BaseException) -> str:
    """An error in a line."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, UserError | EncoderFailed | ValueError):
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}"
