"""AdamW and Muon exactly as `models.optimizer` defines them, as transformations of optax.

AdamW's direction is `optax.scale_by_adam`; Muon's is written here, because optax's own differs in the normalisation
and in the order of the momentum. Parameters are stacked by layer, so matrices are the last two dimensions.

Suffixes: R rows (out), C columns (in); `...` layers and experts.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from models.jax_engine.parameters import is_stacked
from models.optimizer import (
    ADAMW_MOMENTS,
    MUON_MOMENTS,
    NEWTON_SCHULZ,
    OptimizerConfig,
    is_decayed,
    moments_of,
    takes_muon,
)

Arrays = dict[str, jax.Array]
"""Arrays by the name of this engine's parameters."""

_SMALLEST_NORM = 1e-7
_Any = TypeVar("_Any")


class MuonState(NamedTuple):
    """What `scale_by_muon` keeps."""

    momentum_buffer: Arrays


class OptimizerState(NamedTuple):
    """What updates leave: the moments by their prefix, and the number of updates."""

    moments: dict[str, Arrays]
    updates: jax.Array
    """int32."""


def orthogonalised(u_RC: jax.Array, steps: int, dtype: jnp.dtype) -> jax.Array:
    """The nearest semi-orthogonal matrices, roughly, by Newton–Schulz iterations; (..., R, C), fp32."""
    a, b, c = NEWTON_SCHULZ
    tall = u_RC.shape[-2] > u_RC.shape[-1]
    x = (u_RC.mT if tall else u_RC).astype(dtype)
    norm = jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum((-2, -1), keepdims=True))
    x = x / jnp.maximum(norm, _SMALLEST_NORM).astype(dtype)
    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
        for _ in range(steps):
            gram = x @ x.mT
            x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).astype(jnp.float32)


def scale_by_muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Muon's direction: Nesterov's momentum, orthogonalised, times sqrt(max(1, out/in))."""
    dtype = jnp.dtype(config.newton_schulz_dtype)

    def init(parameters: Arrays) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, parameters))

    def direction(gradient: jax.Array, buffer: jax.Array) -> jax.Array:
        update = (1 - config.momentum) * gradient + config.momentum * buffer
        ratio = math.sqrt(max(1.0, update.shape[-2] / update.shape[-1]))
        return ratio * orthogonalised(update, config.newton_schulz_steps, dtype)

    def update(gradients: Arrays, state: MuonState, parameters: Arrays | None = None) -> tuple[Arrays, MuonState]:
        buffers = jax.tree.map(
            lambda gradient, buffer: config.momentum * buffer + (1 - config.momentum) * gradient,
            gradients,
            state.momentum_buffer,
        )
        return jax.tree.map(direction, gradients, buffers), MuonState(buffers)

    return optax.GradientTransformation(init, update)


def prefixed(config: OptimizerConfig, of_parameters: Mapping[str, _Any]) -> dict[str, dict[str, _Any]]:
    """What belongs to each parameter, once for each moment that it has, by the moment's prefix."""
    found: dict[str, dict[str, _Any]] = {prefix: {} for prefix in (*ADAMW_MOMENTS, *MUON_MOMENTS)}
    for name, value in of_parameters.items():
        for prefix in moments_of(config, name):
            found[prefix][name] = value
    return found


def fresh(config: OptimizerConfig, parameters: Arrays) -> OptimizerState:
    """The state before the first update."""
    nothing = jax.tree.map(jnp.zeros_like, prefixed(config, parameters))
    return OptimizerState(nothing, jnp.zeros((), jnp.int32))


def updated(
    config: OptimizerConfig, parameters: Arrays, state: OptimizerState, gradients: Arrays, scale: jax.Array
) -> tuple[Arrays, OptimizerState]:
    """Parameters and state after one update by gradients that are clipped already."""
    muon, adam = _directions(config, state, gradients)
    changed: Arrays = {}
    for name, parameter in parameters.items():
        of_muon = takes_muon(config, name)
        rate = scale * (config.muon_learning_rate if of_muon else config.learning_rate)
        decay = config.weight_decay if is_decayed(parameter.shape[is_stacked(name) :]) else 0.0
        direction = muon[0][name] if of_muon else adam[0][name]
        changed[name] = parameter * (1 - rate * decay) - rate * direction
    moments = {"exp_avg": adam[1].mu, "exp_avg_sq": adam[1].nu, "momentum_buffer": muon[1].momentum_buffer}
    return changed, OptimizerState(moments, adam[1].count)


def _directions(
    config: OptimizerConfig, state: OptimizerState, gradients: Arrays
) -> tuple[tuple[Arrays, MuonState], tuple[Arrays, optax.ScaleByAdamState]]:
    """Where Muon's parameters go and where AdamW's do, each with its state."""
    moments = state.moments
    of_muon = {name: gradient for name, gradient in gradients.items() if takes_muon(config, name)}
    of_adam = {name: gradient for name, gradient in gradients.items() if not takes_muon(config, name)}
    muon = scale_by_muon(config).update(of_muon, MuonState(moments["momentum_buffer"]))
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps).update(
        of_adam, optax.ScaleByAdamState(state.updates, moments["exp_avg"], moments["exp_avg_sq"])
    )
    return muon, adam


def clipped(config: OptimizerConfig, gradients: Arrays, norm: jax.Array) -> Arrays:
    """Gradients shrunk to the largest global norm, where their `norm` exceeds it."""
    if config.clip is None:
        return gradients
    shrink = jnp.minimum(1.0, config.clip / (norm + 1e-6))
    return {name: gradient * shrink for name, gradient in gradients.items()}
