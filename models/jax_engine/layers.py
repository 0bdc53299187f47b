"""The plain parts of a block: projections, norms and MLPs without experts.

Modules only describe their parameters and compute; the arrays come from `models.jax_engine.parameters`.
Suffixes: B rows, T positions, D hidden_size, I intermediate_size.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from models.config import ModelConfig
from models.jax_engine.products import product


def remembering_inputs(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The same cheap function, of which the backward pass remembers what went in, and nothing on the way.

    Each array that a layer leaves for the backward pass is written, kept for all layers, and read again.
    """
    found: Callable[..., jax.Array] = jax.checkpoint(function, prevent_cse=False)
    return found


def lying(weight: nnx.Param[jax.Array]) -> NamedSharding | None:
    """How a weight lies while a layer computes with it, as `models.jax_engine.model` says; None for as it is stored."""
    found: NamedSharding | None = weight.get_metadata().get("lying")
    return found


def parameter(*shape: int) -> nnx.Param[jax.Array]:
    """A place for an fp32 array, filled when weights are restored."""
    return nnx.Param(jnp.zeros(shape, jnp.float32))


class Linear(nnx.Module):
    """y = x · weightᵀ + bias in the dtype of x; `weight` (out, in)."""

    def __init__(self, rows: int, columns: int, *, bias: bool) -> None:
        self.weight = parameter(rows, columns)
        self.bias = parameter(rows) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = product(x, self.weight[...], lying(self.weight))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Embedding(nnx.Module):
    """A table of vectors: `weight` (rows, D)."""

    def __init__(self, rows: int, width: int) -> None:
        self.weight = parameter(rows, width)

    def __call__(self, indices: jax.Array) -> jax.Array:
        # What indexes are checked on the host: the device need not clamp them.
        return self.weight[...].at[indices].get(mode="promise_in_bounds")


class Norm(nnx.Module):
    """LayerNorm with bias, or RMSNorm (Zhang and Sennrich, 2019), over the last dimension of fp32 arrays."""

    def __init__(self, config: ModelConfig) -> None:
        self.eps = config.norm_eps
        self.weight = parameter(config.hidden_size)
        self.bias = parameter(config.hidden_size) if config.norm == "layer_norm" else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        normed = remembering_inputs(_rms_normed if self.bias is None else _layer_normed)
        vectors = [vector[...] for vector in (self.weight, self.bias) if vector is not None]
        found: jax.Array = normed(x_BTD, self.eps, *vectors)
        return found


def _rms_normed(x_BTD: jax.Array, eps: float, weight_D: jax.Array) -> jax.Array:
    square = jnp.square(x_BTD).mean(-1, keepdims=True)
    return x_BTD * jax.lax.rsqrt(square + eps) * weight_D


def _layer_normed(x_BTD: jax.Array, eps: float, weight_D: jax.Array, bias_D: jax.Array) -> jax.Array:
    centred_BTD = x_BTD - x_BTD.mean(-1, keepdims=True)
    square = jnp.square(centred_BTD).mean(-1, keepdims=True)
    return centred_BTD * jax.lax.rsqrt(square + eps) * weight_D + bias_D


def activated(config: ModelConfig, x: jax.Array) -> jax.Array:
    """The config's activation: SiLU, or GELU in its tanh form (Hendrycks and Gimpel, 2016)."""
    return nnx.silu(x) if config.hidden_act == "silu" else nnx.gelu(x, approximate=True)


def dropped(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """`x` with elements dropped at the rate and the others scaled up; as it is where there is no key."""
    if key is None or not rate:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))


class Dense(nnx.Module):
    """Two projections with an activation between them."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.up_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        activate = remembering_inputs(functools.partial(activated, self.config))
        return self.down_proj(activate(self.up_proj(x_BTD)))


class Gated(nnx.Module):
    """Three projections, one of which gates another: SwiGLU (Shazeer, 2020) where the activation is SiLU."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.gate_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gated = remembering_inputs(lambda gate_BTI, up_BTI: activated(self.config, gate_BTI) * up_BTI)
        return self.down_proj(gated(self.gate_proj(x_BTD), self.up_proj(x_BTD)))
