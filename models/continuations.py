"""Continuations of what a cache holds, without their padding: the same for every engine.

B rows, T positions of a row as it is given, S those of the longest row without padding, C known positions of a cache,
U = C + S, N positions that are there, M targets that count.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.config import ModelConfig
from models.engine import Batch, Scored


class Continuations(NamedTuple):
    """The positions of a batch that targets depend on, moved up in each row to where its first one stands."""

    tokens_BS: NDArray[np.int32]
    positions_BS: NDArray[np.int32]
    """Each document's from where its row's prefix ends; 0 where nothing stands."""
    documents_BS: NDArray[np.int32]
    """The number of each position's document, from 0 on; -1 where nothing stands."""
    rows_M: NDArray[np.int32]
    """The row of each counted target, in the order of the batch."""
    places_M: NDArray[np.int32]
    """Where it stands there."""
    targets_M: NDArray[np.int32]
    counted_BT: NDArray[np.bool_]
    """Where they stood in the batch."""

    def mask_BSU(self, lengths_B: NDArray[np.int64], known: int) -> NDArray[np.bool_]:
        """What each position may read of `known` cached ones and, behind them, of these: (B, S, U).

        Padding reads too, so that no softmax is empty.
        """
        here_S = np.arange(self.documents_BS.shape[1])
        own_BSS = (self.documents_BS[:, :, None] == self.documents_BS[:, None]) & (here_S[:, None] >= here_S)
        seen_BC = np.arange(known) < lengths_B[:, None]
        return np.concatenate((np.broadcast_to(seen_BC[:, None], (*own_BSS.shape[:2], known)), own_BSS), axis=2)

    def scored(self, log_probabilities_M: NDArray[np.float32], greedy_M: NDArray[np.bool_]) -> Scored:
        """What was found of each target, where it stood; 0 and False elsewhere."""
        found = Scored(np.zeros(self.counted_BT.shape, np.float32), np.zeros(self.counted_BT.shape, np.bool_))
        found.log_probabilities_BT[self.counted_BT] = log_probabilities_M
        found.greedy_BT[self.counted_BT] = greedy_M
        return found


def continuations(batch: Batch, lengths_B: NDArray[np.int64], config: ModelConfig) -> Continuations:
    """The continuations in a batch of prefixes that are so long.

    Raises ValueError for other rows than the prefixes', for tokens, counted targets or documents that are not as they
    have to be, and where a prefix and a document behind it are longer than the model.
    """
    _check(batch, lengths_B, config)
    counted_BT, places_T = batch.loss_mask_BT, np.arange(batch.tokens_BT.shape[1])
    documents_BT = np.zeros_like(batch.tokens_BT) if batch.documents_BT is None else batch.documents_BT
    begins_BT = np.ones(counted_BT.shape, np.bool_)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    numbers_BT = begins_BT.cumsum(1)
    # Attention is causal: what stands behind a document's last counted target touches none.
    next_BT = np.minimum.accumulate(np.where(counted_BT, places_T, len(places_T))[:, ::-1], axis=1)[:, ::-1]
    inside_BT = np.minimum(next_BT, len(places_T) - 1)
    real_BT = (next_BT < len(places_T)) & (np.take_along_axis(numbers_BT, inside_BT, axis=1) == numbers_BT)
    starts_BT = np.maximum.accumulate(np.where(begins_BT, places_T, 0), axis=1)
    positions_BT = lengths_B[:, None] + places_T - starts_BT
    longest = int(positions_BT.max(where=real_BT, initial=-1)) + 1
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"prefixes with continuations of up to {longest} tokens: at most {config.max_position_embeddings} "
            "positions were expected"
        )

    shape = (len(counted_BT), int(real_BT.sum(1).max(initial=1)))  # MLX has no rows of nothing
    rows_N, places_N = np.nonzero(real_BT)[0], real_BT.cumsum(1)[real_BT] - 1
    counted_N = counted_BT[real_BT]

    def moved(array_BT: NDArray[np.integer], empty: int) -> NDArray[np.int32]:
        found_BS = np.full(shape, empty, np.int32)
        found_BS[rows_N, places_N] = array_BT[real_BT]
        return found_BS

    return Continuations(
        tokens_BS=moved(batch.tokens_BT, 0),
        positions_BS=moved(positions_BT, 0),
        documents_BS=moved(numbers_BT - 1, -1),
        rows_M=rows_N[counted_N].astype(np.int32),
        places_M=places_N[counted_N].astype(np.int32),
        targets_M=batch.targets_BT[counted_BT].astype(np.int32),
        counted_BT=counted_BT,
    )


def _check(batch: Batch, lengths_B: NDArray[np.int64], config: ModelConfig) -> None:
    shape = batch.tokens_BT.shape
    if len(shape) != 2 or shape[0] != len(lengths_B):
        raise ValueError(f"tokens of shape {shape}: {len(lengths_B)} rows, as in the cache, were expected")
    for what, ids in (("tokens", batch.tokens_BT), ("targets", batch.targets_BT[batch.loss_mask_BT])):
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
            raise ValueError(f"{what} from {ids.min()} to {ids.max()} for a vocabulary of {config.vocab_size}")
    documents_BT = batch.documents_BT
    if documents_BT is not None and (documents_BT.shape != shape or (documents_BT[:, 1:] < documents_BT[:, :-1]).any()):
        raise ValueError(f"documents of shape {documents_BT.shape}: numbers that rise along each row were expected")
