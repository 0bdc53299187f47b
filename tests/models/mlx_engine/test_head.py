"""The head's loss in parts, against MLX's own over all logits at once."""

import numpy as np
import pytest

pytest.importorskip("models.mlx_engine")

import mlx.core as mx  # only where MLX is
from mlx import nn

from models.mlx_engine import head

PARTS = [1, 5, 256]
"""Positions at a time."""
VOCABULARY = 11


def inputs(positions: int, dtype: mx.Dtype, weighted: bool = False) -> tuple[mx.array, ...]:
    keys = mx.random.split(mx.random.key(0), 5)
    x = mx.random.normal((positions, 6), key=keys[0]).astype(dtype)
    targets = mx.random.randint(0, VOCABULARY, (positions,), key=keys[2])
    counted = mx.random.bernoulli(0.7, (positions,), key=keys[3]).astype(mx.float32)
    if weighted:
        counted = counted * mx.random.normal((positions,), key=keys[4])
    return x, mx.random.normal((VOCABULARY, 6), key=keys[1]), targets, counted


def plain(x: mx.array, weight: mx.array, targets: mx.array, counted: mx.array) -> mx.array:
    logits = (x @ weight.astype(x.dtype).T).astype(mx.float32)
    return (nn.losses.cross_entropy(logits, targets) * counted).sum()


def assert_close(one: mx.array, other: mx.array, atol: float = 1e-5) -> None:
    assert one.shape == other.shape
    assert one.dtype == other.dtype
    assert mx.allclose(one, other, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("positions", "weighted"), [(1, False), (23, False), (23, True)])
def test_losses_and_gradients_are_those_of_mlx(
    part: int, positions: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head._LOGITS, "cpu", part * VOCABULARY)
    monkeypatch.setitem(head._LOGITS, "gpu", part * VOCABULARY)
    x, weight, targets, counted = inputs(positions, mx.float32, weighted)

    def gradients(loss: object) -> tuple[mx.array, tuple[mx.array, mx.array]]:
        # Of something that the loss is only a part of.
        function = mx.value_and_grad(lambda x, weight: 0.6 * loss(x, weight, targets, counted) + 1, argnums=(0, 1))  # type: ignore[operator]
        found: tuple[mx.array, tuple[mx.array, mx.array]] = function(x, weight)
        return found

    (loss, found), (whole, expected) = gradients(head.summed_loss), gradients(plain)
    assert_close(loss, whole)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)
    logs = head.target_log_probabilities(x @ weight.T, targets)
    assert_close(-(logs * counted).sum(), plain(x, weight, targets, counted))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_are_as_near_to_fp32_as_those_of_mlx(dtype: str) -> None:
    x, weight, targets, counted = inputs(50, getattr(mx, dtype))
    cast = weight.astype(x.dtype).astype(mx.float32)
    exact = mx.grad(plain, argnums=(0, 1))(x.astype(mx.float32), cast, targets, counted)
    theirs, ours = (mx.grad(loss, argnums=(0, 1))(x, weight, targets, counted) for loss in (plain, head.summed_loss))
    for best, other, found in zip(exact, theirs, ours, strict=True):
        error, allowed = (float(mx.linalg.norm(value.astype(mx.float32) - best)) for value in (found, other))
        assert error < 1.5 * allowed + 1e-6


def test_the_likeliest_of_equals_is_the_first() -> None:
    random = np.random.default_rng(0)
    logits = random.integers(-2, 3, (50, VOCABULARY))
    targets = random.integers(0, VOCABULARY, 50)
    targets[:25] = logits[:25].argmax(-1)
    logs, greedy = head.target_scores(mx.array(logits.astype(np.float32)), mx.array(targets))
    np.testing.assert_array_equal(greedy, logits.argmax(-1) == targets)
    assert (np.array(greedy) < (logits[range(50), targets] == logits.max(-1))).any()
    assert mx.array_equal(logs, head.target_log_probabilities(mx.array(logits.astype(np.float32)), mx.array(targets)))


def test_large_logits_overflow_nothing() -> None:
    x, weight, targets, counted = inputs(4, mx.float32)
    loss, gradients = mx.value_and_grad(head.summed_loss, argnums=(0, 1))(x * 1e4, weight, targets, counted)
    assert all(mx.isfinite(part).all() for part in (loss, *gradients))
