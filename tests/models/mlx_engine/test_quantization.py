"""Inference with matrices of few bits stays near that with all of them."""

import numpy as np
import pytest

from models import weights
from models.generation import generate
from models.sampling import SamplingConfig
from tests.models.tiny import COMPOSITIONS, batch, pieces, tiny

pytest.importorskip("models.mlx_engine")

from mlx import nn

from models.mlx_engine import inference_engine
from models.mlx_engine.model import parameters_of
from models.mlx_engine.quantization import Bits

SIZE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "initializer_range": 0.1}


@pytest.mark.parametrize(("bits", "bar"), [(4, 0.3), (8, 0.02)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(COMPOSITIONS))
def test_logits_stay_near(name: str, precision: str, bits: Bits, bar: float) -> None:
    config = tiny(name, **SIZE)
    arrays = pieces(dict(weights.initial_weights(config, 1)))
    whole = inference_engine(config, "float32", arrays)
    few = inference_engine(config, precision, arrays, bits)  # type: ignore[arg-type]  # one of the precisions
    expected, found = (reader.logits(batch().tokens_BT) for reader in (whole, few))
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < bar
    small, large = (sum(array.nbytes for array in parameters_of(reader._model).values()) for reader in (few, whole))
    assert small < (0.55 if name != "mixtral" else 0.95) * large


def test_a_quantised_model_writes_with_its_cache_what_it_would_without() -> None:
    config = tiny("llama", **SIZE)
    engine = inference_engine(config, "float32", pieces(dict(weights.initial_weights(config, 1))), 4)
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
    with pytest.raises(ValueError, match="multiple of 32"):
        inference_engine(config, "float32", pieces(dict(weights.initial_weights(config, 1))), 4)
