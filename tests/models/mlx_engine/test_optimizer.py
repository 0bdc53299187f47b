"""The parts of the optimizer that have numbers of their own, in fp64 beside them."""

import numpy as np
import pytest

pytest.importorskip("models.mlx_engine")

import mlx.core as mx  # only where MLX is

from models.mlx_engine.lanes import Lanes
from models.mlx_engine.loss_scale import LossScale, fresh_scale, next_scale
from models.mlx_engine.optimizer import _correction, gradient_norm, orthogonalised
from tests.models import reference


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_orthogonalised_matrices_are_those_of_the_definition(shape: tuple[int, int]) -> None:
    matrices = np.random.default_rng(0).standard_normal((3, *shape))
    expected = np.stack([reference.orthogonalised(matrix, 5) for matrix in matrices])
    found = np.array(orthogonalised(mx.array(matrices.astype(np.float32)), 5, mx.float32))
    np.testing.assert_allclose(found, expected, atol=2e-4)
    half = orthogonalised(mx.array(matrices.astype(np.float32)), 5, mx.bfloat16)
    assert half.dtype == mx.float32
    np.testing.assert_allclose(np.array(half), expected, atol=0.1)


def test_a_matrix_of_nothing_stays_so() -> None:
    assert not orthogonalised(mx.zeros((1, 3, 4)), 5, mx.float32).any()


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.999999])
def test_bias_corrections_keep_their_digits(beta: float) -> None:
    for count in (1, 2, 100, 1_000_000):
        found = float(_correction(beta, mx.array(count, mx.int32)))
        assert found == pytest.approx(-np.expm1(count * np.log(beta)) if beta else 1, rel=1e-6)


def test_the_norm_of_many_numbers_keeps_its_digits() -> None:
    gradients = {"one": np.full((4096, 512), 0.1, np.float32), "other": np.full(300, 0.1, np.float32)}
    expected = np.sqrt(sum((array.astype(np.float64) ** 2).sum() for array in gradients.values()))
    found = gradient_norm({name: mx.array(array) for name, array in gradients.items()}, Lanes(1))
    assert float(found) == pytest.approx(expected, rel=3e-5)


def test_the_loss_scale_falls_with_a_skip_and_rises_after_many_updates_without() -> None:
    finite, broken = mx.array(True), mx.array(False)
    scale = fresh_scale(True)
    start = float(scale.scale)
    scale = next_scale(next_scale(scale, finite), broken)
    assert (float(scale.scale), int(scale.steady)) == (start / 2, 0)
    for _ in range(1000):
        assert float(scale.scale) == start / 2
        scale = next_scale(scale, finite)
    assert (float(scale.scale), int(scale.steady)) == (start, 0)
    smallest = next_scale(LossScale(mx.array(1.0), mx.array(3)), broken)
    assert float(smallest.scale) == 1
    largest = next_scale(LossScale(mx.array(2.0**24), mx.array(999)), finite)
    assert float(largest.scale) == 2**24
