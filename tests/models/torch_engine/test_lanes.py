"""A batch's rows on several threads: the same gradients as on one, and the same bits each time."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from models import weights
from models.engine import Batch
from models.optimizer import OptimizerConfig
from models.torch_engine.lanes import Lanes
from models.torch_engine.train import TorchTraining
from tests.models.test_engines import assert_same
from tests.models.tiny import VOCABULARY, pieces, tiny

OPTIMIZER = OptimizerConfig(name="muon", learning_rate=1e-3)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def engine(lanes: bool, precision: str = "float32") -> TorchTraining:
    config = tiny("gpt2")
    made = TorchTraining(config, OPTIMIZER, precision)  # type: ignore[arg-type]
    if not lanes:
        made._lanes = None
    made.restore("weights", pieces(dict(weights.initial_weights(config, 0))))
    return made


def rows(count: int, seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    tokens_BT = random.integers(0, VOCABULARY, (count, 9)).astype(np.int32)
    return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], random.random((count, 8)) < 0.5)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_gradients_and_losses_are_those_of_one_thread(count: int) -> None:
    batch = rows(count)
    # The first rows count nothing, so that a lane may have nothing to learn from.
    batch.loss_mask_BT[: count // 3] = False
    batch.loss_mask_BT[-1] = True
    several, one = engine(lanes=True), engine(lanes=False)
    shapes = weights.canonical_shapes(tiny("gpt2"))
    found, expected = (weights.gather(made.gradients([batch, rows(4, 1)], 0), shapes) for made in (several, one))
    assert_same(found, expected, atol=1e-6)
    for step in range(3):
        results = [made.step([batch], 1.0, step) for made in (several, one)]
        np.testing.assert_allclose(float(results[0].loss), float(results[1].loss), rtol=1e-5)


@pytest.mark.usefixtures("threads")
def test_lanes_keep_documents_apart() -> None:
    batch, shapes = rows(7), weights.canonical_shapes(tiny("gpt2"))
    apart = batch._replace(documents_BT=np.arange(56, dtype=np.int32).reshape(7, 8) // 3)
    several, one = engine(lanes=True), engine(lanes=False)
    found, expected, whole = (
        weights.gather(made.gradients([given], 0), shapes)
        for made, given in ((several, apart), (one, apart), (one, batch))
    )
    assert_same(found, expected, atol=1e-6)
    assert not np.allclose(whole["transformer.wpe.weight"], expected["transformer.wpe.weight"], atol=1e-3)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_steps_give_the_same_bits(precision: str) -> None:
    exported = []
    for _ in range(2):
        made = engine(lanes=True, precision=precision)
        for step in range(5):
            made.step([rows(16, step)], 1.0, step)
        exported.append({piece.name: piece.array.tobytes() for piece in made.export("weights")})
    assert exported[0] == exported[1]


@pytest.mark.usefixtures("threads")
def test_lanes_are_left_out_where_they_are_not_exact() -> None:
    def lanes(name: str, **changes: float) -> Lanes | None:
        config = tiny(name).model_copy(update=changes)
        return TorchTraining(config, OPTIMIZER, "float32")._lanes

    assert lanes("gpt2") is not None
    assert lanes("llama") is not None
    assert lanes("mixtral") is None
    assert lanes("gpt2", dropout=0.1) is None
    torch.set_num_threads(1)
    assert lanes("gpt2") is None
