"""The transformations of optax against the definition in fp64, on stacked parameters."""

import numpy as np
import pytest

pytest.importorskip("jax")

import jax.numpy as jnp

from models.jax_engine.optimizer import clipped, fresh, orthogonalised, updated
from models.optimizer import OptimizerConfig
from tests.models import reference

SHAPES = {"wide": (3, 4, 7), "tall": (3, 9, 5), "square": (2, 6, 6), "experts": (2, 3, 5, 4)}
MUON = OptimizerConfig(name="muon", learning_rate=0.01, weight_decay=0.1)


@pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
def test_stacks_are_orthogonalised_one_matrix_at_a_time(shape: tuple[int, ...]) -> None:
    update = np.random.default_rng(0).standard_normal(shape)
    found = orthogonalised(jnp.asarray(update, jnp.float32), 5, jnp.dtype(jnp.float32))
    for place in np.ndindex(shape[:-2]):
        np.testing.assert_allclose(found[place], reference.orthogonalised(update[place], 5), atol=1e-4)
    rough = orthogonalised(jnp.asarray(update, jnp.float32), 5, jnp.dtype(jnp.bfloat16))
    assert rough.dtype == jnp.float32
    # The iterations leave singular values between 0.7 and 1.2 whatever the rounding, but not the same ones.
    assert 0 < np.linalg.norm(rough - found) < 0.2 * np.linalg.norm(found)


def test_a_matrix_of_zeros_stays_one() -> None:
    found = orthogonalised(jnp.zeros((2, 3, 4)), 5, jnp.dtype(jnp.float32))
    np.testing.assert_array_equal(found, np.zeros((2, 3, 4)))


def test_stacked_vectors_do_not_decay_and_stacked_matrices_do() -> None:
    parameters = {
        name: jnp.ones(shape)
        for name, shape in {
            "layers.input_norm.weight": (2, 5),
            "layers.attention.q_proj.weight": (2, 5, 5),
            "norm.weight": (5,),
            "embed_tokens.weight": (7, 5),
        }.items()
    }
    nothing = {name: jnp.zeros_like(array) for name, array in parameters.items()}
    changed, state = updated(MUON, parameters, fresh(MUON, parameters), nothing, jnp.array(0.5))
    left = {name: float(array.min()) for name, array in changed.items()}
    assert left["layers.input_norm.weight"] == left["norm.weight"] == 1
    assert left["layers.attention.q_proj.weight"] == pytest.approx(1 - 0.5 * MUON.muon_learning_rate * 0.1)
    assert left["embed_tokens.weight"] == pytest.approx(1 - 0.5 * 0.01 * 0.1)
    assert int(state.updates) == 1


def test_gradients_are_shrunk_to_the_clip_alone() -> None:
    gradients = {"norm.weight": jnp.array([3.0, 4.0])}
    np.testing.assert_allclose(clipped(MUON, gradients, jnp.array(5.0))["norm.weight"], [0.6, 0.8], rtol=1e-5)
    np.testing.assert_array_equal(clipped(MUON, gradients, jnp.array(0.5))["norm.weight"], [3.0, 4.0])
    free = MUON.model_copy(update={"clip": None})
    np.testing.assert_array_equal(clipped(free, gradients, jnp.array(5.0))["norm.weight"], [3.0, 4.0])
