"""What direct preference optimization (Rafailov et al., arXiv 2305.18290) is in every engine, on the host.

Rows 2i and 2i + 1 of a batch are a pair: a chosen and a rejected answer to the same prompt. A row's reward is
beta · (log π − log ρ), summed over its counted targets, of the trained model π over the reference model ρ; a pair's
margin z is the chosen row's reward less the rejected one's, and its loss −log σ(z).

B rows, P = B / 2 pairs, T positions, F = 4 figures of a pair: its loss, whether its margin is positive, and the rewards
of its two rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from models.engine import Batch

FIGURES = 4
"""F."""


@dataclass(frozen=True)
class PreferenceFigures:
    """Means over pairs."""

    accuracy: float
    """Share of the pairs with a positive margin; equal rewards, as before the first step, are none."""
    chosen_reward: float
    """Mean reward of the chosen rows: below 0 where the model writes them less readily than the reference does."""
    rejected_reward: float
    """The same of the rejected ones."""
    margin: float
    """Mean margin."""

    @classmethod
    def of(cls, means: Sequence[float]) -> Self:
        """From the means of the figures behind the loss."""
        accuracy, chosen, rejected = means
        return cls(accuracy, chosen, rejected, chosen - rejected)


def pairs_that_count(batch: Batch) -> NDArray[np.bool_]:
    """Which pairs are compared, (P,): those with a counted target in both rows.

    Raises ValueError for a number of rows that is odd, and for rows of several documents.
    """
    if len(batch.tokens_BT) % 2 or batch.documents_BT is not None:
        raise ValueError(
            f"{len(batch.tokens_BT)} rows{' of several documents' if batch.documents_BT is not None else ''}: "
            f"pairs of rows with one document each were expected"
        )
    counted_B: NDArray[np.bool_] = np.logical_or.reduce(batch.loss_mask_BT, axis=1)
    return counted_B[0::2] & counted_B[1::2]


def counted_pairs(micro_batches: Sequence[Batch]) -> int:
    """How many pairs count in the loss of a step. Raises as `pairs_that_count` does, and UserError where none does."""
    counted = sum(int(pairs_that_count(batch).sum()) for batch in micro_batches)
    if not counted:
        raise UserError(
            "a batch has no pair of which a token counts in both rows: nothing of the answers is left in such short "
            "rows; give training a longer sequence_length"
        )
    return counted


def summed_figures(rewards_B: NDArray[np.float32], batch: Batch) -> NDArray[np.float64]:
    """The sums of the figures over the pairs that count, (F,), from the rows' rewards."""
    rewards_P2 = rewards_B.astype(np.float64).reshape(-1, 2)[pairs_that_count(batch)]
    margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    found: NDArray[np.float64] = np.array(
        [np.logaddexp(0, -margins_P).sum(), (margins_P > 0).sum(), *rewards_P2.sum(0)], np.float64
    )
    return found
