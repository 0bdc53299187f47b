"""The one sampler of every engine: which token follows, given logits and the row's tokens so far.

The order and the semantics are those of `transformers`: repetition penalty, temperature, top-k, top-p. Random
numbers are keyed by seed, row and position, so that a row's choices depend neither on the rows beside it nor on the
engine.

B rows, V vocabulary.
"""

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from common.config import FrozenModel

_PHILOX_ROUNDS = 10
_PHILOX_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_PHILOX_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW_32 = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


class SamplingConfig(FrozenModel):
    """How text is continued."""

    max_new_tokens: int = Field(default=64, gt=0)
    """Most tokens that are appended to a prompt."""
    temperature: float = Field(default=0.0, ge=0)
    """Divides the logits; 0 always takes the most probable token."""
    top_k: int | None = Field(default=None, gt=0)
    """Only the k most probable tokens are drawn from; null for all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Only the most probable tokens that reach this probability together are drawn from; 1 for all."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Divides positive logits of tokens that the row has already, and multiplies negative ones; 1 for none."""
    seed: int = Field(default=0, ge=0, lt=1 << 64)
    """Keys the random numbers."""


def penalised(logits_BV: NDArray[np.float32], seen_BV: NDArray[np.bool_], penalty: float) -> NDArray[np.float32]:
    """Logits with a repetition penalty (Keskar et al., 2019) on the tokens that each row has seen."""
    factor = np.float32(penalty)
    return np.where(seen_BV, np.where(logits_BV < 0, logits_BV * factor, logits_BV / factor), logits_BV)


def most_probable(logits_BV: NDArray[np.float32], count: int) -> NDArray[np.bool_]:
    """Top-k: the tokens whose logit is at least the k-th largest, so that ties with it stay."""
    count = min(count, logits_BV.shape[1])
    least_B1 = np.partition(logits_BV, -count, axis=1)[:, -count, None]
    kept_BV: NDArray[np.bool_] = logits_BV >= least_B1
    return kept_BV


def nucleus(logits_BV: NDArray[np.float32], share: float) -> NDArray[np.bool_]:
    """Top-p (Holtzman et al., 2020): the fewest most probable tokens that reach `share` together, one at least."""
    order_BV = np.argsort(logits_BV, axis=1, kind="stable")
    rising_BV = np.cumsum(np.take_along_axis(probabilities(logits_BV), order_BV, axis=1), axis=1)
    sorted_BV = rising_BV > 1 - share
    sorted_BV[:, -1] = True
    kept_BV = np.empty_like(sorted_BV)
    np.put_along_axis(kept_BV, order_BV, sorted_BV, axis=1)
    return kept_BV


def probabilities(logits_BV: NDArray[np.float32]) -> NDArray[np.float64]:
    """Softmax in fp64."""
    shifted_BV = logits_BV.astype(np.float64) - logits_BV.max(axis=1, keepdims=True)
    weights_BV: NDArray[np.float64] = np.exp(shifted_BV)
    weights_BV /= weights_BV.sum(axis=1, keepdims=True)
    return weights_BV


def uniform(seed: int, rows_B: NDArray[np.int64], positions_B: NDArray[np.int64]) -> NDArray[np.float64]:
    """Numbers in [0, 1) keyed by (seed, row, position): Philox-4x32-10 (Salmon et al., 2011)."""
    rows, positions = rows_B.astype(np.uint64), positions_B.astype(np.uint64)
    counter = [rows & _LOW_32, rows >> _32, positions & _LOW_32, positions >> _32]
    keys = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    for _ in range(_PHILOX_ROUNDS):
        first, second = _PHILOX_MULTIPLIERS[0] * counter[0], _PHILOX_MULTIPLIERS[1] * counter[2]
        counter = [
            (second >> _32) ^ counter[1] ^ keys[0],
            second & _LOW_32,
            (first >> _32) ^ counter[3] ^ keys[1],
            first & _LOW_32,
        ]
        keys = [(key + step) & _LOW_32 for key, step in zip(keys, _PHILOX_WEYL, strict=True)]
    bits = (counter[0] << np.uint64(21)) ^ (counter[1] >> np.uint64(11))
    return bits.astype(np.float64) * 2.0**-53


def next_tokens(
    logits_BV: NDArray[np.float32],
    sampling: SamplingConfig,
    seen_BV: NDArray[np.bool_] | None,
    rows_B: NDArray[np.int64],
    positions_B: NDArray[np.int64],
) -> NDArray[np.int32]:
    """The token that each row goes on with, (B,).

    `seen_BV` says which tokens a row has, and may be None where nothing penalises them; `rows_B` and `positions_B`
    are each row's number in the whole job and the place of the new token in it.
    """
    if sampling.repetition_penalty != 1 and seen_BV is not None:
        logits_BV = penalised(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.temperature == 0:
        best_B: NDArray[np.int32] = np.argmax(logits_BV, axis=1).astype(np.int32)
        return best_B
    logits_BV = logits_BV / np.float32(sampling.temperature)
    nothing = np.float32(-np.inf)
    if sampling.top_k is not None:
        logits_BV = np.where(most_probable(logits_BV, sampling.top_k), logits_BV, nothing)
    if sampling.top_p < 1:
        logits_BV = np.where(nucleus(logits_BV, sampling.top_p), logits_BV, nothing)
    rising_BV = np.cumsum(probabilities(logits_BV), axis=1)
    # Rounding must not let the product reach the total: no token would be above it.
    ends_B = rising_BV[:, -1]
    drawn_B = np.minimum(uniform(sampling.seed, rows_B, positions_B) * ends_B, np.nextafter(ends_B, 0))
    chosen_B: NDArray[np.int32] = np.sum(rising_BV <= drawn_B[:, None], axis=1, dtype=np.int32)
    return chosen_B
