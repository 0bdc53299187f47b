"""Sources of tokens: what is known of one before any of its shards is there, and its shards, opened as rows need them.

K rows taken from one shard, W tokens of a row and the target after it, D documents.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import UserError
from common.files import canonical_json, sha256_bytes
from models.training.config import Packing, Portion
from models.training.order import Indices, RowOrder
from models.training.packing import Plan, document_spans, packed
from models.training.shards import Shard, ShardCounts, check_document_ends, open_shard

_SCAN_ROWS = 1 << 18


def rows_together(packing: Packing) -> int:
    """How many rows, one after the other in their shard, stay together wherever they come."""
    return 2 if packing == "pairs" else 1


@dataclass(frozen=True)
class Source:
    """Token shards that are drawn from together. What is counted here decides every row, and no file is needed for it;
    rows of whole documents alone depend on where each document ends."""

    name: str
    """What it is called in errors and tables."""
    split: str
    """The split of the documents, for errors."""
    shards: Sequence[ShardCounts]
    """Its shards, in order."""
    lengths: Sequence[tuple[int, int]]
    """Each length of a document in tokens, with the number of documents that have it."""
    fetch: Callable[[str], Path]
    """Gives the path of a shard by its name, whole and ready to be read; any thread may ask."""
    portion: Portion
    """How much of a blend comes from it."""


class LazyShards:
    """The shards of a source: opened at their first row, or in the background when they are expected before."""

    def __init__(self, source: Source, with_ends: bool, keep: int, background: Executor) -> None:
        """`with_ends`: whether the documents' ends are of use, and so are checked. `keep`: shards that stay open."""
        self._source = source
        self._with_ends = with_ends
        self._keep = keep
        self._background = background
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._coming: dict[int, Future[Shard]] = {}

    def __len__(self) -> int:
        return len(self._source.shards)

    def __getitem__(self, number: int) -> Shard:
        """A shard. Raises UserError where it is damaged, and what fetching it raised, in the background too."""
        shard = self._open.get(number)
        if shard is None:
            coming = self._coming.pop(number, None)
            # What has not begun yet waits behind others, and this one is needed now.
            shard = self._opened(number) if coming is None or coming.cancel() else coming.result()
            self._open[number] = shard
            if len(self._open) > self._keep:
                self._open.popitem(last=False)
        return shard

    def expect(self, numbers: Iterable[int]) -> None:
        """Begins to open some shards in the background."""
        for number in numbers:
            if number not in self._open and number not in self._coming:
                self._coming[number] = self._background.submit(self._opened, number)

    def _opened(self, number: int) -> Shard:
        counts = self._source.shards[number]
        file = open_shard(self._source.fetch(counts.name))
        if (file.token_count, file.document_count) != (counts.tokens, counts.documents):
            raise UserError(
                f"{file.path} holds {file.token_count:,} tokens in {file.document_count:,} documents, but the tokens' "
                f"description says {counts.tokens:,} in {counts.documents:,}; make the tokens again"
            )
        shard = file.map()
        if self._with_ends:
            check_document_ends(shard, file.path)
        return shard


class Located(NamedTuple):
    """Rows that stand in one shard."""

    shard: Shard
    plan: Plan | None
    """Which documents its rows hold, with packing "whole"."""
    places: Indices | slice
    """Which of the rows that were asked for these are."""
    rows: Indices
    """Their numbers in the shard."""


class OpenSource:
    """A source as rows of some width: how many there are, in which order they come, and what is left out."""

    def __init__(
        self,
        source: Source,
        *,
        packing: Packing,
        width: int,
        with_ends: bool,
        seed: int,
        shuffled: bool,
        shard_group: int,
        background: Executor,
    ) -> None:
        """Raises UserError where there are not enough tokens for a row, or a budget is less than a row.

        With packing "whole" each shard is opened once here: how many rows it has depends on every document's length.
        Conversations to tune on are few shards; the rows' plans take some ten bytes for each document.
        """
        self.name = source.name
        self.portion = source.portion
        self.together = rows_together(packing)
        self._width = width
        self._packing = packing
        self._plans: list[Plan] = []
        self.shards = LazyShards(source, with_ends or packing != "stream", 2 * shard_group, background)
        lengths, counts = np.array(source.lengths, np.int64).reshape(-1, 2).T
        tokens = sum(shard.tokens for shard in source.shards)
        if packing == "stream":
            per_shard = [max(0, (shard.tokens - 1) // (width - 1)) for shard in source.shards]
            self.tokens = sum(per_shard) * (width - 1)
            """Tokens of one epoch's rows; in a stream the last token of a shard's last row is no other's first."""
            held = self.tokens + sum(count > 0 for count in per_shard)
            self.cut_documents = 0
        else:
            if packing == "whole":
                self._plans = [packed(self.shards[number].document_ends_D, width) for number in range(len(self.shards))]
                per_shard = [len(plan.ends_K) for plan in self._plans]
            else:
                self._check_pairs(source)
                per_shard = [shard.documents for shard in source.shards]
            self.tokens = held = int(np.minimum(lengths, width) @ counts)
            self.cut_documents = int(counts[lengths > width].sum())
        self.dropped_tokens = tokens - held
        self.rows = sum(per_shard)
        if not self.rows:
            raise UserError(
                f"the {source.split} split of {self.name} has not enough tokens for one row of {width}: "
                f"it has {tokens:,} in {len(per_shard)} shards"
            )
        self.padding = 0.0 if packing == "stream" else 1 - self.tokens / (self.rows * width)
        """Share of the rows' places that are padding."""
        self.row_tokens = Fraction(max(1, self.tokens), self.rows)
        """Tokens of a row, on average."""
        # Shares are of tokens: a source of short documents has more rows of its share than one of long ones.
        self.row_weight = Fraction(str(source.portion.weight)) / self.row_tokens
        self.limit = self._limit()
        """Rows at most of a run, None for any number."""
        sizes = [[shard.tokens, shard.documents] for shard in source.shards]
        self.key = sha256_bytes(canonical_json([seed, packing, width, sizes]))
        self.order = RowOrder([rows // self.together for rows in per_shard], self.key, shard_group, shuffled)
        self._shard_group = shard_group

    def _check_pairs(self, source: Source) -> None:
        for shard in source.shards:
            if shard.documents % self.together:
                raise UserError(
                    f"{source.name} has a shard of {shard.documents:,} documents, {shard.name}, and packing 'pairs' "
                    f"takes them by two: make the tokens with loss_on: pairs"
                )

    def _limit(self) -> int | None:
        budget, epochs = self.portion.budget, self.portion.epochs
        limits = []
        if budget is not None:
            limits.append(math.floor(budget / self.row_tokens))
        if epochs is not None:
            limits.append(math.floor(Fraction(str(epochs)) * self.rows))
        limits = [limit // self.together * self.together for limit in limits]
        if 0 in limits:
            raise UserError(
                f"the budget of {self.name} is less than one {'row' if self.together == 1 else 'pair'}, which has "
                f"{float(self.row_tokens * self.together):,.1f} tokens of its {self.tokens:,}; raise it or leave "
                f"{self.name} out"
            )
        return min(limits, default=None)

    def look_ahead(self, index: int) -> None:
        """Begins to open the shards that are needed after an index of the source's rows."""
        if len(self.shards) > self._shard_group:
            self.shards.expect(self.order.following(index // self.together))

    def tokens_of(self, rows: int) -> int:
        """Tokens of the first `rows` rows in their order, padding not counted; opens the shards that they are in,
        where packing is not "stream" and the last epoch not whole."""
        if self._packing == "stream":
            return rows * (self._width - 1)
        epochs, rest = divmod(rows, self.rows)
        return epochs * self.tokens + sum(
            self._tokens_in(found)
            for first in range(rows - rest, rows, _SCAN_ROWS)
            for found in self.located(first, min(_SCAN_ROWS, rows - first))
        )

    def _tokens_in(self, found: Located) -> int:
        if found.plan is not None:
            return int(found.plan.tokens_K[found.rows].sum())
        starts_K, ends_K = document_spans(found.shard, found.rows)
        return int(np.minimum(ends_K - starts_K, self._width).sum())

    def located(self, first: int, count: int) -> Iterator[Located]:
        """The shards that hold `count` of the source's rows from `first` on."""
        shards_N, rows_N = self._ordered(first, count)
        if (shards_N == shards_N[:1]).all():
            if count:
                yield self._located(int(shards_N[0]), slice(None), rows_N)
            return
        by_shard = np.argsort(shards_N, kind="stable")
        cuts = np.flatnonzero(np.diff(shards_N[by_shard])) + 1
        parts = np.split(by_shard, cuts)
        numbers = [int(shards_N[part[0]]) for part in parts]
        # From the other end, so that two threads open what a first batch needs and never the same.
        self.shards.expect(reversed(numbers[: self._shard_group]))
        for number, part in zip(numbers, parts, strict=True):
            yield self._located(number, part, rows_N[part])

    def _located(self, number: int, places: Indices | slice, rows_N: Indices) -> Located:
        return Located(self.shards[number], self._plans[number] if self._plans else None, places, rows_N)

    def _ordered(self, first: int, count: int) -> tuple[Indices, Indices]:
        """The shard and the row in it for `count` of the source's rows from `first` on; pairs are in order as such."""
        if self.together == 1:
            return self.order.locate(first, count)
        begin, end = first // self.together, -(-(first + count) // self.together)
        shards_N, groups_N = self.order.locate(begin, end - begin)
        rows_N = (groups_N[:, None] * self.together + np.arange(self.together)).reshape(-1)
        part = slice(first - begin * self.together, first + count - begin * self.together)
        return shards_N.repeat(self.together)[part], rows_N[part]
