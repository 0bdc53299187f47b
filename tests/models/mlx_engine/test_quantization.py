"""Inference with matrices of few bits is that with what those bits mean, and stays near that with all of them."""

import numpy as np
import pytest

from common.errors import UserError
from models import weights
from models.engine import Bits, Precision
from models.generation import generate
from models.sampling import SamplingConfig
from tests.models.tiny import COMPOSITIONS, batch, pieces, tiny

pytest.importorskip("models.mlx_engine")

import mlx.core as mx  # only where MLX is
from mlx import nn

from models.mlx_engine import inference_engine
from models.mlx_engine.inference import MlxInference
from models.mlx_engine.model import Parameters, Transformer, load_weights, parameters_of, replace_parameters

SIZE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "initializer_range": 0.1}


def reader(name: str, bits: Bits | None, precision: Precision = "float32") -> MlxInference:
    config = tiny(name, **SIZE)
    return inference_engine(config, precision, pieces(dict(weights.initial_weights(config, 1))), bits)


def meant(few: MlxInference, bits: Bits) -> Parameters:
    """The parameters of a quantised model as ordinary matrices."""
    held, found = parameters_of(few._model), {}
    for name, array in held.items():
        scales = "_scales" if f"{name}_scales" in held else ".scales"
        stem = name if scales == "_scales" else name.removesuffix(".weight")
        if stem + scales in held:
            group = array.shape[-1] * 32 // bits // held[stem + scales].shape[-1]
            found[name] = mx.dequantize(array, held[stem + scales], held[stem + scales[0] + "biases"], group, bits)
        elif not name.endswith(("scales", "biases")):
            found[name] = array
    return found


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", list(COMPOSITIONS))
def test_logits_are_those_of_what_the_bits_mean(name: str, bits: Bits) -> None:
    config, few = tiny(name, **SIZE), reader(name, bits)
    plain = Transformer(config, mx.float32)
    load_weights(plain, pieces(dict(weights.initial_weights(config, 1))))
    before = parameters_of(plain)
    replace_parameters(plain, meant(few, bits))
    assert parameters_of(plain).keys() == before.keys()
    changed = {part for part, array in parameters_of(plain).items() if not mx.array_equal(array, before[part])}
    plainly = ("norm", "bias", "embed_positions", "router")
    assert changed == {part for part in before if not any(word in part for word in plainly)}
    found, expected = (engine.logits(batch().tokens_BT) for engine in (few, MlxInference(plain)))
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize(("bits", "bar"), [(4, 0.35), (8, 0.08)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_logits_stay_near(name: str, precision: Precision, bits: Bits, bar: float) -> None:
    whole, few = reader(name, None), reader(name, bits, precision)
    expected, found = (engine.logits(batch().tokens_BT) for engine in (whole, few))
    assert 1e-4 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < bar


def test_four_bits_take_a_fraction_of_the_memory() -> None:
    for name in COMPOSITIONS:
        few, whole = (
            sum(array.nbytes for array in parameters_of(reader(name, bits)._model).values()) for bits in (4, None)
        )
        assert few < 0.3 * whole, name


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_quantised_model_writes_with_its_cache_what_it_would_without(name: str) -> None:
    engine = reader(name, 4)
    assert isinstance(engine._model.layers[0].attention.q_proj, nn.QuantizedLinear)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    found = generate(engine, prompts, SamplingConfig(max_new_tokens=6), ())
    for prompt, answer in zip(prompts, found, strict=True):
        row = list(prompt)
        for _ in range(6):
            row.append(int(engine.logits(np.array([row], np.int32))[0, -1].argmax()))
        assert answer == row[len(prompt) :]


def test_a_model_too_narrow_to_quantise_is_refused() -> None:
    config = tiny("llama")
    with pytest.raises(UserError, match=r"no matrix whose width is a multiple of 32.*use bits: null"):
        inference_engine(config, "float32", pieces(dict(weights.initial_weights(config, 1))), 4)
