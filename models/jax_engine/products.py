"""Products with weights, whose gradients are written so that every compiler computes them well.

Suffixes: `...` any dimensions, I columns of the weight (in), O its rows (out).
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def product(x: jax.Array, weight_OI: jax.Array) -> jax.Array:
    """x · weightᵀ, (..., O), of two arrays of one dtype."""
    return x @ weight_OI.T


def _forward(x: jax.Array, weight_OI: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ weight_OI.T, (x, weight_OI)


def _backward(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight_OI = kept
    dweight_OI: jax.Array = jax.lax.platform_dependent(x, dy, cpu=_turned_gradient, default=_gradient)
    return dy @ weight_OI, dweight_OI


product.defvjp(_forward, _backward)


def _gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    return jnp.einsum("...o,...i->oi", dy, x)


def _turned_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """The same, but only the small result is transposed.

    XLA on the CPU transposes the first factor in memory, and computes what made it on the way, element by element in
    the wrong order. The barrier keeps it from moving the transposition back to the factors.
    """
    dweight_IO: jax.Array = jax.lax.optimization_barrier(jnp.einsum("...i,...o->io", x, dy))
    return dweight_IO.T
