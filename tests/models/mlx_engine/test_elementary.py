"""The engine's own powers of e, against NumPy in fp64."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("models.mlx_engine")

import mlx.core as mx  # only where MLX is

from models.mlx_engine.elementary import exp, gelu_tanh, sigmoid, silu


@given(st.lists(st.floats(-87, 87, width=32), min_size=1, max_size=50))
def test_powers_have_the_digits_of_fp32(numbers: list[float]) -> None:
    x = np.array(numbers, np.float32)
    # As far as the argument goes: what fp32 rounds off x / log(2) counts |x| times.
    allowed = 3e-7 + 1.2e-7 * abs(x)
    assert (abs(np.array(exp(mx.array(x))).astype(np.float64) / np.exp(x.astype(np.float64)) - 1) <= allowed).all()


def test_powers_beyond_fp32_stay_within_it_and_what_is_no_number_stays_so() -> None:
    found = np.array(exp(mx.array([-1e30, -math.inf, 200.0, math.inf, math.nan, 0.0])))
    assert (found[:2] < 1e-37).all()
    assert (found[2:4] > 1e37).all()
    assert np.isnan(found[4])
    assert found[5] == 1


def logistic(x: np.ndarray) -> np.ndarray:
    found: np.ndarray = 1 / (1 + np.exp(-x))
    return found


FUNCTIONS: dict[str, tuple[Callable[[mx.array], mx.array], Callable[[np.ndarray], np.ndarray]]] = {
    "sigmoid": (sigmoid, logistic),
    "silu": (silu, lambda x: x * logistic(x)),
    "gelu": (gelu_tanh, lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
}


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_values_and_slopes_are_those_of_the_definitions(name: str) -> None:
    found, expected = FUNCTIONS[name]
    x = np.linspace(-20, 20, 4001, dtype=np.float32)
    np.testing.assert_allclose(np.array(found(mx.array(x))), expected(x.astype(np.float64)), rtol=3e-6, atol=1e-6)
    if name != "sigmoid":
        slopes = mx.grad(lambda x: found(x).sum())(mx.array(x))
        wide = x.astype(np.float64)
        central = (expected(wide + 1e-5) - expected(wide - 1e-5)) / 2e-5
        np.testing.assert_allclose(np.array(slopes), central, rtol=1e-5, atol=2e-6)
    for dtype in (mx.bfloat16, mx.float16):
        narrow = mx.array(x).astype(dtype)
        assert found(narrow).dtype == dtype
        of_narrow = expected(np.array(narrow.astype(mx.float32)).astype(np.float64))
        np.testing.assert_allclose(np.array(found(narrow).astype(mx.float32)), of_narrow, rtol=0.02, atol=1e-3)
