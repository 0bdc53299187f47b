"""From batches on the host to arrays of fixed shapes, which are all that a compiled function takes.

Suffixes: A micro-batches, B rows, T positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.config import ModelConfig
from models.engine import Batch

_FINEST_LENGTH = 16
"""Lengths in buckets are multiples of this, unless the model takes no such."""


class HostBatches(NamedTuple):
    """Micro-batches of one shape, as fresh arrays that nobody else can change."""

    tokens_ABT: NDArray[np.int32]
    targets_ABT: NDArray[np.int32]
    """Within the vocabulary even where they do not count."""
    counted_ABT: NDArray[np.bool_]
    documents_ABT: NDArray[np.int32] | None


def check_tokens(tokens_BT: NDArray[np.int32], config: ModelConfig) -> None:
    """Raises ValueError for rows that the model cannot read: a device would take other ones without a word."""
    longest, vocab_size = config.max_position_embeddings, config.vocab_size
    if tokens_BT.ndim != 2 or tokens_BT.shape[1] > longest:
        raise ValueError(f"tokens of shape {tokens_BT.shape}: rows of at most {longest} positions were expected")
    if tokens_BT.size and not 0 <= int(tokens_BT.min()) <= int(tokens_BT.max()) < vocab_size:
        raise ValueError(f"tokens from {tokens_BT.min()} to {tokens_BT.max()} for a vocabulary of {vocab_size}")


def check_batch(batch: Batch, config: ModelConfig, counted_BT: NDArray[np.bool_]) -> None:
    """Raises ValueError for tokens, counted targets or documents that are not as they have to be."""
    check_tokens(batch.tokens_BT, config)
    targets, vocab_size = batch.targets_BT[counted_BT], config.vocab_size
    if targets.size and not 0 <= int(targets.min()) <= int(targets.max()) < vocab_size:
        raise ValueError(f"targets from {targets.min()} to {targets.max()} for a vocabulary of {vocab_size}")
    documents_BT = batch.documents_BT
    if documents_BT is None:
        return
    if documents_BT.shape != batch.tokens_BT.shape or (documents_BT[:, 1:] < documents_BT[:, :-1]).any():
        raise ValueError(f"documents of shape {documents_BT.shape}: numbers that rise along each row were expected")


def stacked(micro_batches: Sequence[Batch], rows: int, length: int) -> HostBatches:
    """Micro-batches padded on the right and below with positions that do not count, one above another."""
    shape = (len(micro_batches), rows, length)
    documents_ABT = None
    if any(batch.documents_BT is not None for batch in micro_batches):
        documents_ABT = np.zeros(shape, np.int32)
    found = HostBatches(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.bool_), documents_ABT)
    for number, batch in enumerate(micro_batches):
        of_batch, positions = batch.tokens_BT.shape
        place = (number, slice(of_batch), slice(positions))
        found.tokens_ABT[place] = batch.tokens_BT
        found.targets_ABT[place] = np.where(batch.loss_mask_BT, batch.targets_BT, 0)
        found.counted_ABT[place] = batch.loss_mask_BT
        if documents_ABT is not None and batch.documents_BT is not None:
            documents_ABT[place] = batch.documents_BT
    return found


def largest(micro_batches: Sequence[Batch]) -> tuple[int, int]:
    """The most rows and the most positions of any."""
    rows, lengths = zip(*(batch.tokens_BT.shape for batch in micro_batches), strict=True)
    return max(rows), max(lengths)


def multiple(size: int, of: int) -> int:
    """The smallest multiple of `of` that is not below a size."""
    return -(-size // of) * of


def bucket(size: int, finest: int = 1) -> int:
    """The size that one is padded to, so that few shapes are compiled: four to each doubling, at most a fourth more."""
    step = max(finest, 1 << max(0, (size - 1).bit_length() - 3))
    return multiple(max(size, 1), step)


def length_bucket(length: int, longest: int) -> int:
    """The length that rows are padded to, which the model still takes."""
    return min(bucket(length, _FINEST_LENGTH), max(length, longest))


def doubled(size: int) -> int:
    """The next power of two: fewer shapes still, for what shrinks row by row."""
    return 1 << max(0, size - 1).bit_length()
