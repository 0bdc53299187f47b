"""Splash attention: the flash-attention kernels of JAX for TPUs, which skip what the causal mask leaves empty.

They run on other machines in Pallas's interpret mode, slowly, which is how they are tested.
Suffixes as in `models.jax_engine.attention`.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)

from models.jax_engine.sharding import Sharding

_BLOCKS = (512, 256, 128)
"""Sizes of the kernels' blocks, the largest that divides a row's length is taken."""


def splash_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    documents_BT: jax.Array | None,
    sharding: Sharding,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention inside documents, (B, T, H, K); T has to be a multiple of 128."""
    length, heads = q_BTHK.shape[1], q_BTHK.shape[2] // sharding.mesh.shape["tensor"]
    block = next(size for size in _BLOCKS if length % size == 0)
    # Pallas kernels cannot be divided by the compiler: each device runs one on its rows and heads.
    kernel = make_splash_mha(
        MultiHeadMask([CausalMask((length, length)) for _ in range(heads)]),
        block_sizes=_block_sizes(block),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    if documents_BT is None:
        documents_BT = jnp.zeros(q_BTHK.shape[:2], jnp.int32)

    def local(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, documents_BT: jax.Array) -> jax.Array:
        q_BHTK, k_BGTK, v_BGTK = (x.transpose(0, 2, 1, 3) for x in (q_BTHK, k_BTGK, v_BTGK))
        q_BHTK = q_BHTK / math.sqrt(q_BHTK.shape[-1])
        mixed_BHTK: jax.Array = jax.vmap(kernel)(q_BHTK, k_BGTK, v_BGTK, SegmentIds(documents_BT, documents_BT))
        return mixed_BHTK.transpose(0, 2, 1, 3).astype(q_BTHK.dtype)

    heads_spec = sharding.spec(("rows", "whole", "heads", "whole"))
    specs = (heads_spec, heads_spec, heads_spec, sharding.spec(("rows", "whole")))
    mapped = jax.shard_map(local, mesh=sharding.mesh, in_specs=specs, out_specs=heads_spec, check_vma=False)
    found: jax.Array = mapped(q_BTHK, k_BTGK, v_BTGK, documents_BT)
    return found


def _block_sizes(block: int) -> BlockSizes:
    return BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
