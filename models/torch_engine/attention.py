"""Causal self-attention with grouped queries, rotary positions and a key-value cache.

B rows, T new positions of a row, C capacity of a cache, U known positions of a cache and new ones, N packed positions,
P those of one group, D hidden_size, H heads, G key-value heads, J = H + 2·G, K head_dim, S = J · K, L layers.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import ModelConfig
from models.torch_engine.cpu_attention import causal_attention
from models.torch_engine.dropout import Share, drawing_apart
from models.torch_engine.layers import Linear


class Group(NamedTuple):
    """Rows of text that attention reads side by side, each on its own and padded to the longest."""

    size: tuple[int, int]
    """(B, T)."""
    positions: int
    """How many of the B·T are there: P."""
    places_P: Tensor | None
    """int64; row · T + position of each, or None where all B·T are there, in order."""
    share_B: Share | None = None
    """Of the group's rows in all processes, for dropout; None where all are here."""


class Rotation(NamedTuple):
    """Cosines and sines of each packed position's angles, (N, K) each, both halves alike."""

    cosine_NK: Tensor
    sine_NK: Tensor


class LayerCache(NamedTuple):
    """One layer's keys and values so far, (B, G, C, K) each, and how many of them each row has."""

    keys_BGCK: Tensor
    values_BGCK: Tensor
    lengths_B: Tensor | None
    """int64; None while the prompts themselves are read."""
    longest: int
    """The largest of them."""
    mask_B1TU: Tensor | None
    """As of the whole cache."""


class Cache(NamedTuple):
    """Keys and values of every layer, (L, B, G, C, K), and the number of positions that each row has taken."""

    keys: Tensor
    values: Tensor
    lengths_B: Tensor | None
    """int64; None while the prompts themselves are read."""
    host_lengths_B: NDArray[np.int64]
    """The same on the host, where it costs no waiting."""
    mask_B1TU: Tensor | None = None
    """Boolean, where new positions are read behind the cache but not kept in it: what each of them may read of the
    cache's, as far as the longest row, and of themselves."""

    def of_layer(self, layer: int) -> LayerCache:
        """A view of one layer."""
        longest = int(self.host_lengths_B.max(initial=0))
        return LayerCache(self.keys[layer], self.values[layer], self.lengths_B, longest, self.mask_B1TU)


def rotation_table(positions: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables (positions, K) in fp32 of rotary embeddings (Su et al., 2021), half-split layout."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / theta**exponents
    angles = torch.outer(torch.arange(positions, dtype=torch.float32, device=device), frequencies)
    both = torch.cat((angles, angles), dim=-1)
    return both.cos(), both.sin()


def rotated(x_NHK: Tensor, rotation: Rotation) -> Tensor:
    """Heads turned by their positions' angles: pairs are (i, i + K/2), as in `transformers`."""
    first, second = x_NHK.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_NHK * rotation.cosine_NK.unsqueeze(1) + turned * rotation.sine_NK.unsqueeze(1)


class Attention(nn.Module):
    """Projections of queries, keys and values, their mixing, and the output projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.attention_bias
        self.heads, self.groups, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.dropout = config.dropout
        self.q_proj = Linear(config.query_size, width, bias=bias)
        self.k_proj = Linear(config.key_value_size, width, bias=bias)
        self.v_proj = Linear(config.key_value_size, width, bias=bias)
        self.o_proj = Linear(width, config.query_size, bias=bias)

    def mix(self, x_ND: Tensor, groups: Sequence[Group], rotation: Rotation | None, cache: LayerCache | None) -> Tensor:
        """What the heads read, before the output projection: (N, query_size). A cache takes a single group."""
        heads_NJK = self._projected(x_ND).view(len(x_ND), self.heads + 2 * self.groups, self.head_dim)
        if rotation is not None:
            turning = self.heads + self.groups
            heads_NJK = torch.cat((rotated(heads_NJK[:, :turning], rotation), heads_NJK[:, turning:]), dim=1)
        if len(groups) == 1:
            return self._mixed(heads_NJK, groups[0], cache)
        assert cache is None
        parts = torch.split(heads_NJK, [group.positions for group in groups])
        return torch.cat([self._mixed(part, group, None) for part, group in zip(parts, groups, strict=True)])

    def _mixed(self, heads_PJK: Tensor, group: Group, cache: LayerCache | None) -> Tensor:
        """What the heads of one group read: (P, query_size)."""
        (rows, length), places_P = group.size, group.places_P
        if places_P is not None:
            padded = heads_PJK.new_zeros((rows * length, *heads_PJK.shape[1:]))
            heads_PJK = padded.index_copy(0, places_P, heads_PJK)
        heads_BJTK = heads_PJK.view(rows, length, *heads_PJK.shape[1:]).transpose(1, 2)
        q_BHTK, k_BGTK, v_BGTK = torch.split(heads_BJTK, [self.heads, self.groups, self.groups], dim=1)
        mixed_BHTK = self._attend(q_BHTK, k_BGTK, v_BGTK, cache, group.share_B)
        mixed_PD = mixed_BHTK.transpose(1, 2).reshape(rows * length, self.heads * self.head_dim)
        return mixed_PD if places_P is None else mixed_PD.index_select(0, places_P)

    def _projected(self, x_ND: Tensor) -> Tensor:
        """Queries, keys and values side by side, (N, S): one product instead of three."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        weight = torch.cat([part.weight.to(x_ND.dtype) for part in parts])
        bias = None
        if self.q_proj.bias is not None:
            bias = torch.cat([part.bias.to(x_ND.dtype) for part in parts if part.bias is not None])
        return F.linear(x_ND, weight, bias)

    def _attend(
        self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, cache: LayerCache | None, share_B: Share | None
    ) -> Tensor:
        if cache is not None and cache.mask_B1TU is not None:
            return self._attend_behind(q_BHTK, k_BGTK, v_BGTK, cache, cache.mask_B1TU)
        if cache is not None and cache.lengths_B is not None:
            return self._attend_cached(q_BHTK, k_BGTK, v_BGTK, cache, cache.lengths_B)
        if cache is not None:
            cache.keys_BGCK[:, :, : k_BGTK.shape[2]] = k_BGTK
            cache.values_BGCK[:, :, : v_BGTK.shape[2]] = v_BGTK
        dropout = self.dropout if self.training else 0.0
        if q_BHTK.is_cpu:
            return causal_attention(q_BHTK, k_BGTK, v_BGTK, dropout, share_B)
        grouped = self.groups != self.heads
        with drawing_apart(q_BHTK.device, share_B if dropout else None):
            if not q_BHTK.numel():
                # A process without a row.
                return q_BHTK
            return F.scaled_dot_product_attention(
                q_BHTK, k_BGTK, v_BGTK, is_causal=True, dropout_p=dropout, enable_gqa=grouped
            )

    def _attend_behind(
        self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, cache: LayerCache, mask_B1TU: Tensor
    ) -> Tensor:
        """New positions behind the cache, which stays as it is."""
        k_BGUK = torch.cat((cache.keys_BGCK[:, :, : cache.longest], k_BGTK), 2)
        v_BGUK = torch.cat((cache.values_BGCK[:, :, : cache.longest], v_BGTK), 2)
        grouped = self.groups != self.heads
        return F.scaled_dot_product_attention(q_BHTK, k_BGUK, v_BGUK, attn_mask=mask_B1TU, enable_gqa=grouped)

    def _attend_cached(
        self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, cache: LayerCache, lengths_B: Tensor
    ) -> Tensor:
        """One new position per row, at the row's own length."""
        batch = torch.arange(q_BHTK.shape[0], device=q_BHTK.device)
        cache.keys_BGCK[batch, :, lengths_B] = k_BGTK[:, :, 0]
        cache.values_BGCK[batch, :, lengths_B] = v_BGTK[:, :, 0]
        known = cache.longest + 1
        keys_BGCK, values_BGCK = cache.keys_BGCK[:, :, :known], cache.values_BGCK[:, :, :known]
        # One query per row: the heads of a group are the rows of one small product.
        q_BGRK = q_BHTK.reshape(q_BHTK.shape[0], self.groups, self.heads // self.groups, self.head_dim)
        scores_BGRC = (q_BGRK @ keys_BGCK.transpose(2, 3)).float() / math.sqrt(self.head_dim)
        unseen_BC = torch.arange(known, device=q_BHTK.device) > lengths_B.unsqueeze(1)
        weights_BGRC = scores_BGRC.masked_fill(unseen_BC[:, None, None], -math.inf).softmax(-1)
        return (weights_BGRC.to(q_BHTK.dtype) @ values_BGCK).reshape(q_BHTK.shape)
