"""Rows of whole documents: which documents of a shard stand in a row together, and those rows read.

D documents, K rows, W tokens of a row and the target after it, E documents of the rows that are read, one row's after
another's.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.training.order import Indices
from models.training.shards import Shard


class Plan(NamedTuple):
    """The rows of a shard."""

    documents_D: NDArray[np.uint32]
    """Numbers of the documents, row by row, rising within a row; empty documents are in none."""
    ends_K: NDArray[np.uint32]
    """How many documents stand in the rows up to and with each."""
    tokens_K: NDArray[np.uint32]
    """Tokens of each row, padding not counted."""


def document_spans(shard: Shard, documents_K: Indices) -> tuple[Indices, Indices]:
    """Where documents of a shard start and end, by their numbers."""
    ends_K = shard.document_ends_D[documents_K].astype(np.int64)
    starts_K = np.where(documents_K > 0, shard.document_ends_D[np.maximum(documents_K - 1, 0)], 0).astype(np.int64)
    return starts_K, ends_K


def packed(document_ends_D: NDArray[np.uint64], width: int) -> Plan:
    """Packs documents into rows of `width` tokens, longer ones without their ends: best fit, the longest first.

    That comes within 22% of the fewest rows that hold them (Johnson et al., 1974) and is far closer where most
    documents are shorter than half a row (Ding et al., arXiv 2404.10830). Rows are in the stored order of the document
    that opened each, which is its longest, so that the first rows are not those of the longest documents of all.
    """
    lengths_D = np.minimum(np.diff(document_ends_D, prepend=np.uint64(0)), width).astype(np.int64)
    longest_first = np.argsort(-lengths_D, kind="stable")[: np.count_nonzero(lengths_D)]
    row_D = np.empty(longest_first.size, np.int64)
    openers: list[int] = []
    rows_with: list[list[int]] = [[] for _ in range(width)]  # by how much room they have left
    rooms = 0  # a bit for each room that some row has
    for place, document in enumerate(longest_first.tolist()):
        length = int(lengths_D[document])
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[room].pop()
            if not rows_with[room]:
                rooms ^= 1 << room
        else:
            room, row = width, len(openers)
            openers.append(document)
        row_D[place] = row
        if room > length:
            rows_with[room - length].append(row)
            rooms |= 1 << room - length
    rank_K = np.empty(len(openers), np.int64)
    rank_K[np.argsort(openers)] = np.arange(len(openers))
    row_D = rank_K[row_D]
    counts_K = np.bincount(row_D, minlength=len(openers))
    tokens_K = np.bincount(row_D, lengths_D[longest_first], len(openers))
    documents_D = longest_first[np.lexsort((longest_first, row_D))]
    return Plan(documents_D.astype(np.uint32), np.cumsum(counts_K).astype(np.uint32), tokens_K.astype(np.uint32))


def packed_rows(
    shard: Shard, plan: Plan, rows_K: Indices, width: int, pad_id: int
) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.int32]]:
    """Tokens (K, W), which targets count (K, T) and the number of each token's document (K, W).

    Padding on the right is a document of its own, in which nothing counts; neither does what a document begins with.
    """
    ends_K = plan.ends_K[rows_K].astype(np.int64)
    counts_K = ends_K - np.where(rows_K > 0, plan.ends_K[np.maximum(rows_K - 1, 0)], 0)
    firsts_K = ends_K - counts_K
    starts_E, stops_E = document_spans(shard, plan.documents_D[_ranges(firsts_K, counts_K)].astype(np.int64))
    lengths_E = np.minimum(stops_E - starts_E, width)
    real_KW = np.arange(width) < plan.tokens_K[rows_K][:, None]
    places = _ranges(starts_E, lengths_E)
    tokens_KW = np.full(real_KW.shape, pad_id, np.int64)
    tokens_KW[real_KW] = shard.tokens_N[places]
    documents_KW = np.repeat(counts_K[:, None], width, axis=1).astype(np.int32)
    documents_KW[real_KW] = np.repeat(_ranges(np.zeros_like(counts_K), counts_K), lengths_E)
    counted_KW = real_KW.copy()
    if shard.loss_mask_N is not None:
        counted_KW[real_KW] = shard.loss_mask_N[places] != 0
    return tokens_KW, counted_KW[:, 1:] & (documents_KW[:, 1:] == documents_KW[:, :-1]), documents_KW


def _ranges(starts_E: Indices, counts_E: Indices) -> Indices:
    """The numbers from each start on, as many as its count, one after another."""
    return np.arange(counts_E.sum()) + np.repeat(starts_E - np.cumsum(counts_E) + counts_E, counts_E)
