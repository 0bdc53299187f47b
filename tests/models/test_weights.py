import math
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from models import weights
from models.weights import Array, Piece
from tests.models.tiny import COMPOSITIONS, pieces, tiny

NAMES = list(COMPOSITIONS)


@pytest.mark.parametrize("name", NAMES)
def test_canonical_arrays_go_to_an_engine_and_back_bitwise(name: str) -> None:
    config = tiny(name)
    canonical: dict[str, Array] = dict(weights.initial_weights(config, 0))
    found: list[Piece] = []
    for parameter in weights.parameters(config):
        array = weights.from_canonical(parameter, canonical.__getitem__)
        assert array.shape == parameter.shape
        assert array.flags.c_contiguous
        found += weights.to_canonical(parameter, array)
    again = weights.gather(found, weights.canonical_shapes(config))
    assert again.keys() == canonical.keys()
    for key, array in canonical.items():
        np.testing.assert_array_equal(array, again[key])


@pytest.mark.parametrize("name", NAMES)
def test_the_canonical_arrays_hold_every_parameter_once(name: str) -> None:
    config = tiny(name)
    sizes = [math.prod(shape) for shape in weights.canonical_shapes(config).values()]
    assert sum(sizes) == weights.parameter_count(config)
    names = [parameter.name for parameter in weights.parameters(config)]
    assert len(names) == len(set(names))


def test_gpt2_fuses_its_projections_and_transposes_them() -> None:
    shapes = weights.canonical_shapes(tiny("gpt2"))
    assert shapes["transformer.h.0.attn.c_attn.weight"] == (16, 48)
    assert shapes["transformer.h.0.attn.c_attn.bias"] == (48,)
    assert shapes["transformer.h.0.mlp.c_fc.weight"] == (16, 24)
    assert "lm_head.weight" not in shapes


def test_initial_weights_have_the_distributions_of_the_classes() -> None:
    config = tiny("gpt2", hidden_size=64, intermediate_size=256, initializer_range=0.02)
    found = weights.initial_weights(config, 3)
    assert found["transformer.wte.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert found["transformer.h.1.mlp.c_fc.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert found["transformer.h.1.mlp.c_proj.weight"].std() == pytest.approx(0.01, rel=0.05)
    assert not found["transformer.h.1.attn.c_attn.bias"].any()
    assert (found["transformer.h.0.ln_1.weight"] == 1).all()
    llama = weights.initial_weights(tiny("llama", hidden_size=64, intermediate_size=256), 3)
    assert llama["model.layers.0.mlp.down_proj.weight"].std() == pytest.approx(0.2, rel=0.05)


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    small, deep = tiny("llama"), tiny("llama", num_hidden_layers=3)
    key = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(weights.initial_weights(small, 5)[key], weights.initial_weights(deep, 5)[key])
    assert (weights.initial_weights(small, 5)[key] != weights.initial_weights(small, 6)[key]).any()


def test_gather_names_what_is_missing_unexpected_and_misshapen() -> None:
    shapes = {"whole": (2, 3), "partial": (4,), "absent": (1,), "odd": (2,)}
    given = [
        Piece("whole", (slice(None), slice(0, 2)), np.ones((2, 2))),
        Piece("whole", (slice(None), slice(2, 3)), np.ones((2, 1))),
        Piece("partial", (slice(0, 2),), np.ones(2)),
        Piece("stranger", (), np.ones(1)),
        Piece("odd", (), np.ones(3)),
    ]
    with pytest.raises(ValueError, match="stranger is unexpected") as caught:
        weights.gather(given, shapes)
    message = str(caught.value)
    assert "odd has shape (3,)" in message
    assert "partial is missing in part" in message
    assert "absent is missing" in message
    assert "whole" not in message.replace("in whole", "")


def test_gather_passes_over_what_a_state_may_have_or_not() -> None:
    state = pieces({"updates": np.array(3), "loss_scale": np.array(8.0, np.float32)})
    assert weights.gather(state, {"updates": ()}).keys() == {"updates"}
    assert weights.gather(state, {"updates": (), "loss_scale": ()})["loss_scale"] == 8
    with pytest.raises(ValueError, match="loss_scale is missing"):
        weights.gather(pieces({"updates": np.array(3)}), {"updates": (), "loss_scale": ()})


def test_arrays_survive_their_file_and_equal_arrays_give_equal_bytes(tmp_path: Path) -> None:
    arrays: dict[str, Array] = dict(weights.initial_weights(tiny("llama"), 0))
    weights.write_arrays(tmp_path / "a.safetensors", {**arrays, "updates": np.array(3)})
    weights.write_arrays(tmp_path / "b.safetensors", {"updates": np.array(3), **dict(reversed(arrays.items()))})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    read = weights.read_arrays(tmp_path / "a.safetensors")
    assert read["updates"].shape == ()
    assert weights.gather(pieces({name: read[name] for name in arrays}), weights.canonical_shapes(tiny("llama")))


def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="no readable safetensors file"):
        weights.read_arrays(tmp_path / "x.safetensors")
