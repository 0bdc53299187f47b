import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from models.config import ModelConfig
from models.growth import Method, grow, grown_config, source_layers
from models.weights import Array, canonical_shapes, initial_weights

SHAPE = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "max_position_embeddings": 6,
}
ARCHITECTURES: list[dict[str, object]] = [
    {"architecture": "gpt2"},
    {"architecture": "llama", "num_key_value_heads": 1},
    {"architecture": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
]


def test_the_order_of_layers() -> None:
    assert source_layers(3, 2, "stack") == [0, 1, 2, 0, 1, 2]
    assert source_layers(3, 2, "interleave") == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda keys: str(keys["architecture"]))
@given(layers=st.integers(1, 12), factor=st.integers(2, 3), method=st.sampled_from(["stack", "interleave"]))
def test_a_grown_model_has_its_shapes_and_its_sources_layers(
    architecture: dict[str, object], layers: int, factor: int, method: Method
) -> None:
    config = ModelConfig.model_validate({**SHAPE, **architecture, "num_hidden_layers": layers})
    sources = source_layers(layers, factor, method)
    weights: dict[str, Array] = dict(initial_weights(config, 0))
    moments: dict[str, Array] = {f"exp_avg:{name}": array + 1 for name, array in initial_weights(config, 1).items()}
    grown = grow({**weights, **moments, "updates": np.array(7)}, sources)
    shapes = canonical_shapes(grown_config(config, sources))
    assert {name: array.shape for name, array in grown.items() if ":" not in name and name != "updates"} == shapes
    assert {name.removeprefix("exp_avg:") for name in grown if ":" in name} == set(shapes)
    assert grown["updates"] == 7
    stem = "transformer.h" if config.architecture == "gpt2" else "model.layers"
    for new, old in enumerate(sources):
        of_new = {name: array for name, array in grown.items() if f"{stem}.{new}." in name}
        assert of_new
        for name, array in of_new.items():
            assert array is {**weights, **moments}[name.replace(f"{stem}.{new}.", f"{stem}.{old}.")]


def test_a_layer_that_is_not_there_is_refused() -> None:
    config = ModelConfig.model_validate({**SHAPE, "architecture": "gpt2", "num_hidden_layers": 2})
    with pytest.raises(UserError, match="layer 2 cannot be copied: the model has 2 layers"):
        grown_config(config, [0, 1, 2])
