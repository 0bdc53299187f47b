"""Causal self-attention with grouped queries, rotary positions, documents and a key-value cache.

Suffixes: B rows, T new positions of a row, C capacity of a cache, U = C + T, D hidden_size, H heads, G key-value
heads, R = H / G heads of a group, K head_dim, F = K / 2 frequencies.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import ModelConfig
from models.jax_engine.blocks import block_attention
from models.jax_engine.layers import Linear, dropped
from models.jax_engine.sharding import Sharding
from models.jax_engine.splash import splash_attention

Kind = Literal["xla", "blocks", "cudnn", "splash", "splash_interpreted"]
"""How attention is computed: by plain products, by products of blocks, by cuDNN's fused kernels, or by the splash
kernels of TPUs."""


class Rotation(NamedTuple):
    """Cosines and sines of each position's angles, (T, F) each, or (B, T, F) where rows restart differently."""

    cosine: jax.Array
    sine: jax.Array


class LayerCache(NamedTuple):
    """One layer's keys and values so far, (B, C, G, K) each."""

    keys_BCGK: jax.Array
    values_BCGK: jax.Array


def rotation(positions: jax.Array, head_dim: int, theta: float, dtype: jnp.dtype) -> Rotation:
    """The angles of rotary embeddings (Su et al., 2021) at some positions; computed in fp32, given in `dtype`."""
    exponents_F = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions[..., None].astype(jnp.float32) * (1.0 / theta**exponents_F)
    return Rotation(jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype))


def rotated(x_BTHK: jax.Array, turn: Rotation) -> jax.Array:
    """Heads turned by their positions' angles: pairs are (i, i + K/2), as in `transformers`."""
    first_BTHF, second_BTHF = jnp.split(x_BTHK, 2, axis=-1)
    cosine, sine = turn.cosine[..., None, :], turn.sine[..., None, :]
    turned = (first_BTHF * cosine - second_BTHF * sine, second_BTHF * cosine + first_BTHF * sine)
    return jnp.concatenate(turned, axis=-1)


def kind_for(machine: str, dtype: jnp.dtype, head_dim: int, length: int, dropout: float, documents: bool) -> Kind:
    """How attention is computed on a machine: the fused kernels where they take the shapes, else plain products.

    `machine`: `cpu`, `tpu`, `cudnn` for a GPU that has its fused attention, or any other.
    """
    if machine == "cpu" and not dropout:
        return "blocks"
    if machine == "tpu" and length % 128 == 0 and not dropout:
        return "splash"
    if machine == "cudnn" and dtype == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= 128:
        # cuDNN takes no mask of documents without holding it as a bias of T × T, and drops nothing.
        return "xla" if documents or dropout else "cudnn"
    return "xla"


def causal_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    documents_BT: jax.Array | None,
    *,
    kind: Kind,
    sharding: Sharding,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """What each position reads of those up to itself, and of its own document alone where there are documents.

    (B, T, H, K) in the dtype of the heads; softmax is fp32. With a `key`, weights are dropped at the rate `dropout`.
    """
    if dropout and key is not None:
        return _dropped_attention(q_BTHK, k_BTGK, v_BTGK, _mask(q_BTHK.shape[1], documents_BT), dropout, key)
    if kind in ("splash", "splash_interpreted"):
        return splash_attention(q_BTHK, k_BTGK, v_BTGK, documents_BT, sharding, interpret=kind == "splash_interpreted")
    if kind == "blocks":
        return block_attention(q_BTHK, k_BTGK, v_BTGK, documents_BT)
    # cuDNN's call cannot be divided by the compiler where heads lie otherwise.
    q_BTHK = sharding.constrained(q_BTHK, "rows", "whole", "heads", "whole")
    k_BTGK, v_BTGK = (sharding.constrained(x, "rows", "whole", "groups", "whole") for x in (k_BTGK, v_BTGK))
    if documents_BT is None:
        implementation: Literal["xla", "cudnn"] = "cudnn" if kind == "cudnn" else "xla"
        return jax.nn.dot_product_attention(q_BTHK, k_BTGK, v_BTGK, is_causal=True, implementation=implementation)
    found: jax.Array = jax.checkpoint(_in_documents, prevent_cse=False)(q_BTHK, k_BTGK, v_BTGK, documents_BT)
    return found


def _in_documents(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, documents_BT: jax.Array) -> jax.Array:
    """By plain products, whose T × T weights are computed again in the backward pass, not kept for every layer."""
    mask = documents_BT[:, None, :, None] == documents_BT[:, None, None, :]
    return jax.nn.dot_product_attention(q_BTHK, k_BTGK, v_BTGK, mask=mask, is_causal=True, implementation="xla")


def _mask(length: int, documents_BT: jax.Array | None) -> jax.Array:
    """Which positions may be read, (T, T) or (B, T, T)."""
    earlier_TT = jnp.tril(jnp.ones((length, length), jnp.bool_))
    if documents_BT is None:
        return earlier_TT
    return earlier_TT & (documents_BT[:, :, None] == documents_BT[:, None, :])


def _dropped_attention(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, mask: jax.Array, dropout: float, key: jax.Array
) -> jax.Array:
    """Attention with dropout on its weights, which the fused functions do not have."""
    rows, length, heads, width = q_BTHK.shape
    groups = k_BTGK.shape[2]
    q_BTGRK = q_BTHK.reshape(rows, length, groups, heads // groups, width)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BTGK, preferred_element_type=jnp.float32) / math.sqrt(width)
    mask = mask if mask.ndim == 2 else mask[:, None, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1).astype(v_BTGK.dtype)
    mixed_BTGRK = jnp.einsum("bgrts,bsgk->btgrk", dropped(weights, dropout, key), v_BTGK)
    return mixed_BTGRK.reshape(q_BTHK.shape)


class Attention(nnx.Module):
    """Projections of queries, keys and values, their mixing, and the output projection."""

    def __init__(self, config: ModelConfig) -> None:
        width, bias = config.hidden_size, config.attention_bias
        self.config = config
        self.q_proj = Linear(config.query_size, width, bias=bias)
        self.k_proj = Linear(config.key_value_size, width, bias=bias)
        self.v_proj = Linear(config.key_value_size, width, bias=bias)
        self.o_proj = Linear(width, config.query_size, bias=bias)

    def heads(self, x_BTD: jax.Array, turn: Rotation | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries (B, T, H, K), keys and values (B, T, G, K)."""
        q_BTHK, k_BTGK, v_BTGK = (
            projection(x_BTD).reshape(*x_BTD.shape[:2], -1, self.config.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if turn is not None:
            q_BTHK, k_BTGK = rotated(q_BTHK, turn), rotated(k_BTGK, turn)
        return q_BTHK, k_BTGK, v_BTGK

    def output(self, mixed_BTHK: jax.Array) -> jax.Array:
        """What the heads read, projected back: (B, T, D)."""
        return self.o_proj(mixed_BTHK.reshape(*mixed_BTHK.shape[:2], -1))


def cached_attention(q_B1HK: jax.Array, cache: LayerCache, known_B: jax.Array) -> jax.Array:
    """What one new position of each row reads of the row's first `known_B` positions: (B, 1, H, K)."""
    seen_BC = jnp.arange(cache.keys_BCGK.shape[1]) < known_B[:, None]
    return jax.nn.dot_product_attention(q_B1HK, *cache, mask=seen_BC[:, None, None])


def attention_behind(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, cache: LayerCache, mask_BTU: jax.Array
) -> jax.Array:
    """What new positions read of a cache's and of themselves, as the mask lets them: (B, T, H, K)."""
    k_BUGK = jnp.concatenate((cache.keys_BCGK, k_BTGK), axis=1)
    v_BUGK = jnp.concatenate((cache.values_BCGK, v_BTGK), axis=1)
    return jax.nn.dot_product_attention(q_BTHK, k_BUGK, v_BUGK, mask=mask_BTU[:, None])
