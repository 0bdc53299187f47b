"""Preference tuning as every engine has to do it, held to its formula; and what all of them share of it."""

import importlib.util
import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common.errors import UserError
from models import lora, weights
from models.engine import Batch, EngineName, Precision, training_engine
from models.optimizer import OptimizerConfig
from models.preference import PreferenceFigures, counted_pairs, pairs_that_count, summed_figures
from tests.models.agreement import exported, restore
from tests.models.preferring import LORA, TUNING, gradients, pairs, policy, preferring, rewards
from tests.models.test_engines import assert_same
from tests.models.test_lora import random_adapters
from tests.models.tiny import pieces, random_weights, tiny

ENGINES: list[EngineName] = ["torch", "jax", "mlx"]
NAMES = ["gpt2", "mixtral"]


@pytest.fixture(params=ENGINES)
def engine_name(request: pytest.FixtureRequest) -> EngineName:
    name: EngineName = request.param
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return name


def mean_figures(rewards_B: NDArray[np.float64]) -> list[float]:
    chosen, rejected = rewards_B[::2], rewards_B[1::2]
    margins = chosen - rejected
    return [float(value.mean()) for value in (-np.log(1 / (1 + np.exp(-margins))), margins > 0, chosen, rejected)]


@pytest.mark.parametrize("name", NAMES)
def test_rewards_losses_and_figures_are_those_of_the_formula(engine_name: EngineName, name: str) -> None:
    engine, rows = preferring(engine_name, tiny(name)), pairs()
    expected = rewards(rows, engine)
    found = engine.rewards(rows)
    assert found.dtype == np.float32
    assert found.shape == (6,)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    loss, *figures = mean_figures(expected)
    assert engine.loss(rows) == pytest.approx((3 * loss, 3), rel=1e-5)
    result = engine.step([rows.part(slice(0, 4)), rows.part(slice(4, 6))], 1.0, 0)
    assert float(result.loss) == pytest.approx(loss, rel=1e-5)
    assert result.figures.tolist() == pytest.approx(figures, abs=1e-5)


def test_a_model_that_is_its_reference_loses_a_bit_of_each_pair(engine_name: EngineName) -> None:
    config = tiny("llama")
    engine = preferring(engine_name, config)
    engine.restore("weights", pieces(random_weights(config, 2)))
    np.testing.assert_allclose(engine.rewards(pairs()), 0, atol=1e-6)
    assert engine.loss(pairs())[0] == pytest.approx(3 * np.log(2), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_which_rows_are_chosen_and_the_reference_stays(engine_name: EngineName, name: str) -> None:
    engine, rows = preferring(engine_name, tiny(name)), pairs(8)
    before = rewards(rows, engine) - engine.rewards(rows)
    losses = [float(engine.step([rows], 1.0, step).loss) for step in range(40)]
    assert losses[-1] < 0.2 * losses[0]
    found = engine.rewards(rows)
    assert (found[::2] > found[1::2]).all()
    np.testing.assert_allclose(rewards(rows, engine) - found, before, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_adapters_learn_over_the_weights_that_are_the_reference(engine_name: EngineName, name: str) -> None:
    """By the gradients of the merged model: dA = s·Bᵀ·dW and dB = s·dW·Aᵀ."""
    config, rows = tiny(name), pairs(8)
    engine, merged = preferring(engine_name, config, lora=LORA), preferring(engine_name, config)
    base, given = random_weights(config, 2), random_adapters(config, LORA)
    merged.restore("weights", pieces(lora.merged(config, LORA, base, given)))
    np.testing.assert_allclose(engine.rewards(rows), rewards(rows, engine), atol=1e-5)
    assert engine.loss(rows) == pytest.approx(merged.loss(rows), rel=1e-5)
    found, of_weights = gradients(engine, [rows], lora=LORA), gradients(merged, [rows])
    for parameter in lora.adapted_parameters(config, LORA):
        dw = weights.from_canonical(parameter, of_weights.__getitem__).astype(np.float64)
        a, b = (given[kind + parameter.name].astype(np.float64) for kind in (lora.LORA_A, lora.LORA_B))
        np.testing.assert_allclose(found[lora.LORA_A + parameter.name], LORA.scale * b.T @ dw, atol=1e-5)
        np.testing.assert_allclose(found[lora.LORA_B + parameter.name], LORA.scale * dw @ a.T, atol=1e-5)
    losses = [float(engine.step([rows], 1.0, step).loss) for step in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    left = weights.gather(engine.export("weights"), lora.weights_shapes(config, LORA))
    assert_same({part: left[part] for part in base}, base)
    # Without them, it is its reference.
    engine.restore("weights", pieces(base | dict(lora.initial_adapters(config, LORA, 0))))
    assert not engine.rewards(rows).any()


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_make_no_difference(engine_name: EngineName, name: str) -> None:
    engine, rows = preferring(engine_name, tiny(name)), pairs(5)
    whole = gradients(engine, [rows])
    for bounds in ([0, 4, 10], [0, 2, 4, 6, 8, 10]):
        parts = [rows.part(slice(start, end)) for start, end in itertools.pairwise(bounds)]
        assert_same(gradients(engine, parts), whole, atol=1e-5)


def test_padding_and_pairs_without_an_answer_make_no_difference(engine_name: EngineName) -> None:
    engine, rows = preferring(engine_name, tiny("gpt2")), pairs()
    wider = ((0, 4), (0, 5))
    longer = Batch(np.pad(rows[0], wider), np.pad(rows[1], wider), np.pad(rows[2], wider))
    # The rejected answer alone does not make it a pair.
    longer.loss_mask_BT[7, 3:5] = True
    assert pairs_that_count(longer).tolist() == [True] * 3 + [False] * 2
    assert engine.loss(longer) == pytest.approx(engine.loss(rows), rel=1e-5)
    assert_same(gradients(engine, [longer]), gradients(engine, [rows]), atol=1e-5)
    first, second = (
        one.step([given], 1.0, 0) for one, given in ((engine, longer), (preferring(engine_name, tiny("gpt2")), rows))
    )
    assert first.figures.tolist() == pytest.approx(second.figures.tolist(), abs=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_restored_engine_goes_on_bitwise(engine_name: EngineName, precision: Precision) -> None:
    config = tiny("gpt2", dropout=0.2)
    straight = preferring(engine_name, config, precision=precision)
    halves: Any = None
    for step in range(4):
        if step == 2:
            halves = preferring(engine_name, config, precision=precision)
            restore(halves, exported(straight))
        batches = [pairs(seed=step), pairs(2, seed=9)]
        result = straight.step(batches, 1.0, step)
        if halves is not None:
            again = halves.step(batches, 1.0, step)
            assert [*map(float, result[:3]), *result.figures.tolist()] == [
                *map(float, again[:3]),
                *again.figures.tolist(),
            ]
    assert_same(exported(straight), exported(halves))


def test_dropout_is_for_the_trained_model_alone(engine_name: EngineName) -> None:
    dropped, plain = (preferring(engine_name, tiny("gpt2", dropout=rate)) for rate in (0.4, 0.0))
    assert dropped.loss(pairs()) == plain.loss(pairs())
    first, again, later = (gradients(dropped, [pairs()], key)["transformer.wte.weight"] for key in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert abs(first - later).max() > 1e-4


def test_what_is_no_pair_is_refused(engine_name: EngineName) -> None:
    engine, rows = preferring(engine_name, tiny("llama")), pairs()
    for wrong in (rows.part(slice(0, 3)), rows._replace(documents_BT=np.zeros_like(rows.tokens_BT))):
        with pytest.raises(ValueError, match="pairs of rows with one document each were expected"):
            engine.step([wrong], 1.0, 0)
        with pytest.raises(ValueError, match="pairs of rows with one document each were expected"):
            engine.loss(wrong)
    halves = rows._replace(loss_mask_BT=rows.loss_mask_BT & (np.arange(6) % 2 == 0)[:, None])
    with pytest.raises(UserError, match="no pair of which a token counts in both rows"):
        engine.step([halves], 1.0, 0)
    assert engine.loss(halves) == (0.0, 0)
    with pytest.raises(ValueError, match="vocabulary of 23"):
        engine.rewards(rows._replace(tokens_BT=rows.tokens_BT + 23))


def test_a_reference_of_another_model_is_refused(engine_name: EngineName) -> None:
    engine = training_engine(engine_name, tiny("llama"), OptimizerConfig(learning_rate=0.1), "float32", tuning=TUNING)
    arrays = policy(tiny("llama"))
    del arrays["lm_head.weight"]
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        engine.restore("reference", pieces(arrays))


@pytest.mark.parametrize("spread", [0.01, 1.0, 400.0])
def test_figures_are_sums_over_pairs(spread: float) -> None:
    rows = pairs(5)
    rewards_B = (spread * np.random.default_rng(0).normal(size=10)).astype(np.float32)
    loss, right, chosen, rejected = summed_figures(rewards_B, rows)
    margins = [float(one) - float(other) for one, other in zip(rewards_B[::2], rewards_B[1::2], strict=True)]
    assert loss == pytest.approx(sum(max(-z, 0) + np.log1p(np.exp(-abs(z))) for z in margins))
    assert right == sum(z > 0 for z in margins)
    assert chosen - rejected == pytest.approx(sum(margins))
    assert counted_pairs([rows, rows]) == 10
    assert PreferenceFigures.of([0.6, chosen, rejected]).margin == pytest.approx(sum(margins))
