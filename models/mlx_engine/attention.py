"""Causal self-attention with grouped queries, rotary positions and a key-value cache.

B rows, T new positions of a row, C capacity of a cache, U known positions of a cache, W = U + T, D hidden_size,
H heads, G key-value heads, K head_dim.
"""

import math
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx import nn
from numpy.typing import NDArray

from models.config import ModelConfig
from models.mlx_engine.layers import Linear, dropped
from models.mlx_engine.products import attention, product


class LayerCache(NamedTuple):
    """One layer's keys and values so far, (B, G, C, K) each."""

    keys_BGCK: mx.array
    values_BGCK: mx.array


class Cache(NamedTuple):
    """Keys and values of every layer, and the number of positions that each row has taken."""

    layers: list[LayerCache]
    lengths_B: NDArray[np.int64]


class Places(NamedTuple):
    """Where the tokens of a forward pass stand."""

    mask_BHTT: mx.array | None
    """Boolean, what each position may read, (B or 1, 1, T, T, U or W); None for all up to itself."""
    positions_BT: mx.array | None
    """Places in their documents, for learned positions; None where a row is one document."""
    starts_B: mx.array | None
    """int32; where the first new position of each row stands; None for all at 0, or where none is kept."""
    known: int | None
    """U, where there is a cache that has been filled."""
    kept: bool = True
    """Whether a cache takes the new positions; if not, the mask is over W, and positions need not follow one another.
    """


def row_places(documents_BT: mx.array | None, positions_BT: mx.array | None) -> Places:
    """Places in whole rows: of one document each, or of several that do not read each other.

    Rotary positions do not restart with a document: only differences inside one tell.
    """
    if documents_BT is None:
        return Places(None, None, None, None)
    here_T = mx.arange(documents_BT.shape[1])
    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    return Places((same_BTT & (here_T[:, None] >= here_T))[:, None], positions_BT, None, None)


def cached_places(lengths_B: NDArray[np.int64]) -> Places:
    """Places of one new token for each row of a cache."""
    known = int(lengths_B.max(initial=0)) + 1
    here_B = mx.array(lengths_B.astype(np.int32))
    return Places((mx.arange(known) <= here_B[:, None])[:, None, None], here_B[:, None], here_B, known)


def places_behind(positions_BT: NDArray[np.int32], mask_BTW: NDArray[np.bool_]) -> Places:
    """Places of tokens that are read behind a cache but not kept in it."""
    known = mask_BTW.shape[2] - mask_BTW.shape[1]
    return Places(mx.array(mask_BTW)[:, None], mx.array(positions_BT), None, known, kept=False)


class Attention(nn.Module):
    """Projections of queries, keys and values, their mixing, and the output projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.attention_bias
        self.heads, self.groups, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.dropout = config.dropout
        self.q_proj = Linear(width, config.query_size, bias=bias)
        self.k_proj = Linear(width, config.key_value_size, bias=bias)
        self.v_proj = Linear(width, config.key_value_size, bias=bias)
        self.o_proj = Linear(config.query_size, width, bias=bias)
        self._periods: mx.array | None = None
        if config.rope_theta is not None:
            exponents = np.arange(0, self.head_dim, 2) / self.head_dim
            # Given as such, they are as exact as in `transformers`; mx.fast.rope's own lose four digits at 2,000.
            self._periods = mx.array((config.rope_theta**exponents).astype(np.float32))

    def __call__(
        self, x_BTD: mx.array, places: Places, cache: LayerCache | None, keys_B2: mx.array | None
    ) -> tuple[mx.array, LayerCache | None]:
        """What the block adds to the residual stream, and the cache with the new positions in it."""
        q_BHTK = self._turned(self._heads(self.q_proj(x_BTD), self.heads), places)
        k_BGTK = self._turned(self._heads(self.k_proj(x_BTD), self.groups), places)
        v_BGTK = self._heads(self.v_proj(x_BTD), self.groups)
        if cache is not None and not places.kept:
            parts = zip(cache, (k_BGTK, v_BGTK), strict=True)
            k_BGTK, v_BGTK = (mx.concatenate([old[:, :, : places.known], new], axis=2) for old, new in parts)
        elif cache is not None:
            cache = LayerCache(*(_written(*part) for part in zip(cache, (k_BGTK, v_BGTK), [places] * 2, strict=True)))
            if places.known is not None:
                k_BGTK, v_BGTK = (part[:, :, : places.known] for part in cache)
        mixed_BHTK = self._mixed(q_BHTK, k_BGTK, v_BGTK, places.mask_BHTT, keys_B2)
        rows, _, length, _ = mixed_BHTK.shape
        return self.o_proj(mixed_BHTK.transpose(0, 2, 1, 3).reshape(rows, length, -1)), cache

    def _heads(self, x_BTS: mx.array, count: int) -> mx.array:
        return x_BTS.reshape(*x_BTS.shape[:2], count, self.head_dim).transpose(0, 2, 1, 3)

    def _turned(self, x_BHTK: mx.array, places: Places) -> mx.array:
        """Heads turned by their positions' angles (Su et al., 2021): pairs are (i, i + K/2), as in `transformers`."""
        if self._periods is None:
            return x_BHTK
        if not places.kept:
            assert places.positions_BT is not None
            rows, heads, length, width = x_BHTK.shape
            each_N1 = Places(None, None, places.positions_BT.reshape(-1), None)
            x_NH1K = self._turned(x_BHTK.swapaxes(1, 2).reshape(-1, heads, 1, width), each_N1)
            return x_NH1K.reshape(rows, length, heads, width).swapaxes(1, 2)
        offset = 0 if places.starts_B is None else places.starts_B
        return mx.fast.rope(
            x_BHTK, self.head_dim, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._periods
        )

    def _mixed(
        self,
        q_BHTK: mx.array,
        k_BGTK: mx.array,
        v_BGTK: mx.array,
        mask_BHTT: mx.array | None,
        keys_B2: mx.array | None,
    ) -> mx.array:
        scale = 1 / math.sqrt(self.head_dim)
        if keys_B2 is not None and self.dropout:
            return _mixed_with_dropout(q_BHTK * scale, k_BGTK, v_BGTK, mask_BHTT, self.dropout, keys_B2)
        mask = "causal" if mask_BHTT is None else mask_BHTT
        return attention(q_BHTK, k_BGTK, v_BGTK, scale, mask)


def _mixed_with_dropout(
    q_BHTK: mx.array,
    k_BGTK: mx.array,
    v_BGTK: mx.array,
    mask_BHTT: mx.array | None,
    rate: float,
    keys_B2: mx.array,
) -> mx.array:
    """Attention whose weights are dropped, which MLX has no kernel for."""
    rows, heads, length, width = q_BHTK.shape
    groups = k_BGTK.shape[1]
    if mask_BHTT is None:
        here_T = mx.arange(length)
        mask_BHTT = (here_T[:, None] >= here_T)[None, None]
    q_BGRTK = q_BHTK.reshape(rows, groups, heads // groups, length, width)
    scores = product(q_BGRTK, k_BGTK[:, :, None].swapaxes(-1, -2)).astype(mx.float32)
    weights = mx.softmax(mx.where(mask_BHTT[:, None], scores, -math.inf), axis=-1)
    weights = dropped(weights, rate, keys_B2).astype(q_BHTK.dtype)
    return product(weights, v_BGTK[:, :, None]).reshape(q_BHTK.shape)


def _written(kept_BGCK: mx.array, new_BGTK: mx.array, places: Places) -> mx.array:
    """A cache's array with the new positions in it, from 0 or at each row's own place."""
    if places.starts_B is None:
        kept_BGCK[:, :, : new_BGTK.shape[2]] = new_BGTK
    else:
        kept_BGCK[mx.arange(len(new_BGTK)), :, places.starts_B] = new_BGTK[:, :, 0]
    return kept_BGCK
