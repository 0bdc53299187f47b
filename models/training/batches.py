"""Batches as a pure function of (token shards and their portions, seed, sequence length, global sample index).

K rows taken from one shard, T positions, W = T + 1 tokens of a row, D documents.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from common.errors import UserError
from common.files import canonical_json, sha256_bytes
from models.engine import Batch
from models.training.blend import Blend, Draw
from models.training.config import Packing
from models.training.order import Indices
from models.training.packing import document_spans, packed_rows
from models.training.shards import Shard
from models.training.sources import Located, OpenSource, Source, rows_together

__all__ = ["Batches", "Drawn", "Packing", "Source", "SourceSummary"]


@dataclass(frozen=True)
class SourceSummary:
    """A source as it is drawn from."""

    name: str
    share: float
    """Share of the tokens that was asked for."""
    rows: int
    """Rows of one epoch."""
    cut_documents: int
    """Documents that are longer than a row and lose their end (with any packing but "stream")."""
    dropped_tokens: int
    """Tokens that no row holds: at the ends of shards (packing "stream") or of cut documents."""
    padding: float
    """Share of the rows' places that are padding."""


class Drawn(NamedTuple):
    """What a run has had of a source."""

    rows: int
    tokens: int
    """Tokens that it read, padding not counted."""
    epochs: float
    """How often it went through the source."""
    used_up_at: int | None
    """The step in which its budget was reached; None where it was not."""


class _Rows(NamedTuple):
    tokens_KW: NDArray[Any]
    counted_KT: NDArray[np.bool_] | None
    """Which targets count; None where all do."""
    documents_KW: NDArray[np.int32] | None = None
    """The number of each token's document within its row, where that is asked for."""


class Batches:
    """Rows of tokens by global sample index: any of them, at any time, in any number, always the same.

    With packing "stream" a row is a window of `sequence_length` + 1 tokens of one shard, windows being
    `sequence_length` apart, and what is left at a shard's end is dropped. With "documents" a row is one document,
    cut at `sequence_length` + 1 tokens and padded with `pad_id` on the right; padding never counts as a target. With
    "pairs" it is so too, and two documents that follow one another are rows 2i and 2i + 1 wherever they come. With
    "whole" a row is as many documents of one shard as fit, cut and padded in the same way (see `packing.packed`).

    With `document_masking`, rows of a stream say which document each token is of; rows of whole documents always do.
    The first token of a document is then no target: nothing in its own document comes before it, and the model does
    not see the document before.

    The rows of each source come in an order of their own, which is new in each epoch and keyed by the seed and the
    shards' sizes, so that another source beside it changes nothing. Sources alternate in a fixed pattern with exact
    shares of the tokens, to 1/65536 of the rows; a source that is gone through begins its next epoch, and one that
    has reached its budget leaves its place to the others.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seed: int,
        sequence_length: int,
        packing: Packing,
        batch_size: int,
        document_masking: bool = False,
        pad_id: int = 0,
        vocab_size: int | None = None,
        shuffled: bool = True,
        shard_group: int = 8,
    ) -> None:
        """Reads nothing: shards are fetched and opened when a row of theirs is needed, or shortly before; with packing
        "whole" alone all are looked at here.

        `vocab_size`: tokens from it on are refused. `shuffled` False gives the rows in the order in which they are
        stored. `shard_group`: shards that are read at a time.

        Raises UserError where a source has no row, or a budget of less than one.
        """
        if not sources:
            raise UserError("there is nothing to train on: no source of tokens is given")
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self._width = sequence_length + 1
        self.packing = packing
        self.together = rows_together(packing)
        """Rows that stay together."""
        self._pad_id = pad_id
        self._limit = vocab_size if vocab_size is not None else 1 << 31
        self._masked = packing == "whole" or (document_masking and packing == "stream")
        self._background = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._sources = [
            OpenSource(
                source,
                packing=packing,
                width=self._width,
                with_ends=self._masked,
                seed=seed,
                shuffled=shuffled,
                shard_group=shard_group,
                background=self._background,
            )
            for source in sources
        ]
        self._blend = Blend(
            [source.row_weight for source in self._sources], [source.limit for source in self._sources], self.together
        )
        self.fingerprint = self._identify(seed, shuffled, shard_group)
        """Changes with everything that decides which rows come when, the tokens themselves apart."""

    def _identify(self, seed: int, shuffled: bool, shard_group: int) -> str:
        layout = [self.sequence_length, self.packing, self._masked, self.batch_size, self._pad_id]
        sources = [[source.key, str(source.row_weight), source.limit] for source in self._sources]
        return sha256_bytes(canonical_json([[seed, shuffled, shard_group], layout, sources]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Begins to fetch no further shard in the background."""
        self._background.shutdown(wait=False, cancel_futures=True)

    @property
    def sources(self) -> list[SourceSummary]:
        """The sources in the order in which they were given."""
        total = sum(source.portion.weight for source in self._sources)
        return [
            SourceSummary(
                source.name,
                source.portion.weight / total,
                source.rows,
                source.cut_documents,
                source.dropped_tokens,
                source.padding,
            )
            for source in self._sources
        ]

    def require(self, steps: int) -> None:
        """Raises UserError, with the numbers, where all budgets together do not last for so many steps."""
        total = self._blend.total
        if total is None or steps * self.batch_size <= total:
            return
        lasting = total // self.batch_size
        budgets = ", ".join(f"{source.name} {source.limit:,} of its {source.rows:,}" for source in self._sources)
        raise UserError(
            f"{steps:,} steps of {self.batch_size:,} rows need {steps * self.batch_size:,} rows, but the budgets allow "
            f"{total:,} ({budgets}): raise one of them"
            + (f", or lower training.steps to {lasting:,} or less" if lasting else "")
        )

    def drawn(self, steps: int) -> list[Drawn]:
        """What the first steps have had of each source, in the order of the sources.

        With another packing than "stream" and an epoch that is not whole, the documents of that epoch are looked at.
        """
        rows = steps * self.batch_size
        return [
            Drawn(
                count,
                source.tokens_of(count),
                count / source.rows,
                -(-end // self.batch_size) if end is not None and end <= rows else None,
            )
            for source, count, end in zip(self._sources, self._blend.drawn(rows), self._blend.used_up, strict=True)
        ]

    def batch(self, step: int) -> Batch:
        """The global batch of a step, counted from 0."""
        return self.rows(step * self.batch_size, self.batch_size)

    def rows(self, first: int, count: int) -> Batch:
        """`count` rows from global sample index `first` on: int32 tokens and targets (count, T), bool mask (count, T),
        and with `document_masking` the int32 numbers of the documents (count, T).

        Raises UserError where a shard is damaged or a token is not below `vocab_size`, IndexError past all budgets.
        """
        return self._filled(count, self._blend.split(first, count))

    def source_rows(self, source: int, first: int, count: int) -> Batch:
        """`count` rows of one source alone, from `first` of its own rows on."""
        return self._filled(count, iter([Draw(source, slice(0, count), first, count)]))

    def _filled(self, count: int, draws: Iterator[Draw]) -> Batch:
        shape = (count, self.sequence_length)
        documents_BT = np.empty(shape, np.int32) if self._masked else None
        batch = Batch(np.empty(shape, np.int32), np.empty(shape, np.int32), np.empty(shape, np.bool_), documents_BT)
        for draw in draws:
            source = self._sources[draw.source]
            for located in source.located(draw.first, draw.rows):
                found, chosen = self._read(located, source.name), located.places
                into = draw.places if isinstance(chosen, slice) else np.arange(count)[draw.places][chosen]
                batch.tokens_BT[into] = found.tokens_KW[:, :-1]
                batch.targets_BT[into] = found.tokens_KW[:, 1:]
                batch.loss_mask_BT[into] = True if found.counted_KT is None else found.counted_KT
                if documents_BT is not None and found.documents_KW is not None:
                    documents_BT[into] = found.documents_KW[:, :-1]
            source.look_ahead(draw.first + draw.rows)
        return batch

    def _read(self, located: Located, source: str) -> _Rows:
        shard, rows_K = located.shard, located.rows
        if located.plan is not None:
            found = _Rows(*packed_rows(shard, located.plan, rows_K, self._width, self._pad_id))
        elif self.packing != "stream":
            found = _documents(shard, rows_K, self._width, self._pad_id)
        else:
            found = _windows(shard, rows_K, self._width)
            if self._masked:
                found = _apart(found, _document_numbers(shard, rows_K, self._width))
        largest = int(found.tokens_KW.max()) if self._limit <= np.iinfo(shard.tokens_N.dtype).max else 0
        if largest >= self._limit:
            raise UserError(
                f"{source} holds the token {largest}, but there are only {self._limit}: "
                f"were the tokens made with another tokenizer?"
            )
        return found


def _windows(shard: Shard, rows_K: Indices, width: int) -> _Rows:
    """Windows of `width` tokens that overlap by one."""
    tokens_KW = sliding_window_view(shard.tokens_N, width)[rows_K * (width - 1)]
    if shard.loss_mask_N is None:
        return _Rows(tokens_KW, None)
    return _Rows(tokens_KW, sliding_window_view(shard.loss_mask_N, width)[rows_K * (width - 1)][:, 1:] != 0)


def _document_numbers(shard: Shard, rows_K: Indices, width: int) -> NDArray[np.int32]:
    """The number of each token's document within its window, (K, W), counted from 0."""
    # Not signed: searching for another type would copy all the ends to a third.
    starts_K = (rows_K * (width - 1)).astype(np.uint64)
    firsts_K = np.searchsorted(shard.document_ends_D, starts_K, "right")
    counts_K = np.searchsorted(shard.document_ends_D, starts_K + np.uint64(width - 1), "right") - firsts_K
    # Those of the first window, then those of the second, and so on.
    windows_E = np.repeat(np.arange(rows_K.size), counts_K)
    ends_E = np.arange(windows_E.size) + np.repeat(firsts_K - np.cumsum(counts_K) + counts_K, counts_K)
    begins_KW = np.zeros((rows_K.size, width), np.int32)
    np.add.at(begins_KW, (windows_E, (shard.document_ends_D[ends_E] - starts_K[windows_E]).astype(np.int64)), 1)
    return np.cumsum(begins_KW, axis=1, dtype=np.int32)


def _apart(rows: _Rows, documents_KW: NDArray[np.int32]) -> _Rows:
    """Rows whose documents do not know of each other: what a document begins with is no target."""
    counted_KT = documents_KW[:, 1:] == documents_KW[:, :-1]
    if rows.counted_KT is not None:
        counted_KT &= rows.counted_KT
    return _Rows(rows.tokens_KW, counted_KT, documents_KW)


def _documents(shard: Shard, rows_K: Indices, width: int, pad_id: int) -> _Rows:
    """One document to a row, cut at `width` tokens and padded on the right."""
    starts_K, ends_K = document_spans(shard, rows_K)
    real_KW = np.arange(width) < (ends_K - starts_K)[:, None]
    if not shard.tokens_N.size:  # nothing but empty documents, from which `take` takes nothing
        return _Rows(np.full(real_KW.shape, pad_id), real_KW[:, 1:])
    places_KW = starts_K[:, None] + np.arange(width)
    tokens_KW = np.where(real_KW, shard.tokens_N.take(places_KW, mode="clip"), pad_id)
    counted_KT = real_KW[:, 1:]
    if shard.loss_mask_N is not None:
        counted_KT = counted_KT & (shard.loss_mask_N.take(places_KW[:, 1:], mode="clip") != 0)
    return _Rows(tokens_KW, counted_KT)
