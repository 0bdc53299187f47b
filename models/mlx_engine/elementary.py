"""The exponential function, and what is made of it, on a CPU.

MLX's own goes through one element after another there: 12 ns each for powers, 18 for sigmoids and tangents. Written in
additions and products, of which it does many at a time, powers take 4. On GPUs these are MLX's own.
"""

import math

import mlx.core as mx
from numpy.polynomial import Chebyshev, Polynomial

from models.mlx_engine.device import on_cpu

_SERIES = Polynomial([math.log(2) ** degree / math.factorial(degree) for degree in range(1, 10)])
_TERMS: list[float] = (
    _SERIES.convert(kind=Chebyshev, domain=[-0.5, 0.5]).truncate(5).convert(kind=Polynomial).coef.tolist()
)
"""Of (2^x − 1) / x by powers of x: five that serve, where |x| ≤ 1/2, as well as Taylor's first six."""
_ROUNDING = 1.5 * 2.0**23


def exp(x: mx.array) -> mx.array:
    """e^x in fp32, within the range of normal numbers; without a gradient, as `sigmoid` is."""
    return _power_of_two(x * (1 / math.log(2))) if on_cpu() else mx.exp(x)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e^-x), in the dtype of x."""
    if not on_cpu():
        return mx.sigmoid(x)
    return (1 / (1 + _power_of_two(x.astype(mx.float32) * (-1 / math.log(2))))).astype(x.dtype)


def _power_of_two(power: mx.array) -> mx.array:
    power = mx.clip(power, -126.0, 126.0)
    # So large a number has no fraction: adding it rounds, and leaves the whole power in the lowest bits.
    rounded = power + _ROUNDING
    rest = power - (rounded - _ROUNDING)
    found = rest * _TERMS[-1]
    for term in _TERMS[-2::-1]:
        found = (found + term) * rest
    return (found + 1.0) * mx.view((mx.view(rounded, mx.int32) + 127) << 23, mx.float32)


def silu(x: mx.array) -> mx.array:
    """x · sigmoid(x)."""
    found: tuple[mx.array, mx.array] = _silu(x)  # type: ignore[assignment]  # mx.custom_function has no types
    return found[0]


def gelu_tanh(x: mx.array) -> mx.array:
    """GELU in its tanh form (Hendrycks and Gimpel, 2016), which is x · sigmoid(2 · √(2/π) · (x + 0.044715 x³))."""
    found: tuple[mx.array, mx.array] = _gelu_tanh(x)  # type: ignore[assignment]  # the same
    return found[0]


# Their gradients are by what the forward pass has: MLX would take one more step back for each operation of `exp`.


@mx.custom_function
def _silu(x: mx.array) -> tuple[mx.array, mx.array]:
    gate = sigmoid(x)
    return x * gate, gate


@_silu.vjp
def _silu_gradient(x: mx.array, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]) -> mx.array:
    gradient, (found, gate) = cotangents[0], outputs
    return gradient * (gate + found * (1 - gate))


_LINEAR, _CUBIC = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715


@mx.custom_function
def _gelu_tanh(x: mx.array) -> tuple[mx.array, mx.array]:
    gate = sigmoid(x * (_LINEAR + _CUBIC * (x * x)))
    return x * gate, gate


@_gelu_tanh.vjp
def _gelu_tanh_gradient(x: mx.array, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]) -> mx.array:
    gradient, gate = cotangents[0], outputs[1]
    return gradient * gate * (1 + (1 - gate) * (x * (_LINEAR + 3 * _CUBIC * (x * x))))
