"""Growth on every engine: functions that stay as they are, and gradients that are what grown moments take them for."""

import numpy as np
import pytest
from numpy.typing import NDArray

from models import weights
from models.config import ModelConfig
from models.engine import EngineName, inference_engine
from models.growing.depth import Deeper, layer_map
from models.growing.growth import Growth, grown_optimizer, grown_weights, with_new_second_moments
from models.growing.upcycling import Upcycled
from models.growing.width import AXES, Axis, Wider
from models.optimizer import OptimizerConfig
from tests.models.agreement import (
    ADAMW,
    HERE,
    MODELS,
    MUON,
    exported,
    gradients,
    largest_share,
    restore,
    rows_of,
    small,
    tell,
    trainer,
)
from tests.models.tiny import Arrays, batch, pieces, random_weights, tiny

pytestmark = pytest.mark.agreement
every_engine = pytest.mark.parametrize("engine", HERE)


def logits(engine: EngineName, config: ModelConfig, arrays: dict[str, weights.Array]) -> NDArray[np.float32]:
    return inference_engine(engine, config, "float32", pieces(arrays)).logits(rows_of("short", 4).tokens_BT)


def changed_by(engine: EngineName, growth: Growth) -> float:
    """Root mean square of the change of logits, relative to theirs."""
    old = dict(random_weights(growth.model, 1))
    before, after = logits(engine, growth.model, old), logits(engine, growth.grown, grown_weights(growth, old))
    assert before.std() > 0.5
    found = float(np.sqrt(((after - before) ** 2).mean() / (before**2).mean()))
    tell(engine, type(growth).__name__, found)
    return found


def two_layers(variant: str, **changes: object) -> ModelConfig:
    return small(variant, num_hidden_layers=2, **changes)


@every_engine
@pytest.mark.parametrize("variant", MODELS)
def test_silent_layers_change_no_bit_of_the_logits(engine: EngineName, variant: str) -> None:
    assert changed_by(engine, Deeper(two_layers(variant), layer_map("zero", 2, 4))) == 0


@every_engine
@pytest.mark.parametrize("variant", MODELS)
def test_a_wider_model_computes_the_same(engine: EngineName, variant: str) -> None:
    assert changed_by(engine, Wider(two_layers(variant), 2, seed=3)) <= 1e-6


@pytest.mark.parametrize("axes", [AXES, *((axis,) for axis in AXES), AXES[1:], AXES[::2]], ids=str)
@pytest.mark.parametrize("variant", ["llama", "llama-tied", "mixtral", "mtlm2"])
def test_any_axis_by_any_factor_computes_the_same(variant: str, axes: tuple[Axis, ...]) -> None:
    for split in ("even", "random"):
        assert changed_by(HERE[0], Wider(two_layers(variant), 3, axes, "even" if split == "even" else "random")) <= 1e-6


@every_engine
@pytest.mark.parametrize("variant", ["llama", "llama-tied"])
def test_an_upcycled_model_computes_the_same(engine: EngineName, variant: str) -> None:
    for chosen in (1, 3):
        assert changed_by(engine, Upcycled(two_layers(variant, mlp_bias=False), 4, chosen)) <= 1e-6


def both_gradients(growth: Growth) -> tuple[Arrays, Arrays]:
    """Of the old model's weights and of the grown one's, on the same rows."""
    old = random_weights(growth.model, 1)
    found = []
    for config, arrays in ((growth.model, old), (growth.grown, grown_weights(growth, old))):
        engine = trainer(HERE[0], config)
        engine.restore("weights", weights.whole_pieces(arrays))
        found.append(gradients(engine, [batch(rows=4, length=12)]))
    return found[0], found[1]


def expected(growth: Growth, old: Arrays) -> Arrays:
    """What first moments would be that the old gradients are taken for."""
    state: dict[str, weights.Array] = {f"exp_avg:{name}": array for name, array in old.items()}
    state |= {f"exp_avg_sq:{name}": array**2 for name, array in old.items()}
    moments = grown_optimizer(growth, state, ADAMW)
    return {name.partition(":")[2]: array for name, array in moments.items() if name.startswith("exp_avg:")}


def assert_close(found: Arrays, wanted: Arrays, names: set[str]) -> None:
    assert names
    share, where = largest_share({name: wanted[name] for name in names}, {name: found[name] for name in names})
    tell("gradients", share)
    assert share <= 1, where


@pytest.mark.parametrize("variant", ["gpt2", "llama", "llama-tied", "mtlm2"])
def test_gradients_of_a_wider_model_are_as_its_moments_have_them(variant: str) -> None:
    growth = Wider(tiny(variant), 2, split="even")
    old, new = both_gradients(growth)
    assert_close(new, expected(growth, old), set(new))


def test_copies_that_are_read_in_random_parts_have_gradients_of_their_own() -> None:
    growth = Wider(tiny("llama"), 2)
    old, new = both_gradients(growth)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.gate_proj.weight"):
        copies = new[name].reshape(2, -1, 2, old[name].shape[1])
        # All together they have the gradient of what they are copies of.
        np.testing.assert_allclose(copies.sum(0)[:, 0], old[name], atol=1e-5 * abs(old[name]).max(), rtol=1e-3)
        similarity = float(np.corrcoef(copies[0].ravel(), copies[1].ravel())[0, 1])
        assert similarity < 0.95


def test_gradients_of_experts_add_up_to_those_of_the_mlp_and_others_stay() -> None:
    growth = Upcycled(tiny("llama", router_aux_loss_coef=0), 4, 2)
    old, new = both_gradients(growth)
    moments = expected(growth, old)
    stem = "model.layers.1."
    for ours, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        names = [f"{stem}block_sparse_moe.experts.{expert}.{ours}.weight" for expert in range(4)]
        for arrays in (new, moments):
            total = np.sum([arrays[name] for name in names], axis=0)
            assert_close({"": total}, {"": old[f"{stem}mlp.{theirs}.weight"]}, {""})
    assert_close(new, moments, {name for name in old if "mlp" not in name})


def test_layers_with_silent_ones_between_have_the_gradients_that_they_had() -> None:
    growth = Deeper(tiny("gpt2"), layer_map("zero", 2, 4))
    old, new = both_gradients(growth)
    moments = expected(growth, old)
    silent = {name for name in new if "h.1." in name or "h.3." in name}
    assert_close(new, moments, new.keys() - silent)
    written = {name for name in silent if "c_proj" in name}
    assert all(new[name].any() for name in written)
    assert not any(new[name].any() for name in silent - written)


def all_growths() -> list[Growth]:
    config = tiny("llama")
    return [Deeper(config, layer_map("zero", 2, 3)), Wider(config, 2), Upcycled(config, 4, 2)]


def goes_on(engine: EngineName, optimizer: OptimizerConfig, growths: list[Growth]) -> None:
    config, rows = tiny("llama"), batch(rows=4, length=12)
    old = trainer(engine, config, optimizer)
    for step in range(3):
        old.step([rows], 1.0, step)
    state = exported(old)
    arrays = {name: array for name, array in state.items() if name in weights.canonical_shapes(config)}
    moments = {name: array for name, array in state.items() if name not in arrays}
    for growth in growths:
        grown = trainer(engine, growth.grown, optimizer)
        moved = with_new_second_moments(grown_optimizer(growth, moments, optimizer), optimizer)
        restore(grown, grown_weights(growth, arrays) | moved)
        before = grown.loss(rows)[0]
        result = grown.step([rows], 1.0, 3)
        assert float(result.skipped) == 0
        assert grown.loss(rows)[0] < before
        assert exported(grown)["updates"] == 2


@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=lambda optimizer: optimizer.name)
def test_training_goes_on_from_a_grown_state(optimizer: OptimizerConfig) -> None:
    goes_on(HERE[0], optimizer, all_growths())


@pytest.mark.parametrize("engine", HERE[1:])
def test_training_goes_on_from_a_grown_state_on_any_engine(engine: EngineName) -> None:
    goes_on(engine, MUON, all_growths()[2:])
