"""Products with weights, whose gradients are written so that every compiler computes them well.

Suffixes: `...` any dimensions, I columns of the weight (in), O its rows (out).
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, weight_OI: jax.Array, lying: NamedSharding | None = None) -> jax.Array:
    """x · weightᵀ, (..., O), in the dtype of x; of fp32, in fp32 on every device.

    The weight is as it is stored: cast here, and laid as `lying` says, where that is given. The backward pass does both
    again, so that what is kept for it is the stored weight, which is there anyway, and not one more of every layer.
    """
    return jnp.matmul(x, laid(weight_OI, x.dtype, lying).T, precision=_precision(x.dtype))


def laid(weight: jax.Array, dtype: jnp.dtype, lying: NamedSharding | None) -> jax.Array:
    """A stored weight as it is computed with; cast first, so that devices send each other less."""
    weight = weight.astype(dtype)
    return weight if lying is None else jax.lax.with_sharding_constraint(weight, lying)


def _forward(
    x: jax.Array, weight_OI: jax.Array, lying: NamedSharding | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.matmul(x, laid(weight_OI, x.dtype, lying).T, precision=_precision(x.dtype)), (x, weight_OI)


def _backward(
    lying: NamedSharding | None, kept: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight_OI = kept
    dx = jnp.matmul(dy, laid(weight_OI, dy.dtype, lying), precision=_precision(dy.dtype))
    dweight_OI: jax.Array = jax.lax.platform_dependent(x, dy, cpu=_turned_gradient, default=_gradient)
    return dx, laid(dweight_OI, dweight_OI.dtype, lying).astype(weight_OI.dtype)


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
