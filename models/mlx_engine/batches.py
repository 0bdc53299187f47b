"""From a batch to the arrays of fixed shapes that compiled functions take.

B rows, T positions, P processes, R = ⌈B / P⌉ rows of this process, or a few more so that some stay together.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.engine import Batch


class Rows(NamedTuple):
    """Rows on the host, on their way to the device."""

    tokens_RT: NDArray[np.int32]
    targets_RT: NDArray[np.int32]
    counted_RT: NDArray[np.bool_]
    """Which targets count in the loss."""
    real_RT: NDArray[np.bool_]
    """Positions up to the last counted target of their context: attention is causal, so later ones touch no loss."""
    documents_RT: NDArray[np.int32] | None
    """None where a row is one context."""
    positions_RT: NDArray[np.int32] | None
    """Places in the documents; None where a row is one context."""


def check_tokens(tokens_BT: NDArray[np.int32], vocab_size: int, longest: int) -> None:
    """Raises ValueError for rows that the model cannot read."""
    if tokens_BT.ndim != 2 or tokens_BT.shape[1] > longest:
        raise ValueError(f"tokens of shape {tokens_BT.shape}: rows of at most {longest} positions were expected")
    _check_range("tokens", tokens_BT, vocab_size)


def check_batch(batch: Batch, vocab_size: int, longest: int) -> None:
    """Raises ValueError for tokens, targets or documents that are not as they have to be."""
    check_tokens(batch.tokens_BT, vocab_size, longest)
    _check_range("targets", batch.targets_BT[batch.loss_mask_BT], vocab_size)
    documents_BT = batch.documents_BT
    if documents_BT is not None and (
        documents_BT.shape != batch.tokens_BT.shape or (documents_BT[:, 1:] < documents_BT[:, :-1]).any()
    ):
        raise ValueError(f"documents of shape {documents_BT.shape}: numbers that rise along each row were expected")


def _check_range(what: str, ids: NDArray[np.int32], vocab_size: int) -> None:
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"{what} from {ids.min()} to {ids.max()} for a vocabulary of {vocab_size}")


def rows_of(batch: Batch, process: int, processes: int, at_least: int = 0, together: int = 1) -> Rows:
    """The rows of one process, filled up with rows that count nothing: with as many as all processes have, and to
    `at_least` so many; `together` at a time stay together."""
    rows, length = batch.tokens_BT.shape
    count = -(-max(-(-rows // processes), at_least) // together) * together
    start = min(process * count, rows)
    mine = batch.part(slice(start, min(start + count, rows)))
    missing = ((0, count - len(mine.tokens_BT)), (0, 0))
    counted_RT = np.pad(mine.loss_mask_BT, missing)
    # A target that does not count may be anything at all.
    targets_RT = np.where(counted_RT, np.pad(mine.targets_BT, missing), 0).astype(np.int32)
    documents_RT = None if mine.documents_BT is None else np.pad(mine.documents_BT, missing)
    starts_RT = np.zeros((count, length), np.int64) if documents_RT is None else _starts(documents_RT)
    return Rows(
        tokens_RT=np.pad(mine.tokens_BT, missing).astype(np.int32),
        targets_RT=targets_RT,
        counted_RT=counted_RT,
        real_RT=_real(counted_RT, starts_RT),
        documents_RT=documents_RT,
        positions_RT=None if documents_RT is None else (np.arange(length) - starts_RT).astype(np.int32),
    )


def real_positions(batch: Batch) -> int:
    """How many positions of a batch are real."""
    return int(rows_of(batch, 0, 1).real_RT.sum())


def _starts(documents_RT: NDArray[np.int32]) -> NDArray[np.int64]:
    """The position in its row at which each position's document begins."""
    begins_RT = np.ones(documents_RT.shape, np.bool_)
    begins_RT[:, 1:] = documents_RT[:, 1:] != documents_RT[:, :-1]
    return np.maximum.accumulate(np.where(begins_RT, np.arange(documents_RT.shape[1]), 0), axis=1)


def _real(counted_RT: NDArray[np.bool_], starts_RT: NDArray[np.int64]) -> NDArray[np.bool_]:
    rows, length = counted_RT.shape
    contexts = (np.arange(rows)[:, None] * length + starts_RT).reshape(-1)
    last = np.full(rows * length, -1, np.int64)
    places = np.flatnonzero(counted_RT)
    np.maximum.at(last, contexts[places], places)
    real_RT: NDArray[np.bool_] = (np.arange(rows * length) <= last[contexts]).reshape(rows, length)
    return real_RT
