"""The MLX engine against the `transformers` class of each architecture."""

from pathlib import Path

import numpy as np
import pytest

from models import weights
from models.config import ModelConfig
from models.engine import TrainingEngine, training_engine
from models.optimizer import OptimizerConfig
from tests.models.tiny import VOCABULARY, Arrays, batch, pieces, tiny

pytest.importorskip("models.mlx_engine")
pytest.importorskip("transformers")

from tests.models.torch_engine.test_transformers import (  # only where transformers is
    VARIANTS,
    saved,
    their_gradients,
    their_logits,
    twin,
)


def engine_of(config: ModelConfig, arrays: Arrays) -> TrainingEngine:
    engine = training_engine("mlx", config, OptimizerConfig(learning_rate=0.01), "float32")
    engine.restore("weights", pieces(arrays))
    return engine


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_logits_are_those_of_the_class(name: str, changes: dict[str, object], tmp_path: Path) -> None:
    config = tiny(name, **changes)
    model = twin(config)
    tokens = batch(rows=5, length=20).tokens_BT
    found = engine_of(config, saved(model, tmp_path)).inference().logits(tokens)
    np.testing.assert_allclose(found, their_logits(model, tokens), atol=2e-5)


def test_logits_of_long_rows_are_those_of_the_class(tmp_path: Path) -> None:
    # MLX's own frequencies would be off by enough to be seen here.
    config = tiny("llama", head_dim=64, max_position_embeddings=2048)
    model = twin(config)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (1, 2048), dtype=np.int32)
    found = engine_of(config, saved(model, tmp_path)).inference().logits(tokens)
    np.testing.assert_allclose(found, their_logits(model, tokens), atol=1e-4)


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
@pytest.mark.parametrize("padded", [False, True])
def test_losses_and_gradients_are_those_of_the_class(
    name: str, changes: dict[str, object], padded: bool, tmp_path: Path
) -> None:
    config, rows = tiny(name, **changes), batch(padded=padded)
    model = twin(config)
    engine = engine_of(config, saved(model, tmp_path / "weights"))
    ours: Arrays = weights.gather(engine.gradients([rows], 0), weights.canonical_shapes(config))
    loss, theirs = their_gradients(model, rows, tmp_path / "gradients")
    found, count = engine.loss(rows)
    assert found / count == pytest.approx(loss, rel=1e-5)
    assert ours.keys() == theirs.keys()
    whole = np.sqrt(sum(float((gradient.astype(np.float64) ** 2).sum()) for gradient in theirs.values()))
    for key, gradient in theirs.items():
        bar = 1e-4 * max(float(np.linalg.norm(gradient)), 1e-3 * whole)
        assert np.linalg.norm(ours[key] - gradient) <= bar, key
