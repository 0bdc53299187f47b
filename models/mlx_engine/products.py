"""Matrix products in 16 bits, which on a CPU MLX does without a BLAS, ten times slower than in fp32.

There the factors are widened: they are the same numbers, added up in fp32 as everywhere, and rounded once at the end.
"""

import mlx.core as mx

from models.mlx_engine.blocks import block_attention
from models.mlx_engine.device import on_cpu


def product(a: mx.array, b: mx.array) -> mx.array:
    """a @ b of one dtype, and in it."""
    if not _widened(a):
        return a @ b
    return (a.astype(mx.float32) @ b.astype(mx.float32)).astype(a.dtype)


def added_product(c: mx.array, a: mx.array, b: mx.array, alpha: float = 1.0, beta: float = 1.0) -> mx.array:
    """alpha · a @ b + beta · c of one dtype, and in it."""
    if not _widened(a):
        return mx.addmm(c, a, b, alpha=alpha, beta=beta)
    wide_c, wide_a, wide_b = (array.astype(mx.float32) for array in (c, a, b))
    return mx.addmm(wide_c, wide_a, wide_b, alpha=alpha, beta=beta).astype(a.dtype)


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: str | mx.array) -> mx.array:
    """`mx.fast.scaled_dot_product_attention` of arrays of one dtype, and in it; mask: "causal", or what may be read."""
    dtype = q.dtype
    if _widened(q):
        q, k, v = (array.astype(mx.float32) for array in (q, k, v))
    if on_cpu() and q.shape[2] == k.shape[2]:
        return block_attention(q, k, v, scale, None if isinstance(mask, str) else mask).astype(dtype)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask).astype(dtype)


def _widened(array: mx.array) -> bool:
    return array.dtype != mx.float32 and on_cpu()
