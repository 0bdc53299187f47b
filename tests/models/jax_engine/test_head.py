"""The head's loss in parts against the plain one, gradients included."""

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

from models.jax_engine.head import part_count, target_log_probabilities, target_scores, weighted_loss

ROWS, LENGTH, WIDTH, VOCABULARY = 3, 11, 6, 17


def problem(dtype: str = "float32") -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (ROWS, LENGTH, WIDTH)).astype(dtype)
    head = jax.random.normal(keys[1], (VOCABULARY, WIDTH)).astype(dtype)
    targets = jax.random.randint(keys[2], (ROWS, LENGTH), 0, VOCABULARY)
    weights = jax.random.uniform(keys[3], (ROWS, LENGTH)) * (targets % 3 > 0)
    return x, head, targets, weights


def plain(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    logs = jax.nn.log_softmax((x @ head.T).astype(jnp.float32))
    return -(jnp.take_along_axis(logs, targets[..., None], -1)[..., 0] * weights).sum()


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 11])
def test_parts_add_up_to_the_plain_loss(parts: int) -> None:
    x, head, targets, weights = problem()
    expected, gradients = jax.value_and_grad(plain, (0, 1))(x, head, targets, weights)
    found, parts_gradients = jax.value_and_grad(
        lambda x, head: 3 * weighted_loss(x, head, targets, weights, parts), (0, 1)
    )(x, head)
    assert float(found) == pytest.approx(3 * float(expected), rel=1e-6)
    assert float(weighted_loss(x, head, targets, weights, parts)) == pytest.approx(float(expected), rel=1e-6)
    for one, other in zip(parts_gradients, gradients, strict=True):
        np.testing.assert_allclose(one, 3 * other, atol=1e-5)


@pytest.mark.parametrize("parts", [1, 4])
def test_log_probabilities_are_those_of_all_targets(parts: int) -> None:
    x, head, targets, _ = problem()
    logs = jax.nn.log_softmax(x @ head.T)
    expected = np.take_along_axis(np.asarray(logs), np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(target_log_probabilities(x, head, targets, parts), expected, atol=1e-5)


@pytest.mark.parametrize("parts", [1, 4])
def test_the_likeliest_of_equals_is_the_first(parts: int) -> None:
    random = np.random.default_rng(0)
    x, head = random.integers(-2, 3, (ROWS, LENGTH, 2)), random.integers(-2, 3, (VOCABULARY, 2))
    logits, targets = x @ head.T, random.integers(0, VOCABULARY, (ROWS, LENGTH))
    targets[0] = logits[0].argmax(-1)
    given = (jnp.array(x, jnp.float32), jnp.array(head, jnp.float32), jnp.array(targets, jnp.int32), parts)
    logs, greedy = target_scores(*given)
    np.testing.assert_array_equal(greedy, logits.argmax(-1) == targets)
    chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    assert (np.asarray(greedy) < (chosen == logits.max(-1))).any()
    np.testing.assert_array_equal(logs, target_log_probabilities(*given))


def test_sums_over_the_vocabulary_are_fp32_for_bf16_products() -> None:
    x, head, targets, weights = problem("bfloat16")
    exact = plain(x.astype(jnp.float32), head.astype(jnp.float32), targets, weights)
    found = weighted_loss(x, head, targets, weights, 2)
    assert found.dtype == jnp.float32
    assert float(found) == pytest.approx(float(exact), rel=1e-2)


def test_a_part_holds_no_more_logits_than_wanted() -> None:
    assert part_count("cpu", 1000, 16) == 1
    assert part_count("cpu", (1 << 21) + 1, 16) == 2
    assert part_count("cpu", 1 << 40, 16) == 16
    assert part_count("tpu", 1 << 27, 16) == 1
