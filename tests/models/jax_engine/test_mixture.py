"""The mixture of experts against a loop over positions, and what is chosen of equals."""

import itertools

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from flax import nnx

from models.jax_engine.mixture import Mixture, Routing, balance_loss, most_probable
from tests.models.tiny import tiny

CONFIG = tiny("mixtral")


def filled(seed: int = 0) -> Mixture:
    """A mixture with random matrices."""
    graph, state = nnx.split(Mixture(CONFIG))
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [jax.random.normal(key, leaf.shape) * 0.5 for key, leaf in zip(keys, leaves, strict=True)]
    mixture: Mixture = nnx.merge(graph, jax.tree.unflatten(structure, drawn))
    return mixture


def test_each_position_goes_through_its_own_experts() -> None:
    mixture, x_BTD = filled(), jax.random.normal(jax.random.key(9), (3, 5, CONFIG.hidden_size))
    found, routing = mixture(x_BTD, None)
    router = np.asarray(mixture.router.weight[...], np.float64)
    gate, up, down = (
        np.asarray(stack[...], np.float64)
        for stack in (mixture.experts.gate_proj, mixture.experts.up_proj, mixture.experts.down_proj)
    )
    counts, total = np.zeros(len(router)), np.zeros(len(router))
    for row, place in itertools.product(range(3), range(5)):
        x = np.asarray(x_BTD[row, place], np.float64)
        probabilities = np.exp(router @ x) / np.exp(router @ x).sum()
        chosen = np.argsort(-probabilities)[:2]
        expected = np.zeros_like(x)
        for expert in chosen:
            inner = gate[expert] @ x
            inner = inner / (1 + np.exp(-inner)) * (up[expert] @ x)
            expected += probabilities[expert] / probabilities[chosen].sum() * (down[expert] @ inner)
        np.testing.assert_allclose(found[row, place], expected, atol=1e-4)
        counts[chosen] += 1
        total += probabilities
    np.testing.assert_array_equal(routing.counts_E, counts)
    np.testing.assert_allclose(routing.probabilities_E, total, rtol=1e-5)


def test_positions_that_are_not_there_do_not_count() -> None:
    mixture, x_BTD = filled(), jax.random.normal(jax.random.key(9), (2, 6, CONFIG.hidden_size))
    real_BT = jnp.arange(6) < jnp.array([[4], [2]])
    _, routing = mixture(x_BTD, real_BT.astype(jnp.float32))
    parts = [mixture(x_BTD[row : row + 1, :length], None)[1] for row, length in ((0, 4), (1, 2))]
    np.testing.assert_array_equal(routing.counts_E, parts[0].counts_E + parts[1].counts_E)
    np.testing.assert_allclose(routing.probabilities_E, parts[0].probabilities_E + parts[1].probabilities_E, rtol=1e-5)


def test_an_even_mixture_has_a_balance_of_as_many_as_are_chosen() -> None:
    counts_E, probabilities_E = jnp.full(4, 30.0), jnp.full(4, 15.0)
    assert float(balance_loss(Routing(counts_E, probabilities_E), counts_E, jnp.array(60.0))) == pytest.approx(2.0)


@pytest.mark.parametrize("experts", [4, 8])
@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_of_experts_that_are_as_probable_the_first_are_chosen(experts: int, chosen: int) -> None:
    levels = np.array(list(itertools.product([0.1, 0.2, 0.3], repeat=4)), np.float32)
    probabilities = np.tile(levels, (1, experts // 4))
    expected = np.argsort(-probabilities, axis=-1, kind="stable")[:, :chosen]
    values, found = most_probable(jnp.asarray(probabilities), chosen)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(probabilities, expected, -1))
