"""Causal attention for CPUs: a block of queries at a time, each with the keys up to its end alone.

XLA's plain attention computes the half of the scores that the mask hides, and remembers more of them than the
gradient needs.

Suffixes: B rows, T positions, G key-value heads, R query heads of each, H = G · R, K head_dim, P positions of a block,
Q = R · P queries of a block, S keys that they see.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

_MOST_BLOCKS, _SMALLEST_BLOCK = 4, 64


class _Kept(NamedTuple):
    """What the backward pass needs."""

    q_BGRTK: jax.Array
    k_BGTK: jax.Array
    v_BGTK: jax.Array
    mixed_BGRTK: jax.Array
    weights: list[jax.Array]
    """(B, G, Q, S) of each block."""


def block_attention(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, documents_BT: jax.Array | None
) -> jax.Array:
    """What each position reads of those up to itself within its document, (B, T, H, K); softmax is fp32."""
    rows, length, groups, width = k_BTGK.shape
    q_BGRTK = q_BTHK.reshape(rows, length, groups, -1, width).transpose(0, 2, 3, 1, 4) / math.sqrt(width)
    mixed_BGRTK = _attention(q_BGRTK, k_BTGK.transpose(0, 2, 1, 3), v_BTGK.transpose(0, 2, 1, 3), documents_BT)
    return mixed_BGRTK.transpose(0, 3, 1, 2, 4).reshape(q_BTHK.shape)


@jax.custom_vjp
def _attention(q_BGRTK: jax.Array, k_BGTK: jax.Array, v_BGTK: jax.Array, documents_BT: jax.Array | None) -> jax.Array:
    return _forward(q_BGRTK, k_BGTK, v_BGTK, documents_BT)[0]


def _forward(
    q_BGRTK: jax.Array, k_BGTK: jax.Array, v_BGTK: jax.Array, documents_BT: jax.Array | None
) -> tuple[jax.Array, _Kept]:
    weights, mixed = [], []
    for places, keys in _blocks(q_BGRTK.shape[3]):
        scores_BGQS = jnp.einsum("bgqk,bgsk->bgqs", _of_block(q_BGRTK, places), k_BGTK[:, :, keys])
        weights_BGQS = _softmax(scores_BGQS, _mask(places, keys, documents_BT)).astype(v_BGTK.dtype)
        weights.append(weights_BGQS)
        mixed.append(jnp.einsum("bgqs,bgsk->bgqk", weights_BGQS, v_BGTK[:, :, keys]))
    mixed_BGRTK = _whole(mixed, q_BGRTK.shape)
    return mixed_BGRTK, _Kept(q_BGRTK, k_BGTK, v_BGTK, mixed_BGRTK, weights)


def _backward(kept: _Kept, dmixed_BGRTK: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    # The softmax's own sum over weights and their gradients, by way of what they mixed (Dao et al., 2022).
    sums_BGRT1 = (dmixed_BGRTK * kept.mixed_BGRTK).astype(jnp.float32).sum(-1, keepdims=True)
    dq, dk_BGTK, dv_BGTK = [], jnp.zeros_like(kept.k_BGTK), jnp.zeros_like(kept.v_BGTK)
    for (places, keys), weights_BGQS in zip(_blocks(dmixed_BGRTK.shape[3]), kept.weights, strict=True):
        dmixed_BGQK, sums_BGQ1 = _of_block(dmixed_BGRTK, places), _of_block(sums_BGRT1, places)
        dweights_BGQS = jnp.einsum("bgqk,bgsk->bgqs", dmixed_BGQK, kept.v_BGTK[:, :, keys])
        dscores_BGQS = (weights_BGQS * (dweights_BGQS - sums_BGQ1)).astype(dmixed_BGRTK.dtype)
        dq.append(jnp.einsum("bgqs,bgsk->bgqk", dscores_BGQS, kept.k_BGTK[:, :, keys]))
        dk_BGSK = jnp.einsum("bgqs,bgqk->bgsk", dscores_BGQS, _of_block(kept.q_BGRTK, places))
        dk_BGTK = dk_BGTK.at[:, :, keys].add(dk_BGSK)
        dv_BGTK = dv_BGTK.at[:, :, keys].add(jnp.einsum("bgqs,bgqk->bgsk", weights_BGQS, dmixed_BGQK))
    return _whole(dq, kept.q_BGRTK.shape), dk_BGTK, dv_BGTK, None


_attention.defvjp(_forward, _backward)


def _blocks(length: int) -> Iterator[tuple[slice, slice]]:
    """The positions of each block, and those that it sees."""
    size = max(_SMALLEST_BLOCK, -(-length // _MOST_BLOCKS))
    for start in range(0, length, size):
        end = min(length, start + size)
        yield slice(start, end), slice(0, end)


def _of_block(x_BGRTK: jax.Array, places: slice) -> jax.Array:
    """(B, G, Q, K): a group's heads one after another, so that products are of plain matrices."""
    x_BGRPK = x_BGRTK[:, :, :, places]
    return x_BGRPK.reshape(*x_BGRPK.shape[:2], -1, x_BGRPK.shape[-1])


def _whole(blocks: list[jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """(B, G, R, T, K) out of the blocks' (B, G, Q, K)."""
    rows, groups, heads, _, width = shape
    return jnp.concatenate([block.reshape(rows, groups, heads, -1, width) for block in blocks], axis=3)


def _mask(places: slice, keys: slice, documents_BT: jax.Array | None) -> jax.Array:
    """Which keys each position may read: (P, S), or (B, 1, 1, P, S)."""
    earlier_PS = jnp.arange(places.start, places.stop)[:, None] >= jnp.arange(keys.stop)
    if documents_BT is None:
        return earlier_PS
    same_BPS = documents_BT[:, places, None] == documents_BT[:, None, keys]
    return (same_BPS & earlier_PS)[:, None, None]


def _softmax(scores_BGQS: jax.Array, mask: jax.Array) -> jax.Array:
    """In fp32; every query may read one key at least."""
    rows, groups, _, seen = scores_BGQS.shape
    scores_BGRPS = scores_BGQS.astype(jnp.float32).reshape(rows, groups, -1, mask.shape[-2], seen)
    scores_BGRPS = jnp.where(mask, scores_BGRPS, -jnp.inf)
    weights_BGRPS = jnp.exp(scores_BGRPS - scores_BGRPS.max(-1, keepdims=True))
    return (weights_BGRPS / weights_BGRPS.sum(-1, keepdims=True)).reshape(scores_BGQS.shape)
