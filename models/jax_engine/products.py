"""Products with weights, whose gradients are written so that every compiler computes them well.

Suffixes: `...` any dimensions, I columns of the weight (in), O its rows (out).
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def product(x: jax.Array, weight_OI: jax.Array) -> jax.Array:
    """x · weightᵀ, (..., O), of two arrays of one dtype; of fp32, in fp32 on every device."""
    return jnp.matmul(x, weight_OI.T, precision=_precision(x.dtype))


def _forward(x: jax.Array, weight_OI: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.matmul(x, weight_OI.T, precision=_precision(x.dtype)), (x, weight_OI)


def _backward(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight_OI = kept
    dweight_OI: jax.Array = jax.lax.platform_dependent(x, dy, cpu=_turned_gradient, default=_gradient)
    return jnp.matmul(dy, weight_OI, precision=_precision(dy.dtype)), dweight_OI


product.defvjp(_forward, _backward)


def _precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """What products of a dtype are computed with, said at each: `jax.default_matmul_precision` around a call does not
    reach what `jax.custom_vjp` traces after it has returned."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    return jnp.einsum("...o,...i->oi", dy, x, precision=_precision(x.dtype))


def _turned_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """The same, but only the small result is transposed.

    XLA on the CPU transposes the first factor in memory, and computes what made it on the way, element by element in
    the wrong order. The barrier keeps it from moving the transposition back to the factors.
    """
    dweight_IO = jnp.einsum("...i,...o->io", x, dy, precision=_precision(x.dtype))
    held_IO: jax.Array = jax.lax.optimization_barrier(dweight_IO)
    return held_IO.T
