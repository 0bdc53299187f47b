"""The libraries that may encode in the place of `tokenizers`. Each raises, when it is made, for a tokenizer that it
cannot be built from.

N bytes or tokens, D documents, P pieces of documents.
"""

import json
import sys
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.tokenizer import SENTENCEPIECE_FILE
from tasks.encoding.encoders import Encoded, Encoder, joined
from tasks.encoding.tokenizer_json import (
    byte_ranks,
    dividing_pattern,
    dividing_steps,
    missing_bytes,
    read_description,
    takes_digits_apart,
)

FRESH_AFTER_BYTES = 16 << 20
"""Text after which gigatoken starts with an empty cache again: its cache of words knows no bound."""


class Gigatoken:
    """gigatoken: words are looked up in a cache, and the text is divided without a regular expression."""

    name = "gigatoken"

    def __init__(self, folder: Path, parallel: bool) -> None:
        description = read_description(folder)
        steps = dividing_steps(description)
        if description["model"]["type"] == "BPE" and steps[-1].get("type") == "ByteLevel":
            description["model"]["vocab"] |= missing_bytes(description)
        # It divides as GPT-2 does; the digits are cut out before.
        self._digits_apart = takes_digits_apart(steps)
        if self._digits_apart:
            description["pre_tokenizer"] = steps[-1]
        # A special token that it does not know is ordinary text to it.
        description["added_tokens"] = [token for token in description["added_tokens"] if not token["special"]]
        self._description = json.dumps(description | {"post_processor": None, "truncation": None, "padding": None})
        self._parallel = parallel
        self._load()

    def _load(self) -> None:
        from gigatoken import Tokenizer as Backend

        self._backend: Any = None  # so that the old one goes before the new one comes
        self._backend = Backend.from_json(self._description)
        self._seen = 0

    def encode(self, texts: Any) -> Encoded:
        import pyarrow as pa
        import pyarrow.compute as pc

        if not len(texts):
            return joined([])
        if self._seen > FRESH_AFTER_BYTES:
            self._load()
        texts = texts.cast(pa.large_string())
        bytes_N, offsets_D = _buffers(texts)
        self._seen += bytes_N.size
        if not self._digits_apart:
            return self._encode(bytes_N, offsets_D)
        cuts_P = _cuts_at_digits(bytes_N, offsets_D)
        pieces = self._encode(bytes_N, cuts_P)
        ends_P = np.concatenate([[0], pieces.ends_D])
        encoded = Encoded(pieces.ids_N, ends_P[np.searchsorted(cuts_P, offsets_D[1:])])
        return _without(encoded, pc.match_substring_regex(texts, _other_digits()).to_numpy(zero_copy_only=False))

    def _encode(self, bytes_N: NDArray[np.uint8], offsets_P: NDArray[np.int64]) -> Encoded:
        """The ids of each piece of UTF-8, neither copied on the way in nor on the way out."""
        import awkward

        content = awkward.contents.NumpyArray(bytes_N, parameters={"__array__": "char"})
        layout = awkward.contents.ListOffsetArray(
            awkward.index.Index64(offsets_P), content, parameters={"__array__": "string"}
        )
        found = self._backend.encode_batch(awkward.Array(layout), parallel=self._parallel).layout
        ends_P = np.asarray(found.offsets.data)
        return Encoded(np.asarray(found.content.data)[ends_P[0] : ends_P[-1]], ends_P[1:] - ends_P[0])


class Tiktoken:
    """tiktoken: byte-level BPE whose merges are its tokens in order, divided by one regular expression."""

    name = "tiktoken"

    def __init__(self, folder: Path, parallel: bool) -> None:
        import tiktoken

        description = read_description(folder)
        self._encoding = tiktoken.Encoding(
            "cairn",
            pat_str=dividing_pattern(description),
            mergeable_ranks=byte_ranks(description),
            special_tokens={},
        )

    def encode(self, texts: Any) -> Encoded:
        return joined([self._encoding.encode_to_numpy(text, disallowed_special=()) for text in texts.to_pylist()])


class SentencePiece:
    """The SentencePiece library, for tokenizers that come with its `tokenizer.model`."""

    name = "sentencepiece"

    def __init__(self, folder: Path, parallel: bool) -> None:
        if not (folder / SENTENCEPIECE_FILE).is_file():
            raise ValueError(f"the tokenizer has no {SENTENCEPIECE_FILE}")
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / SENTENCEPIECE_FILE))

    def encode(self, texts: Any) -> Encoded:
        return joined(self._processor.encode_as_numpy(texts.to_pylist()))


LIBRARIES: dict[str, Callable[[Path, bool], Encoder]] = {
    "gigatoken": Gigatoken,
    "tiktoken": Tiktoken,
    "sentencepiece": SentencePiece,
}
"""The fastest first, by their names on PyPI: about 300, 10 and 5 MB of English text per second and core, where
`tokenizers` has 3. That is not measured for each corpus, because on a sample gigatoken mostly fills its cache."""


def _buffers(texts: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The bytes of an array of large strings, and where each begins and ends among them."""
    _, offsets, characters = texts.buffers()
    offsets_D = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    if characters is None:
        return np.zeros(0, np.uint8), offsets_D
    return np.frombuffer(characters, np.uint8)[offsets_D[0] : offsets_D[-1]], offsets_D - offsets_D[0]


def _cuts_at_digits(bytes_N: NDArray[np.uint8], offsets_D: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where texts begin and end, and before and after each ASCII digit in them."""
    is_digit_N = (bytes_N - np.uint8(ord("0"))) < 10
    is_cut_N = np.zeros(bytes_N.size + 1, bool)
    is_cut_N[:-1] = is_digit_N
    is_cut_N[1:] |= is_digit_N
    is_cut_N[offsets_D] = True
    return np.flatnonzero(is_cut_N)


@cache
def _other_digits() -> str:
    """A regular expression for what Unicode calls a number beyond ASCII's digits, for RE2."""
    ranges: list[list[int]] = []
    for code in range(0x80, sys.maxunicode + 1):
        if unicodedata.category(chr(code)).startswith("N"):
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "[" + "".join(f"\\x{{{first:X}}}-\\x{{{last:X}}}" for first, last in ranges) + "]"


def _without(encoded: Encoded, is_left_out_D: NDArray[np.bool_]) -> Encoded:
    """The same with an id beyond every vocabulary in the documents that are left out: `Candidate` finds it."""
    if not is_left_out_D.any():
        return encoded
    ids_N = encoded.ids_N.copy()
    ids_N[encoded.ends_D[is_left_out_D] - 1] = np.iinfo(np.uint32).max
    return Encoded(ids_N, encoded.ends_D)
