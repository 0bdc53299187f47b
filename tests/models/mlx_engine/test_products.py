"""Products in 16 bits against the same numbers multiplied in 64."""

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("models.mlx_engine")

import mlx.core as mx  # only where MLX is

from models.mlx_engine.products import added_product, attention, product

ROUNDING = {mx.float32: 1e-6, mx.float16: 2**-11, mx.bfloat16: 2**-8}
"""What the last rounding may change, as a share."""


def arrays(dtype: mx.Dtype, *shapes: tuple[int, ...]) -> list[mx.array]:
    random = np.random.default_rng(0)
    return [mx.array(random.normal(size=shape).astype(np.float32)).astype(dtype) for shape in shapes]


def exact(array: mx.array) -> NDArray[np.float64]:
    return np.array(array.astype(mx.float32)).astype(np.float64)


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_a_product_is_rounded_once(dtype: mx.Dtype) -> None:
    a, b, c = arrays(dtype, (3, 65, 33), (33, 17), (3, 65, 17))
    found, summed = product(a, b), added_product(c, a, b, alpha=2.0, beta=-0.5)
    assert found.dtype == summed.dtype == dtype
    wide = exact(a) @ exact(b)
    np.testing.assert_allclose(exact(found), wide, rtol=ROUNDING[dtype], atol=1e-5)
    np.testing.assert_allclose(exact(summed), 2 * wide - exact(c) / 2, rtol=ROUNDING[dtype], atol=2e-5)


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_gradients_are_those_of_the_product(dtype: mx.Dtype) -> None:
    a, b, g = arrays(dtype, (65, 33), (33, 17), (65, 17))
    by_a, by_b = mx.grad(lambda a, b: (product(a, b) * g).astype(mx.float32).sum(), argnums=(0, 1))(a, b)
    assert by_a.dtype == by_b.dtype == dtype
    np.testing.assert_allclose(exact(by_a), exact(g) @ exact(b).T, rtol=ROUNDING[dtype], atol=1e-5)
    np.testing.assert_allclose(exact(by_b), exact(a).T @ exact(g), rtol=ROUNDING[dtype], atol=1e-5)


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_attention_is_in_the_dtype_of_what_it_is_given(dtype: mx.Dtype) -> None:
    q, k, v = arrays(dtype, (2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8))
    found = attention(q, k, v, 0.3, "causal")
    assert found.dtype == dtype
    k_all, v_all = (np.repeat(exact(array), 2, axis=1) for array in (k, v))
    scores = np.where(np.tri(9, dtype=bool), 0.3 * exact(q) @ k_all.swapaxes(-1, -2), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = (weights / weights.sum(-1, keepdims=True)) @ v_all
    np.testing.assert_allclose(exact(found), expected, rtol=3 * ROUNDING[dtype], atol=3 * ROUNDING[dtype])
