"""Two ways through a mixture's experts, both against one position at a time."""

from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("models.mlx_engine")

import mlx.core as mx  # only where MLX is

from models.mlx_engine.layers import activated
from models.mlx_engine.mixture import Experts, Mixture, balance_loss
from tests.models.tiny import tiny

CONFIG = tiny("mixtral", num_local_experts=5, num_experts_per_tok=3)
WIDTH, EXPERTS = CONFIG.hidden_size, 5


def experts() -> Experts:
    made = Experts(CONFIG, EXPERTS)
    keys = mx.random.split(mx.random.key(0), 3)
    for key, name in zip(keys, ("gate_proj", "up_proj", "down_proj"), strict=True):
        setattr(made, name, mx.random.normal(getattr(made, name).shape, key=key) * 0.3)
    return made


def one_by_one(made: Experts, x: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
    rows = []
    for position, names in enumerate(np.array(chosen)):
        row = mx.zeros(WIDTH)
        for place, expert in enumerate(names.tolist()):
            inner = activated(CONFIG, made.gate_proj[expert] @ x[position]) * (made.up_proj[expert] @ x[position])
            row = row + weights[position, place] * (made.down_proj[expert] @ inner)
        rows.append(row)
    return mx.stack(rows)


@pytest.mark.parametrize("way", ["through_all", "through_chosen"])
def test_both_ways_and_their_gradients_are_those_of_one_position_at_a_time(way: str) -> None:
    made = experts()
    x = mx.random.normal((13, WIDTH), key=mx.random.key(1))
    # One expert takes part for all, one for none.
    chosen = mx.array(np.stack([[0, *np.random.default_rng(row).permutation([1, 2, 4])[:2]] for row in range(13)]))
    weights = mx.softmax(mx.random.normal((13, 3), key=mx.random.key(2)), axis=-1)

    def squares(function: Callable[..., mx.array], *arrays: mx.array) -> mx.array:
        x, weights, made.gate_proj, made.up_proj, made.down_proj = arrays
        return (function(x, chosen, weights) ** 2).sum()

    arrays = (x, weights, made.gate_proj, made.up_proj, made.down_proj)
    numbers = tuple(range(5))
    expected = mx.value_and_grad(lambda *a: squares(lambda *b: one_by_one(made, *b), *a), argnums=numbers)(*arrays)
    found = mx.value_and_grad(lambda *a: squares(getattr(made, way), *a), argnums=numbers)(*arrays)
    assert mx.allclose(found[0], expected[0], rtol=1e-5)
    for one, other in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-4, atol=1e-5)


def test_equal_probabilities_go_to_the_experts_of_lower_number() -> None:
    mixture = Mixture(CONFIG)
    mixture.experts = experts()
    mixture.router.weight = mx.zeros_like(mixture.router.weight)
    _, routing = mixture(mx.random.normal((2, 4, WIDTH)), mx.ones((2, 4), mx.bool_))
    assert routing is not None
    assert routing.counts_E.tolist() == [8, 8, 8, 0, 0]
    np.testing.assert_allclose(np.array(routing.probabilities_E), [8 / 5] * 5, rtol=1e-6)


def test_only_real_positions_are_routed_for_the_balance() -> None:
    mixture = Mixture(CONFIG)
    mixture.experts = experts()
    mixture.router.weight = mx.random.normal(mixture.router.weight.shape, key=mx.random.key(4))
    x, real = mx.random.normal((1, 6, WIDTH), key=mx.random.key(3)), mx.array([[True] * 4 + [False] * 2])
    _, found = mixture(x, real)
    _, expected = mixture(x[:, :4], mx.ones((1, 4), mx.bool_))
    assert found is not None
    assert expected is not None
    assert found.counts_E.tolist() == expected.counts_E.tolist()
    np.testing.assert_allclose(np.array(found.probabilities_E), np.array(expected.probabilities_E), rtol=1e-6)


def test_an_even_balance_is_the_number_of_choices() -> None:
    # Every expert is chosen 3/5 of the time with a mean probability of 1/5: 5 · 5 · 3/5 · 1/5.
    loss = balance_loss(mx.full((5,), 20 / 5), mx.full((5,), 20 * 3 / 5), mx.array(20.0))
    assert float(loss) == pytest.approx(3)
