"""AdamW and Muon exactly as `models.optimizer` defines them, as functions of arrays that compile into the step.

P matrices of equal shape, R rows (out), C columns (in).
"""

import math
from typing import NamedTuple

import mlx.core as mx

from models.mlx_engine.lanes import Lanes
from models.mlx_engine.model import Parameters
from models.mlx_engine.products import added_product, product
from models.optimizer import (
    ADAMW_MOMENTS,
    MUON_MOMENTS,
    NEWTON_SCHULZ,
    OptimizerConfig,
    is_decayed,
    moments_of,
    takes_muon,
)

_SMALLEST_NORM = 1e-7

Moments = dict[str, Parameters]
"""The moments by their prefix, then by parameter."""


class Rates(NamedTuple):
    """Learning rates of one update, 0-d fp32 arrays."""

    adamw: mx.array
    muon: mx.array


class _Numbers(NamedTuple):
    """What AdamW multiplies whole arrays by, once for all of them; 0-d fp32 arrays.

    Bias corrections and clipping are in here, which saves three of sixteen passes over each array.
    """

    first: mx.array
    """Of the clipped gradient, in the first moment, by the gradient as it is."""
    second: mx.array
    """The same of its square in the second moment."""
    rate: mx.array
    eps: mx.array
    decay: mx.array
    """The learning rate as weight decay has it."""


def fresh_moments(config: OptimizerConfig, parameters: Parameters) -> Moments:
    """The moments before the first update."""
    moments: Moments = {prefix: {} for prefix in (*ADAMW_MOMENTS, *MUON_MOMENTS)}
    for name, parameter in parameters.items():
        for prefix in moments_of(config, name):
            moments[prefix][name] = mx.zeros(parameter.shape)
    return {prefix: arrays for prefix, arrays in moments.items() if arrays}


def gradient_norm(gradients: Parameters, lanes: Lanes) -> mx.array:
    """The global norm, a 0-d fp32 array."""
    squares = []
    for number, gradient in enumerate(gradients.values()):
        with lanes.on(number):
            # Row by row first: MLX adds up in order, and fp32 loses digits over millions of squares.
            squares.append((gradient * gradient).sum(-1).sum())
    return mx.sqrt(mx.stack(squares).sum())


def updated(
    config: OptimizerConfig,
    parameters: Parameters,
    moments: Moments,
    updates: mx.array,
    gradients: Parameters,
    rates: Rates,
    norm: mx.array,
    lanes: Lanes,
) -> tuple[Parameters, Moments, mx.array]:
    """Parameters, moments and count after one clipped update; updates: 0-d int32; norm: the gradients' norm."""
    shrink = mx.array(1.0) if config.clip is None else mx.minimum(config.clip / (norm + 1e-6), 1.0)
    count = updates + 1
    numbers = _numbers(config, count, rates.adamw, shrink)
    after: Parameters = {}
    moments_after: Moments = {prefix: {} for prefix in moments}
    shapes: dict[tuple[int, ...], list[str]] = {}
    for number, (name, parameter) in enumerate(parameters.items()):
        if takes_muon(config, name):
            shapes.setdefault(parameter.shape[-2:], []).append(name)
            continue
        old = moments["exp_avg"][name], moments["exp_avg_sq"][name]
        decay = config.weight_decay if is_decayed(parameter.shape) else 0.0
        with lanes.on(number):
            after[name], *new = _adamw(config, parameter, *old, gradients[name], decay, numbers)
        moments_after["exp_avg"][name], moments_after["exp_avg_sq"][name] = new
    for number, names in enumerate(some for alike in shapes.values() for some in lanes.divided(alike)):
        with lanes.on(number):
            changed = _muon(config, parameters, moments["momentum_buffer"], gradients, names, rates.muon, shrink)
        for name, (parameter, buffer) in changed.items():
            after[name], moments_after["momentum_buffer"][name] = parameter, buffer
    return {name: after[name] for name in parameters}, moments_after, count


def _numbers(config: OptimizerConfig, count: mx.array, rate: mx.array, shrink: mx.array) -> _Numbers:
    root = mx.sqrt(_correction(config.beta2, count))
    return _Numbers(
        first=(1 - config.beta1) * shrink,
        second=(1 - config.beta2) * shrink * shrink,
        rate=rate * root / _correction(config.beta1, count),
        eps=config.eps * root,
        decay=rate,
    )


def _adamw(
    config: OptimizerConfig, w: mx.array, m: mx.array, v: mx.array, g: mx.array, decay: float, numbers: _Numbers
) -> tuple[mx.array, mx.array, mx.array]:
    m = config.beta1 * m + numbers.first * g
    v = config.beta2 * v + numbers.second * (g * g)
    change = numbers.rate * (m / (mx.sqrt(v) + numbers.eps))
    return w * (1 - numbers.decay * decay) - change, m, v


def _correction(beta: float, count: mx.array) -> mx.array:
    """1 − β^t, without the digits that fp32 loses in β^t."""
    return mx.array(1.0) if beta == 0 else -mx.expm1(count.astype(mx.float32) * math.log(beta))


def _muon(
    config: OptimizerConfig,
    parameters: Parameters,
    buffers: Parameters,
    gradients: Parameters,
    names: list[str],
    rate: mx.array,
    shrink: mx.array,
) -> dict[str, tuple[mx.array, mx.array]]:
    """Parameters and buffers after an update of matrices of equal shape, stacks of experts unstacked."""
    new = {}
    for name in names:
        g = gradients[name] * shrink
        new[name] = g, config.momentum * buffers[name] + (1 - config.momentum) * g
    stacks = [_matrices((1 - config.momentum) * g + config.momentum * b) for g, b in new.values()]
    rows, columns = stacks[0].shape[1:]
    dtype = mx.float32 if config.newton_schulz_dtype == "float32" else mx.bfloat16
    done_PRC = orthogonalised(mx.concatenate(stacks), config.newton_schulz_steps, dtype)
    ratio, kept, start, changed = math.sqrt(max(1.0, rows / columns)), 1 - rate * config.weight_decay, 0, {}
    for name, stack in zip(names, stacks, strict=True):
        w, change = parameters[name], done_PRC[start : start + len(stack)]
        changed[name] = w * kept - (rate * ratio) * change.reshape(w.shape), new[name][1]
        start += len(stack)
    return changed


def orthogonalised(u_PRC: mx.array, steps: int, dtype: mx.Dtype) -> mx.array:
    """The nearest semi-orthogonal matrices, roughly, by Newton–Schulz iterations on all of them at once; fp32."""
    a, b, c = NEWTON_SCHULZ
    tall = u_PRC.shape[1] > u_PRC.shape[2]
    x = (u_PRC.swapaxes(1, 2) if tall else u_PRC).astype(dtype)
    norm = mx.sqrt((x.astype(mx.float32) ** 2).sum(-1, keepdims=True).sum(1, keepdims=True))
    x = (x.astype(mx.float32) / mx.maximum(norm, _SMALLEST_NORM)).astype(dtype)
    for _ in range(steps):
        gram = product(x, x.swapaxes(1, 2))
        polynomial = added_product(gram, gram, gram, alpha=c, beta=b)
        x = added_product(x, polynomial, x, beta=a)
    return (x.swapaxes(1, 2) if tall else x).astype(mx.float32)


def _matrices(array: mx.array) -> mx.array:
    """A matrix as a stack of one; a stack as it is."""
    return array if array.ndim == 3 else array[None]
