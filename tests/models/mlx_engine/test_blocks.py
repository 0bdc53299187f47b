"""Attention in blocks against MLX's own, values and gradients."""

import numpy as np
import pytest

pytest.importorskip("models.mlx_engine")

import mlx.core as mx  # only where MLX is

from models.mlx_engine.attention import row_places
from models.mlx_engine.blocks import block_attention


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 13, 64, 65, 150])
def test_it_is_the_attention_of_whole_rows(length: int, groups: int, documents: bool) -> None:
    random = np.random.default_rng(length)
    q, k, v, asked = (
        mx.array(random.standard_normal((2, heads, length, 6), np.float32)) for heads in (4, groups, groups, 4)
    )
    mask = None
    if documents:
        mask = row_places(mx.array((random.random((2, length)) < 0.1).cumsum(1).astype(np.int32)), None).mask_BHTT

    def blocks(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return block_attention(q, k, v, 0.4, mask)

    def whole(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.4, mask="causal" if mask is None else mask)

    np.testing.assert_allclose(np.array(blocks(q, k, v)), np.array(whole(q, k, v)), atol=2e-6)
    found, expected = (
        mx.grad(lambda q, k, v, way=way: (way(q, k, v) * asked).sum(), argnums=(0, 1, 2))(q, k, v)
        for way in (blocks, whole)
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), atol=1e-5)
