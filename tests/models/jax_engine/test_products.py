"""Products with weights, whose gradient is written by hand, against JAX's own."""

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

from models.jax_engine import products


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (2, 1, 4, 6)], ids=str)
def test_gradients_are_those_of_the_plain_product(shape: tuple[int, ...]) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x, weight = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], (7, 6))
    dy = jax.random.normal(keys[2], (*shape[:-1], 7))
    found, gradients = jax.vjp(products.product, x, weight)
    expected, plain_gradients = jax.vjp(lambda x, weight: x @ weight.T, x, weight)
    np.testing.assert_array_equal(found, expected)
    for one, other in zip(gradients(dy), plain_gradients(dy), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    # The two ways of a weight's gradient, of which each machine takes one.
    for way in (products._gradient, products._turned_gradient):
        np.testing.assert_allclose(way(x, dy), plain_gradients(dy)[1], rtol=1e-5, atol=1e-6)


def test_a_machine_takes_one_way_alone() -> None:
    x, weight = jnp.ones((4, 6), jnp.bfloat16), jnp.ones((7, 6), jnp.bfloat16)
    step = jax.jit(jax.grad(lambda weight: products.product(x, weight).astype(jnp.float32).sum()))
    text = step.lower(weight).compile().as_text()
    assert text is not None
    assert " conditional(" not in text
    assert step(weight).dtype == jnp.bfloat16
