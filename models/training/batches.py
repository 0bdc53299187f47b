"""Batches as a pure function of (shards and their weights, seed, sequence length, global sample index).

K rows taken from one shard, T positions, W = T + 1 tokens of a row, D documents.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from common.errors import UserError
from common.files import canonical_json, sha256_bytes
from models.engine import Batch
from models.training.order import Indices, Mixture, RowOrder
from models.training.shards import Shard, ShardFile, find_shards, open_shard

Packing = Literal["stream", "documents"]
_SCAN = 1 << 20


class Source(NamedTuple):
    """Token shards that are drawn from together."""

    shards: Path | Sequence[Path]
    """A folder of shards, in the order of their names, or the shards themselves."""
    weight: float = 1.0
    """Share of the tokens, relative to the other sources' weights."""


@dataclass(frozen=True)
class SourceSummary:
    """What became of a source's tokens."""

    rows: int
    """Rows of one epoch."""
    share: float
    """Fraction of all rows that are this source's."""
    cut_documents: int
    """Documents that are longer than a row and lose their end (packing "documents")."""
    dropped_tokens: int
    """Tokens at the ends of shards that fill no row (packing "stream")."""


class _Rows(NamedTuple):
    tokens_KW: NDArray[Any]
    counted_KT: NDArray[np.bool_] | None
    """Which targets count; None where all do."""


class Batches:
    """Rows of tokens by global sample index: any of them, at any time, in any number, always the same.

    With packing "stream" a row is a window of `sequence_length` + 1 tokens of one shard, windows being
    `sequence_length` apart, and what is left at a shard's end is dropped. With "documents" a row is one document,
    cut at `sequence_length` + 1 tokens and padded with `pad_id` on the right; padding never counts as a target.

    The rows of each source come in an order of their own, which is new in each epoch and keyed by the seed and the
    shards' sizes, so that another source beside it changes nothing. Sources alternate in a fixed pattern with exact
    shares; a source that is exhausted begins its next epoch.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seed: int,
        sequence_length: int,
        packing: Packing,
        batch_size: int,
        pad_id: int = 0,
        vocab_size: int | None = None,
        shuffled: bool = True,
        shard_group: int = 8,
    ) -> None:
        """Reads the shards' headers, and with packing "documents" the documents' ends.

        `vocab_size`: tokens from it on are refused. `shuffled` False gives the rows in the order in which they are
        stored. `shard_group`: shards that are read at a time.

        Raises UserError where shards are missing or damaged, or a source has no row.
        """
        if not sources:
            raise UserError("there is nothing to train on: no source of tokens is given")
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self._width = sequence_length + 1
        self._packing = packing
        self._pad_id = pad_id
        self._limit = vocab_size if vocab_size is not None else 1 << 31
        self._sources = [_OpenSource(source, self._width, packing, seed, shuffled, shard_group) for source in sources]
        self._mixture = Mixture([source.row_weight for source in self._sources])
        self.fingerprint = self._identify(seed, shuffled, shard_group)
        """Changes with everything that decides which rows come when, the tokens themselves apart."""

    def _identify(self, seed: int, shuffled: bool, shard_group: int) -> str:
        order = [seed, shuffled, shard_group, self.sequence_length, self._packing, self.batch_size, self._pad_id]
        sources = [[source.key, str(source.row_weight)] for source in self._sources]
        return sha256_bytes(canonical_json([order, sources]))

    @property
    def epoch_rows(self) -> int:
        """Rows after which every source has been gone through: exactly once, where there is one source."""
        cycles = [-(-source.rows // count) for source, count in zip(self._sources, self._mixture.counts, strict=True)]
        return self._sources[0].rows if len(cycles) == 1 else max(cycles) * self._mixture.cycle

    @property
    def summaries(self) -> list[SourceSummary]:
        """What became of each source's tokens, in the order in which the sources were given."""
        return [
            SourceSummary(source.rows, count / self._mixture.cycle, source.cut_documents, source.dropped_tokens)
            for source, count in zip(self._sources, self._mixture.counts, strict=True)
        ]

    def batch(self, step: int) -> Batch:
        """The global batch of a step, counted from 0."""
        return self.rows(step * self.batch_size, self.batch_size)

    def rows(self, first: int, count: int) -> Batch:
        """`count` rows from global sample index `first` on: int32 tokens and targets (count, T), bool mask (count, T).

        Raises UserError where a shard is damaged or a token is not below `vocab_size`.
        """
        shape = (count, self.sequence_length)
        batch = Batch(np.empty(shape, np.int32), np.empty(shape, np.int32), np.empty(shape, np.bool_))
        for number, places, index, amount in self._mixture.split(first, count):
            source = self._sources[number]
            shards_N, rows_N = source.order.locate(index, amount)
            for shard, chosen in _by_value(shards_N):
                found = self._read(source, shard, rows_N[chosen])
                into = places if isinstance(chosen, slice) else np.arange(count)[places][chosen]
                batch.tokens_BT[into] = found.tokens_KW[:, :-1]
                batch.targets_BT[into] = found.tokens_KW[:, 1:]
                batch.loss_mask_BT[into] = True if found.counted_KT is None else found.counted_KT
        return batch

    def _read(self, source: "_OpenSource", number: int, rows_K: Indices) -> _Rows:
        shard = source.map(number)
        if self._packing == "stream":
            found = _windows(shard, rows_K, self._width)
        else:
            found = _documents(shard, rows_K, self._width, self._pad_id)
        largest = int(found.tokens_KW.max()) if self._limit <= np.iinfo(shard.tokens_N.dtype).max else 0
        if largest >= self._limit:
            raise UserError(
                f"{source.files[number].path} holds the token {largest}, but there are only {self._limit}: "
                f"were the tokens made with another tokenizer?"
            )
        return found


class _OpenSource:
    """A source whose headers have been read."""

    def __init__(
        self, source: Source, width: int, packing: Packing, seed: int, shuffled: bool, shard_group: int
    ) -> None:
        name = str(source.shards) if isinstance(source.shards, Path) else "a list of shards"
        paths = find_shards(source.shards) if isinstance(source.shards, Path) else source.shards
        if not 0 < source.weight < math.inf:
            raise UserError(f"the weight of {name} is {source.weight}; weights are finite and greater than 0")
        self.files = [open_shard(path) for path in paths]
        self.cut_documents = self.dropped_tokens = 0
        weight = Fraction(str(source.weight))
        if packing == "stream":
            counts = [max(0, (file.token_count - 1) // (width - 1)) for file in self.files]
            self.dropped_tokens = sum(
                file.token_count - (count * (width - 1) + 1 if count else 0)
                for file, count in zip(self.files, counts, strict=True)
            )
            self.row_weight = weight
        else:
            counts = [file.document_count for file in self.files]
            kept = 0
            for file in self.files:
                tokens, cut = _scan(file, width)
                kept, self.cut_documents = kept + tokens, self.cut_documents + cut
            # Shares are of tokens: a source of short documents has more rows of its share than one of long ones.
            self.row_weight = weight * sum(counts) / max(1, kept)
        self.rows = sum(counts)
        if not self.rows:
            raise UserError(f"{name} has not enough tokens for one row of {width} tokens")
        sizes = [[file.token_count, file.document_count] for file in self.files]
        self.key = sha256_bytes(canonical_json([seed, packing, width, sizes]))
        self.order = RowOrder(counts, self.key, shard_group, shuffled)
        self.map = functools.lru_cache(maxsize=2 * shard_group)(self._map)

    def _map(self, number: int) -> Shard:
        return self.files[number].map()


def _by_value(shards_N: Indices) -> list[tuple[int, Indices | slice]]:
    """Each shard that occurs, and where; a slice of everything where there is only one."""
    if (shards_N == shards_N[:1]).all():
        return [(int(shards_N[0]), slice(None))] if shards_N.size else []
    by_shard = np.argsort(shards_N, kind="stable")
    cuts = np.flatnonzero(np.diff(shards_N[by_shard])) + 1
    return [(int(shards_N[part[0]]), part) for part in np.split(by_shard, cuts)]


def _windows(shard: Shard, rows_K: Indices, width: int) -> _Rows:
    """Windows of `width` tokens that overlap by one."""
    tokens_KW = sliding_window_view(shard.tokens_N, width)[rows_K * (width - 1)]
    if shard.loss_mask_N is None:
        return _Rows(tokens_KW, None)
    return _Rows(tokens_KW, sliding_window_view(shard.loss_mask_N, width)[rows_K * (width - 1)][:, 1:] != 0)


def _documents(shard: Shard, rows_K: Indices, width: int, pad_id: int) -> _Rows:
    """One document to a row, cut at `width` tokens and padded on the right."""
    ends_K = shard.document_ends_D[rows_K].astype(np.int64)
    starts_K = np.where(rows_K > 0, shard.document_ends_D[np.maximum(rows_K - 1, 0)], 0).astype(np.int64)
    real_KW = np.arange(width) < (ends_K - starts_K)[:, None]
    if not shard.tokens_N.size:  # nothing but empty documents, from which `take` takes nothing
        return _Rows(np.full(real_KW.shape, pad_id), real_KW[:, 1:])
    places_KW = starts_K[:, None] + np.arange(width)
    tokens_KW = np.where(real_KW, shard.tokens_N.take(places_KW, mode="clip"), pad_id)
    counted_KT = real_KW[:, 1:]
    if shard.loss_mask_N is not None:
        counted_KT = counted_KT & (shard.loss_mask_N.take(places_KW[:, 1:], mode="clip") != 0)
    return _Rows(tokens_KW, counted_KT)


def _scan(file: ShardFile, width: int) -> tuple[int, int]:
    """Tokens of a shard's documents that rows hold, and the number of documents that are cut.

    Raises UserError where the documents' ends do not rise or pass the shard's.
    """
    ends_D = file.map().document_ends_D
    kept, cut, last = 0, 0, 0
    for start in range(0, ends_D.size, _SCAN):
        part = ends_D[start : start + _SCAN]
        if int(part.max()) > file.token_count or int(part[0]) < last or np.any(part[1:] < part[:-1]):
            raise UserError(f"{file.path} is no intact token shard (its document_ends do not rise); make it again")
        lengths = np.diff(part, prepend=np.uint64(last))
        kept += int(np.minimum(lengths, width).sum())
        cut += int(np.count_nonzero(lengths > width))
        last = int(part[-1])
    return kept, cut
