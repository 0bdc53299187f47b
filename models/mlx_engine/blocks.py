"""Causal attention of whole rows on a CPU: a block of queries at a time, each with the keys up to its end alone.

MLX's own computes the half of the scores that the mask hides, and its powers one at a time.

B rows, T positions, G key-value heads, R query heads of each, H = G · R, K head_dim, P positions of a block,
Q = R · P queries of a block, S keys that they see.
"""

import math
from collections.abc import Iterator

import mlx.core as mx

from models.mlx_engine.elementary import exp

_BLOCK = 64


def block_attention(
    q_BHTK: mx.array, k_BGTK: mx.array, v_BGTK: mx.array, scale: float, mask_BHTT: mx.array | None
) -> mx.array:
    """What each position reads of those up to itself, (B, H, T, K), all in fp32.

    mask_BHTT: boolean, (B or 1, 1, T, T), where they may not read all of those.
    """
    rows, heads, length, width = q_BHTK.shape
    groups = k_BGTK.shape[1]
    q_BGRTK = (q_BHTK * scale).reshape(rows, groups, heads // groups, length, width)
    hidden = [] if mask_BHTT is None else [mx.where(mask_BHTT, 0.0, -math.inf)]
    found: tuple[mx.array, ...] = _attention(q_BGRTK, k_BGTK, v_BGTK, *hidden)  # type: ignore[assignment]  # mx.custom_function has no types
    return found[0].reshape(q_BHTK.shape)


@mx.custom_function
def _attention(q_BGRTK: mx.array, k_BGTK: mx.array, v_BGTK: mx.array, *hidden: mx.array) -> tuple[mx.array, ...]:
    """What is read, (B, G, R, T, K), and the weights of each block, (B, G, Q, S)."""
    weights, mixed = [], []
    for places, keys in _blocks(q_BGRTK.shape[3]):
        scores_BGQS = _of_block(q_BGRTK, places) @ k_BGTK[:, :, keys].swapaxes(-1, -2)
        weights.append(_softmax(scores_BGQS, _hidden(places, keys, hidden)))
        mixed.append(weights[-1] @ v_BGTK[:, :, keys])
    return _whole(mixed, q_BGRTK.shape), *weights


@_attention.vjp
def _gradients(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    (q_BGRTK, k_BGTK, v_BGTK, *hidden), dmixed_BGRTK, (mixed_BGRTK, *weights) = primals, cotangents[0], outputs
    # The softmax's own sum over weights and their gradients, by way of what they mixed (Dao et al., 2022).
    sums_BGRT1 = (dmixed_BGRTK * mixed_BGRTK).sum(-1, keepdims=True)
    dq: list[mx.array] = []
    dk_BGTK, dv_BGTK = mx.zeros_like(k_BGTK), mx.zeros_like(v_BGTK)
    for (places, keys), weights_BGQS in zip(_blocks(q_BGRTK.shape[3]), weights, strict=True):
        q_BGQK, dmixed_BGQK, sums_BGQ1 = (_of_block(part, places) for part in (q_BGRTK, dmixed_BGRTK, sums_BGRT1))
        dweights_BGQS = dmixed_BGQK @ v_BGTK[:, :, keys].swapaxes(-1, -2)
        dscores_BGQS = weights_BGQS * (dweights_BGQS - sums_BGQ1)
        dq.append(dscores_BGQS @ k_BGTK[:, :, keys])
        dk_BGTK[:, :, keys] += dscores_BGQS.swapaxes(-1, -2) @ q_BGQK
        dv_BGTK[:, :, keys] += weights_BGQS.swapaxes(-1, -2) @ dmixed_BGQK
    return _whole(dq, q_BGRTK.shape), dk_BGTK, dv_BGTK, *map(mx.zeros_like, hidden)


def _blocks(length: int) -> Iterator[tuple[slice, slice]]:
    """The positions of each block, and those that it sees."""
    for start in range(0, length, _BLOCK):
        end = min(length, start + _BLOCK)
        yield slice(start, end), slice(0, end)


def _of_block(x_BGRTK: mx.array, places: slice) -> mx.array:
    """(B, G, Q, K): a group's heads one after another, so that products are of plain matrices."""
    rows, groups, _, _, width = x_BGRTK.shape
    return x_BGRTK[:, :, :, places].reshape(rows, groups, -1, width)


def _whole(blocks: list[mx.array], shape: tuple[int, ...]) -> mx.array:
    """(B, G, R, T, K) out of the blocks' (B, G, Q, K)."""
    rows, groups, heads, _, width = shape
    return mx.concatenate([block.reshape(rows, groups, heads, -1, width) for block in blocks], axis=3)


def _hidden(places: slice, keys: slice, hidden: tuple[mx.array, ...]) -> mx.array:
    """What is added to a block's scores: -inf for what it may not read, else 0; (P, S), or (B or 1, 1, 1, P, S)."""
    if hidden:
        return hidden[0][:, :, None, places, keys]
    later_PS = mx.arange(keys.stop) > mx.arange(places.start, places.stop)[:, None]
    return mx.where(later_PS, -math.inf, 0.0)


def _softmax(scores_BGQS: mx.array, hidden: mx.array) -> mx.array:
    """Every query may read one key at least."""
    rows, groups, _, seen = scores_BGQS.shape
    scores_BGRPS = scores_BGQS.reshape(rows, groups, -1, hidden.shape[-2], seen) + hidden
    powers_BGRPS = exp(scores_BGRPS - scores_BGRPS.max(-1, keepdims=True))
    return (powers_BGRPS * (1 / powers_BGRPS.sum(-1, keepdims=True))).reshape(scores_BGQS.shape)
