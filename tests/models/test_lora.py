"""Low-rank adapters: their definition, and what every engine has to do alike with them."""

import math
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from models import lora, weights
from models.config import ModelConfig
from models.engine import EngineName, Precision, TrainingEngine, training_engine
from models.optimizer import OptimizerConfig
from models.tuning import LoraConfig, Projection, Tuning
from tests.models.test_engines import ADAMW, MUON, assert_same, engine_name, exported
from tests.models.tiny import Arrays, batch, cut, pieces, random_weights, tiny

__all__ = ["engine_name"]  # the fixture

ALL = LoraConfig(rank=3, alpha=6)
ATTENTION = LoraConfig(rank=3, alpha=6, targets=("q_proj", "v_proj", "o_proj"))


def random_adapters(config: ModelConfig, settings: LoraConfig, seed: int = 2) -> Arrays:
    """Adapters whose B is not zero, so that A has a gradient too."""
    random = np.random.default_rng(seed)
    shapes = lora.adapter_shapes(config, settings)
    return {name: np.float32(0.2) * random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def tuned(
    engine_name: EngineName,
    config: ModelConfig,
    settings: LoraConfig = ALL,
    optimizer: OptimizerConfig = ADAMW,
    precision: Precision = "float32",
    adapters: Arrays | None = None,
) -> TrainingEngine:
    """An engine that trains adapters of random weights."""
    engine = training_engine(engine_name, config, optimizer, precision, tuning=Tuning(lora=settings))
    given = random_adapters(config, settings) if adapters is None else adapters
    engine.restore("weights", pieces({**random_weights(config, 1), **given}))
    return engine


def whole(engine_name: EngineName, config: ModelConfig, arrays: Arrays) -> TrainingEngine:
    engine = training_engine(engine_name, config, ADAMW, "float32")
    engine.restore("weights", pieces(arrays))
    return engine


def adapters_of(engine: TrainingEngine, config: ModelConfig, settings: LoraConfig = ALL) -> Arrays:
    found = weights.gather(engine.export("weights"), lora.weights_shapes(config, settings))
    return {name: found[name] for name in lora.adapter_shapes(config, settings)}


def test_adapters_are_of_the_projections_that_are_asked_for() -> None:
    config = tiny("llama")
    asked: tuple[Projection, ...] = ("q_proj", "down_proj")
    shapes = lora.adapter_shapes(config, LoraConfig(rank=5, targets=asked))
    assert shapes == {
        f"{kind}:layers.{layer}.{name}.weight": shape
        for layer in range(2)
        for name, rows, columns in (("attention.q_proj", 24, 16), ("mlp.down_proj", 16, 24))
        for kind, shape in (("lora_A", (5, columns)), ("lora_B", (rows, 5)))
    }
    assert lora.adapter_count(config, LoraConfig(rank=5, targets=asked)) == 2 * 2 * 5 * (16 + 24)
    names = {parameter.name.rpartition(".")[0] for parameter in lora.adapted_parameters(tiny("gpt2"), LoraConfig())}
    assert "layers.1.mlp.up_proj" in names
    assert not any("gate_proj" in name for name in names)  # which gpt2 has not
    # Neither biases nor norms.
    assert all(len(parameter.shape) == 2 for parameter in lora.adapted_parameters(tiny("llama-tied"), LoraConfig()))


def test_targets_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match=r"lora\.targets: gate_proj, up_proj, down_proj of a mixture are its experts'"):
        lora.adapted_parameters(tiny("mixtral"), LoraConfig())
    assert len(lora.adapted_parameters(tiny("mixtral"), ATTENTION)) == 6
    with pytest.raises(UserError, match=r"the model has no gate_proj; it has q_proj, k_proj, v_proj, o_proj, up_proj"):
        lora.adapted_parameters(tiny("gpt2"), LoraConfig(targets=("gate_proj",)))


def test_fresh_adapters_have_streams_of_their_own() -> None:
    config = tiny("llama")
    found, again = (lora.initial_adapters(config, LoraConfig(rank=64), 5) for _ in range(2))
    assert_same(dict(found), dict(again))
    other = lora.initial_adapters(config, LoraConfig(rank=64), 6)
    few = lora.initial_adapters(config, LoraConfig(rank=64, targets=("v_proj",)), 5)
    assert_same(dict(few), {name: found[name] for name in few})
    for name, array in found.items():
        if name.startswith("lora_B:"):
            assert not array.any()
            continue
        bound = 1 / math.sqrt(array.shape[1])
        assert abs(array).max() <= bound
        assert array.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert abs(array.mean()) < 0.1 * bound
        assert (array != other[name]).any()


@pytest.mark.parametrize("name", ["llama", "gpt2", "custom"])
def test_merged_weights_have_the_product_in_its_place(name: str) -> None:
    """Matrix by matrix, whatever array it stands in; what has no adapter is not touched."""
    config, settings = tiny(name), LoraConfig(rank=3, alpha=1.5, targets=("k_proj", "up_proj"))
    base, adapters = random_weights(config, 1), random_adapters(config, settings)
    kept = {name: array.copy() for name, array in base.items()}
    found = lora.merged(config, settings, base, adapters)
    assert_same(base, kept)
    adapted = {parameter.name for parameter in lora.adapted_parameters(config, settings)}
    for parameter in weights.parameters(config):
        one, other = (
            weights.from_canonical(parameter, arrays.__getitem__).astype(np.float32) for arrays in (base, found)
        )
        if parameter.name in adapted:
            product = adapters[f"lora_B:{parameter.name}"].astype(np.float64) @ adapters[f"lora_A:{parameter.name}"]
            np.testing.assert_allclose(other, one + 0.5 * product, atol=1e-6)
        else:
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fresh_adapters_change_nothing(engine_name: EngineName, name: str) -> None:
    config = tiny(name)
    fresh = tuned(engine_name, config, adapters=dict(lora.initial_adapters(config, ALL, 0)))
    plain = whole(engine_name, config, random_weights(config, 1))
    assert fresh.loss(batch()) == plain.loss(batch())
    tokens_BT = batch().tokens_BT
    np.testing.assert_array_equal(fresh.inference().logits(tokens_BT), plain.inference().logits(tokens_BT))


@pytest.mark.parametrize(
    ("name", "settings"), [("llama", ALL), ("gpt2", ALL), ("mixtral", ATTENTION)], ids=["llama", "gpt2", "mixtral"]
)
def test_a_tuned_model_is_the_merged_one(engine_name: EngineName, name: str, settings: LoraConfig) -> None:
    """Loss, log-probabilities, and gradients: dA = s·Bᵀ·dW and dB = s·dW·Aᵀ of the merged model's dW."""
    config, given = tiny(name), random_adapters(tiny(name), settings)
    engine = tuned(engine_name, config, settings)
    base = random_weights(config, 1)
    merged = whole(engine_name, config, lora.merged(config, settings, base, given))
    rows = batch(rows=7)
    assert engine.loss(rows) == pytest.approx(merged.loss(rows), rel=1e-5)
    one, other = (each.inference().log_probabilities(rows) for each in (engine, merged))
    np.testing.assert_allclose(one, other, atol=1e-5)
    found: Arrays = weights.gather(engine.gradients(cut(rows, 2), 0), lora.adapter_shapes(config, settings))
    of_weights = weights.gather(merged.gradients(cut(rows, 2), 0), weights.canonical_shapes(config))
    for parameter in lora.adapted_parameters(config, settings):
        dw = weights.from_canonical(parameter, of_weights.__getitem__).astype(np.float64)
        a, b = (given[kind + parameter.name].astype(np.float64) for kind in (lora.LORA_A, lora.LORA_B))
        np.testing.assert_allclose(found[f"lora_A:{parameter.name}"], 2 * b.T @ dw, atol=1e-5)
        np.testing.assert_allclose(found[f"lora_B:{parameter.name}"], 2 * dw @ a.T, atol=1e-5)


@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=lambda config: config.name)
def test_adapters_learn_by_adamw_and_the_weights_stay(engine_name: EngineName, optimizer: OptimizerConfig) -> None:
    """Clipped by the adapters' norm alone, decayed as matrices are; with Muon's config, too."""
    config, rows = tiny("gpt2"), batch()
    engine = tuned(engine_name, config, optimizer=optimizer)
    before = adapters_of(engine, config)
    gradients = weights.gather(engine.gradients([rows], 0), lora.adapter_shapes(config, ALL))
    norm = math.sqrt(sum(float((gradient.astype(np.float64) ** 2).sum()) for gradient in gradients.values()))
    result = engine.step([rows], 0.5, 0)
    assert float(result.gradient_norm) == pytest.approx(norm, rel=1e-4)
    rate = 0.5 * optimizer.learning_rate
    for name, array in adapters_of(engine, config).items():
        clipped = gradients[name].astype(np.float64) * min(1, optimizer.clip / (norm + 1e-6))  # type: ignore[operator]
        step = clipped / (abs(clipped) + optimizer.eps)
        large = abs(clipped) > 1e-5  # of smaller ones, rounding is much of the first step
        expected = before[name] * (1 - rate * optimizer.weight_decay) - rate * step
        assert large.mean() > 0.5
        np.testing.assert_allclose(array[large], expected[large], atol=2e-5, err_msg=name)
    losses = [float(engine.step([rows], 1.0, step).loss) for step in range(1, 13)]
    assert losses[-1] < 0.7 * losses[0]
    found = weights.gather(engine.export("weights"), lora.weights_shapes(config, ALL))
    for name, array in random_weights(config, 1).items():
        assert found[name].tobytes() == array.tobytes(), name
    assert engine.loss(rows)[0] / engine.loss(rows)[1] < losses[-1]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_restored_engine_goes_on_bitwise(engine_name: EngineName, precision: Precision) -> None:
    config = tiny("llama", dropout=0.2)
    straight = tuned(engine_name, config, precision=precision)
    halves: Any = None
    for step in range(5):
        if step == 2:
            halves = tuned(engine_name, config, precision=precision, adapters=random_adapters(config, ALL, seed=9))
            halves.step([batch()], 1.0, 0)
            halves.restore("weights", straight.export("weights"))
            halves.restore("optimizer", straight.export("optimizer"))
            assert straight.loss(batch()) == halves.loss(batch())
        result = straight.step(cut(batch(seed=step), 2), 1.0, step)
        if halves is not None:
            again = halves.step(cut(batch(seed=step), 2), 1.0, step)
            assert [float(value) for value in result[:3]] == [float(value) for value in again[:3]]
    assert_same(exported(straight), exported(halves))


def test_what_is_restored_has_to_be_all_of_it(engine_name: EngineName) -> None:
    config = tiny("llama")
    engine = tuned(engine_name, config, ATTENTION)
    base, adapters = random_weights(config, 1), random_adapters(config, ATTENTION)
    missing = r"lora_A:layers\.0\.attention\.q_proj\.weight is missing"
    with pytest.raises(ValueError, match=missing):
        engine.restore("weights", pieces(base))
    with pytest.raises(ValueError, match=r"lora_A:layers\.0\.attention\.k_proj\.weight is unexpected"):
        engine.restore("weights", pieces({**base, **random_adapters(config, ALL)}))
    other = random_adapters(config, ATTENTION.model_copy(update={"rank": 2}))
    with pytest.raises(ValueError, match=r"q_proj\.weight has shape \(2, 16\)"):
        engine.restore("weights", pieces({**base, **other}))
    with pytest.raises(ValueError, match=r"lora_A:layers\.0\.attention\.q_proj\.weight is unexpected"):
        whole(engine_name, config, {**base, **adapters})
    state = {piece.name: piece for piece in engine.export("optimizer")}
    assert state.keys() == lora.optimizer_shapes(config, ADAMW, ATTENTION).keys()
    assert all(name == "updates" or name.partition(":")[2] in adapters for name in state)
    del state["exp_avg:lora_B:layers.1.attention.o_proj.weight"]
    with pytest.raises(ValueError, match=r"exp_avg:lora_B:layers\.1\.attention\.o_proj\.weight is missing"):
        engine.restore("optimizer", state.values())


def test_an_update_that_is_not_finite_is_skipped(engine_name: EngineName) -> None:
    config = tiny("llama")
    engine = tuned(engine_name, config)
    broken = exported(engine, optimizer=False)
    broken["model.layers.1.mlp.down_proj.weight"][0, 0] = np.inf
    engine.restore("weights", pieces(broken))
    before = exported(engine)
    assert float(engine.step([batch()], 1.0, 1).skipped) == 1
    assert_same(exported(engine), before)
