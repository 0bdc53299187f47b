"""Deeper models, and what all growths have in common: shapes, counts of parameters, and optimizer states."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from common.errors import UserError
from models.config import ModelConfig
from models.growing.depth import METHODS, Deeper, Layer, Method, grown_layers, layer_map
from models.growing.growth import Growth, grown_optimizer, grown_weights, with_new_second_moments
from models.growing.upcycling import Upcycled
from models.growing.width import AXES, Axis, Wider
from models.optimizer import OptimizerConfig
from models.weights import Array, canonical_shapes, initial_weights, optimizer_shapes, parameter_count
from tests.models.reference import ReferenceOptimizer

SHAPE = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "max_position_embeddings": 6,
}
ARCHITECTURES: dict[str, dict[str, object]] = {
    "gpt2": {"architecture": "gpt2"},
    "llama": {"architecture": "llama", "num_key_value_heads": 1},
    "mixtral": {"architecture": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
}
OPTIMIZERS = [
    OptimizerConfig(learning_rate=0.01),
    OptimizerConfig(name="muon", learning_rate=0.01, muon_learning_rate=0.01),
]
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def model(architecture: str, layers: int, **changes: object) -> ModelConfig:
    keys = {**SHAPE, **ARCHITECTURES[architecture], "num_hidden_layers": layers, **changes}
    return ModelConfig.model_validate(keys)


def sources(method: Method, layers: int, target: int, block: int | None = None) -> list[int | None]:
    return [layer.source for layer in layer_map(method, layers, target, block)]


def counted(config: ModelConfig) -> int:
    """Parameters by hand, for models without biases but GPT-2's."""
    wide, inner, kv = config.hidden_size, config.intermediate_size, config.key_value_size
    vocabulary = config.vocab_size * wide * (1 if config.tie_word_embeddings else 2)
    attention = 2 * wide * config.query_size + 2 * wide * kv
    if config.architecture == "gpt2":
        block = attention + 4 * wide + 2 * wide * inner + inner + wide + 4 * wide
        return vocabulary + config.max_position_embeddings * wide + config.num_hidden_layers * block + 2 * wide
    experts = config.num_local_experts
    mlp = 3 * wide * inner if experts is None else experts * (3 * wide * inner + wide)
    return vocabulary + config.num_hidden_layers * (attention + mlp + 2 * wide) + wide


def random_state(config: ModelConfig, optimizer: OptimizerConfig, seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    shapes = optimizer_shapes(config, optimizer)
    state: dict[str, Array] = {name: random.random(shape, np.float32) for name, shape in shapes.items() if shape}
    return state | {"updates": np.array(7, np.int64)}


def test_the_order_of_layers() -> None:
    assert sources("stack", 3, 6) == [0, 1, 2, 0, 1, 2]
    assert sources("stack", 4, 6) == [0, 1, 2, 3, 2, 3]
    assert sources("stack", 3, 10) == [0, 1, 2, 0, 1, 2, 0, 1, 2, 2]
    assert sources("interleave", 3, 6) == [0, 0, 1, 1, 2, 2]
    assert sources("interleave", 4, 6) == [0, 1, 1, 2, 3, 3]
    assert sources("interleave", 2, 5) == [0, 0, 1, 1, 1]
    assert sources("middle", 3, 4) == [0, 1, 1, 2]
    assert sources("middle", 6, 8) == [0, 1, 2, 3, 2, 3, 4, 5]
    assert sources("middle", 4, 8) == [0, 1, 2, 1, 2, 1, 2, 3]
    assert sources("middle", 4, 8, block=1) == [0, 1, 1, 1, 1, 1, 2, 3]
    assert sources("overlap", 8, 12) == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7]
    assert sources("overlap", 3, 4) == [0, 1, 1, 2]
    copy, silent = Layer(0), Layer(0, "silent")
    assert layer_map("zero", 1, 3) == (copy, silent, silent)
    assert layer_map("zero", 4, 6) == (copy, Layer(1), Layer(1, "silent"), Layer(2), Layer(3), Layer(3, "silent"))
    assert sources("random", 4, 6) == [0, 1, None, 2, 3, None]


def test_midas_doubles_in_steps_of_a_block() -> None:
    # Twelve layers in three blocks of four: the second is repeated.
    assert sources("middle", 12, 16) == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 8, 9, 10, 11]


@given(layers=st.integers(1, 20), added=st.integers(1, 40), method=st.sampled_from(METHODS))
def test_every_map_has_as_many_layers_as_asked_for_and_begins_and_ends_as_the_model(
    layers: int, added: int, method: Method
) -> None:
    assume(method != "middle" or layers >= 3)
    assume(method != "overlap" or (added < layers and (layers + added) % 2 == 0))
    found = layer_map(method, layers, layers + added)
    assert len(found) == layers + added
    assert found[0] == Layer(0)
    assert found[-1].neighbour == layers - 1
    kept = [layer.source for layer in found if layer.state == "copy"]
    assert set(kept) == set(range(layers))
    # What lies behind a layer is the next one, or where a copy of some block begins again.
    for one, other in itertools.pairwise(layer.neighbour for layer in found):
        assert other <= one + 1
    if method in ("zero", "random"):
        assert kept == list(range(layers))
        assert sum(layer.state != "copy" for layer in found) == added


@given(layers=st.integers(1, 40), target=st.integers(1, 200))
def test_a_factor_gives_the_layers_that_it_says(layers: int, target: int) -> None:
    if 100 * target % layers == 0:
        assert grown_layers(layers, target * 100 // layers / 100) == target
    if target % layers:
        with pytest.raises(UserError, match="no whole number of layers"):
            grown_layers(layers, target / layers + 1e-4)


@pytest.mark.parametrize(
    ("method", "layers", "target", "block", "message"),
    [
        ("stack", 4, 4, None, "the model has 4 layers already; a grown one has more, not 4"),
        ("zero", 4, 3, None, "the model has 4 layers already"),
        ("middle", 2, 4, None, "middle keeps a layer before and behind what it repeats: 3 layers at least, not 2"),
        ("middle", 5, 9, 4, "block 4 leaves no layer before and behind it: 5 layers have a block of 3"),
        ("middle", 5, 9, 3, "middle adds 4 layers, which blocks of 3 do not make up"),
        ("overlap", 4, 5, None, "an even number of layers, not 5"),
        ("overlap", 4, 8, None, "overlap drops layers of two copies of 4: fewer than 8, not 8"),
    ],
)
def test_maps_that_cannot_be_are_refused(
    method: Method, layers: int, target: int, block: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        layer_map(method, layers, target, block)


def test_a_factor_without_whole_layers_is_refused() -> None:
    assert grown_layers(10, 1.1) == 11
    with pytest.raises(
        UserError, match=r"factor 1\.3 of 4 layers is 5\.2, no whole number of layers; .*num_hidden_lay"
    ):
        grown_layers(4, 1.3)


@every_architecture
@given(layers=st.integers(1, 6), added=st.integers(1, 9), method=st.sampled_from(["stack", "interleave"]))
def test_copies_are_their_sources_arrays_moments_included(
    architecture: str, layers: int, added: int, method: Method
) -> None:
    config, optimizer = model(architecture, layers), OPTIMIZERS[0]
    growth = Deeper(config, layer_map(method, layers, layers + added))
    weights: dict[str, Array] = dict(initial_weights(config, 0))
    state = random_state(config, optimizer)
    grown = {**grown_weights(growth, weights), **grown_optimizer(growth, state, optimizer)}
    shapes = canonical_shapes(growth.grown)
    assert {name: array.shape for name, array in grown.items()} == shapes | optimizer_shapes(growth.grown, optimizer)
    assert grown["updates"] == 7
    stem = "transformer.h" if architecture == "gpt2" else "model.layers"
    for new, layer in enumerate(growth.layers):
        of_new = {name: array for name, array in grown.items() if f"{stem}.{new}." in name}
        assert of_new
        for name, array in of_new.items():
            assert array is {**weights, **state}[name.replace(f"{stem}.{new}.", f"{stem}.{layer.source}.")]


def growths(architecture: str) -> Mapping[str, Growth]:
    config = model(architecture, 4)
    found: dict[str, Growth] = {
        method: Deeper(config, layer_map(method, 4, 6), seed=5) for method in METHODS if method != "overlap"
    }
    found |= {"overlap": Deeper(config, layer_map("overlap", 4, 6)), "width": Wider(config, 2, seed=5)}
    if architecture == "llama":
        found["upcycle"] = Upcycled(config, 4, 2, seed=5)
    return found


ALL = [(architecture, method) for architecture in ARCHITECTURES for method in growths(architecture)]


@pytest.mark.parametrize(("architecture", "method"), ALL)
def test_parameters_are_as_many_as_counted_by_hand(architecture: str, method: str) -> None:
    growth = growths(architecture)[method]
    weights = grown_weights(growth, dict(initial_weights(growth.model, 0)))
    assert {name: array.shape for name, array in weights.items()} == canonical_shapes(growth.grown)
    assert sum(array.size for array in weights.values()) == counted(growth.grown) == parameter_count(growth.grown)
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer.name)
@pytest.mark.parametrize(("architecture", "method"), ALL)
def test_moments_fit_the_grown_model(architecture: str, method: str, optimizer: OptimizerConfig) -> None:
    growth = growths(architecture)[method]
    state = grown_optimizer(growth, random_state(growth.model, optimizer), optimizer)
    assert {name: array.shape for name, array in state.items()} == optimizer_shapes(growth.grown, optimizer)
    assert {array.dtype for name, array in state.items() if name != "updates"} == {np.dtype(np.float32)}
    assert state["updates"] == 7
    assert all(array.astype(np.float64).min() >= 0 for name, array in state.items() if name.startswith("exp_avg_sq:"))


@every_architecture
def test_silent_layers_add_nothing_and_have_second_moments_alone(architecture: str) -> None:
    config, optimizer = model(architecture, 2), OPTIMIZERS[0]
    growth = Deeper(config, layer_map("zero", 2, 4))
    weights: dict[str, Array] = {name: array + 1 for name, array in initial_weights(config, 0).items()}
    state = random_state(config, optimizer)
    grown = {**grown_weights(growth, weights), **grown_optimizer(growth, state, optimizer)}
    stem = "transformer.h" if architecture == "gpt2" else "model.layers"
    ends = ("c_proj.weight", "c_proj.bias", "o_proj.weight", "down_proj.weight", "w2.weight")
    for name, array in grown.items():
        if f"{stem}.1." in name or f"{stem}.3." in name:
            moment = name.rpartition(":")[0]
            silent = name.endswith(ends) if not moment else moment == "exp_avg"
            assert array.any() != silent, name


@every_architecture
def test_fresh_layers_are_drawn_and_have_second_moments_as_large_as_those_around(architecture: str) -> None:
    config, optimizer = model(architecture, 2), OPTIMIZERS[0]
    growth, other = (Deeper(config, layer_map("random", 2, 4), seed) for seed in (1, 2))
    weights: dict[str, Array] = dict(initial_weights(config, 0))
    state = random_state(config, optimizer)
    drawn = initial_weights(growth.grown, 1)
    grown, again = grown_weights(growth, weights), grown_weights(other, weights)
    moments = grown_optimizer(growth, state, optimizer)
    stem = "transformer.h" if architecture == "gpt2" else "model.layers"
    for name, array in grown.items():
        old = name.replace(f"{stem}.1.", f"{stem}.0.").replace(f"{stem}.3.", f"{stem}.1.")
        if f"{stem}.1." not in name and f"{stem}.3." not in name:
            continue
        assert array.std() == pytest.approx(drawn[name].std(), rel=0.5)
        if array.ndim == 1:
            np.testing.assert_array_equal(array, drawn[name])
        else:
            assert (array != again[name]).mean() > 0.9
        assert not moments[f"exp_avg:{name}"].any()
        # One mean for all experts of a layer, and one for each of GPT-2's fused projections.
        assert moments[f"exp_avg_sq:{name}"].mean() == pytest.approx(
            state[f"exp_avg_sq:{old}"].mean(), rel=0.2 if "experts" in name else 1e-5
        )


@every_architecture
def test_fresh_layers_are_none_that_the_same_seed_drew_before(architecture: str) -> None:
    """Not those of the base, and not those of a growth before."""
    config = model(architecture, 2, hidden_size=16)
    once = Deeper(config, layer_map("random", 2, 4), seed=0)
    twice = Deeper(once.grown, layer_map("random", 4, 8), seed=0)
    weights: dict[str, Array] = dict(initial_weights(config, 0))
    grown = grown_weights(twice, grown_weights(once, weights))
    whole: dict[str, Array] = dict(initial_weights(twice.grown, 0))
    stem = "transformer.h" if architecture == "gpt2" else "model.layers"
    matrices = [name for name, array in grown.items() if name.startswith(f"{stem}.0.") and array.ndim == 2]
    for name in matrices:
        layers = [arrays[name.replace(".0.", f".{n}.", 1)] for arrays in (grown, whole) for n in range(8)]
        similarity = np.corrcoef([layer.ravel().astype(np.float64) for layer in layers])[:8]
        # The layers of the base alone are such: 0, and 1 further up.
        similarity[0, 8] = similarity[4, 9] = 0
        assert (similarity > 0.7).sum() == 8, name  # each with itself


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer.name)
@pytest.mark.parametrize("updates", [1, 7, 4000])
def test_new_second_moments_are_those_of_one_update_by_the_mean_gradient(
    optimizer: OptimizerConfig, updates: int
) -> None:
    config = model("llama", 2)
    state: dict[str, Array] = {**random_state(config, optimizer), "updates": np.array(updates, np.int64)}
    found = with_new_second_moments(state, optimizer)
    gradients: dict[str, Any] = {
        name: state.get(f"exp_avg:{name}", np.zeros(shape)).astype(np.float64) / (1 - optimizer.beta1**updates)
        for name, shape in canonical_shapes(config).items()
    }
    unclipped = optimizer.model_copy(update={"clip": None})
    reference = ReferenceOptimizer(config, unclipped, dict(initial_weights(config, 0)))
    reference.step(gradients, 1.0)
    assert found["updates"] == reference.updates == 1
    assert found.keys() == state.keys()
    for parameter in reference.parameters:
        (place,) = parameter.placements
        for moment, expected in (("exp_avg", reference.first), ("exp_avg_sq", reference.second)):
            if (name := f"{moment}:{place.name}") in state:
                array = found[name].astype(np.float64)
                np.testing.assert_allclose(array, expected[parameter.name], rtol=1e-5)
        if (name := f"momentum_buffer:{place.name}") in state:
            assert found[name] is state[name]


def test_a_state_of_no_updates_stays() -> None:
    state: dict[str, Array] = {"exp_avg:x": np.zeros(2, np.float32), "updates": np.array(0, np.int64)}
    assert with_new_second_moments(state, OPTIMIZERS[0]) == state


def test_the_loss_scale_of_float16_goes_along() -> None:
    config = model("llama", 1)
    state: dict[str, Array] = {**random_state(config, OPTIMIZERS[0]), "loss_scale": np.array(8, np.float32)}
    grown = grown_optimizer(Deeper(config, layer_map("stack", 1, 2)), state, OPTIMIZERS[0])
    assert with_new_second_moments(grown, OPTIMIZERS[0])["loss_scale"] == 8


@every_architecture
def test_random_parts_sum_to_the_old_weight_and_differ(architecture: str) -> None:
    config = model(architecture, 1)
    old: dict[str, Array] = dict(initial_weights(config, 0))
    one, other = (grown_weights(Wider(config, 3, seed=seed), old) for seed in (1, 2))
    even = grown_weights(Wider(config, 3, split="even"), old)
    read = {"gpt2": "transformer.h.0.attn.c_proj", "llama": "model.layers.0.mlp.down_proj"}
    name = read.get(architecture, "model.layers.0.block_sparse_moe.experts.1.w2") + ".weight"
    was = (old[name].T if architecture == "gpt2" else old[name]).astype(np.float64)
    for grown in (one, other, even):
        array = (grown[name].T if architecture == "gpt2" else grown[name]).astype(np.float64)
        parts = array.reshape(3, was.shape[0], 3, was.shape[1])
        np.testing.assert_allclose(parts.sum(2), np.stack([was] * 3), rtol=1e-5, atol=1e-8)
        shares = parts / was[None, :, None]
        assert shares.min() > -1e-5
        assert (shares.std() < 1e-6) == (grown is even)
    assert (one[name] != other[name]).mean() > 0.9


AXIS_SETS = [axes for size in (1, 2, 3) for axes in itertools.combinations(AXES, size)]


@pytest.mark.parametrize("axes", AXIS_SETS, ids=str)
@every_architecture
def test_each_axis_grows_alone_where_the_architecture_lets_it(architecture: str, axes: tuple[Axis, ...]) -> None:
    config = model(architecture, 1)
    growth = Wider(config, 2, axes)
    if architecture == "gpt2" and ("hidden_size" in axes) != ("num_attention_heads" in axes):
        with pytest.raises(UserError, match="alone cannot grow: gpt2 has as many key-value heads as heads"):
            _ = growth.grown
        return
    grown = growth.grown
    assert grown.head_dim == config.head_dim
    assert grown.num_attention_heads // grown.num_key_value_heads == (
        config.num_attention_heads // config.num_key_value_heads
    )
    for axis in AXES:
        assert getattr(grown, axis) == getattr(config, axis) * (2 if axis in axes else 1)
    weights = grown_weights(growth, dict(initial_weights(config, 0)))
    assert {name: array.shape for name, array in weights.items()} == canonical_shapes(grown)
    assert parameter_count(grown) == counted(grown)


@pytest.mark.parametrize(
    ("architecture", "changes", "chosen", "message"),
    [
        ("gpt2", {}, 2, "upcycle makes experts of a gated MLP, as llama has; gpt2 has a dense MLP"),
        ("mixtral", {}, 2, "mixtral has experts already"),
        ("llama", {"mlp_bias": True}, 2, "experts, which have no biases; the model's MLP has: mlp_bias is true"),
        ("llama", {}, 5, "num_experts_per_tok 5 exceeds num_local_experts 4"),
    ],
)
def test_what_cannot_be_upcycled_is_refused(
    architecture: str, changes: dict[str, object], chosen: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        _ = Upcycled(model(architecture, 1, **changes), 4, chosen).grown


def test_an_upcycled_model_has_copies_of_the_mlp_and_a_router_of_its_seed() -> None:
    config = model("llama", 2)
    old: dict[str, Array] = dict(initial_weights(config, 0))
    growth = Upcycled(config, 4, 2, seed=3)
    assert growth.grown.architecture == "mixtral"
    grown, drawn = grown_weights(growth, old), initial_weights(growth.grown, 3)
    stem = "model.layers.1."
    for expert in range(4):
        for ours, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            found = grown[f"{stem}block_sparse_moe.experts.{expert}.{ours}.weight"]
            assert found is old[f"{stem}mlp.{theirs}.weight"]
    router = f"{stem}block_sparse_moe.gate.weight"
    np.testing.assert_array_equal(grown[router], drawn[router])
    for optimizer in OPTIMIZERS:
        state = random_state(config, optimizer)
        moments = grown_optimizer(growth, state, optimizer)
        assert not moments[f"exp_avg:{router}"].any()
        norm = state[f"exp_avg_sq:{stem}post_attention_layernorm.weight"]
        np.testing.assert_allclose(moments[f"exp_avg_sq:{router}"].astype(np.float64), norm.mean(), rtol=1e-6)
    assert Upcycled(model("llama", 1, attention_bias=True), 4, 2).grown.architecture == "custom"
