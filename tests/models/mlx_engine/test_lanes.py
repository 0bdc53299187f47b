"""Rows on several streams come to what they come to on one."""

from collections.abc import Callable

import numpy as np
import pytest

from models import weights
from models.config import ModelConfig
from models.engine import Batch, Layout, Precision
from models.optimizer import OptimizerConfig
from tests.models.test_engine_documents import LENGTHS, packed
from tests.models.test_engines import assert_same, exported, gradients
from tests.models.tiny import batch, cut, pieces, tiny

pytest.importorskip("models.mlx_engine")

import mlx.core as mx  # only where MLX is

from models.mlx_engine import blas, lanes
from models.mlx_engine.device import on_cpu
from models.mlx_engine.lanes import Lanes
from models.mlx_engine.processes import Processes
from models.mlx_engine.train import MlxTraining

pytestmark = pytest.mark.skipif(not on_cpu(), reason="a GPU has no lanes")
OPTIMIZERS = {
    "adamw": OptimizerConfig(learning_rate=0.01),
    "muon": OptimizerConfig(name="muon", learning_rate=0.01, muon_learning_rate=0.02),
}


def trainer(
    config: ModelConfig, count: int, precision: Precision = "float32", again: bool = False, optimizer: str = "adamw"
) -> MlxTraining:
    """An engine with so many lanes, whatever the cores of this machine."""
    engine = MlxTraining(config, OPTIMIZERS[optimizer], precision, Layout(rematerialize=again), Processes(None))
    engine._functions.lanes = Lanes(count)
    engine.restore("weights", pieces(dict(weights.initial_weights(config, 1))))
    return engine


def rows(step: int) -> Batch:
    return batch(rows=7, seed=step)


def documents(step: int) -> Batch:
    return packed(LENGTHS["short"], seed=step)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("source", [rows, documents])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_lanes_do_what_one_does(name: str, source: Callable[[int], Batch], optimizer: str, count: int) -> None:
    config = tiny(name, dropout=0.1)
    several, one = (trainer(config, number, optimizer=optimizer) for number in (count, 1))
    batches = cut(source(0), 2)
    assert_same(gradients(several, batches), gradients(one, batches), atol=1e-6, rtol=1e-5)
    found, expected = (
        [float(engine.step(cut(source(step), 1 + step % 2), 1.0, step).loss) for step in range(5)]
        for engine in (several, one)
    )
    assert found == pytest.approx(expected, rel=1e-5)
    # A last batch may have fewer rows than there are lanes.
    for part in (source(9), source(9).part(slice(0, 1))):
        (loss, counted), (alone, same) = several.loss(part), one.loss(part)
        assert loss == pytest.approx(alone, rel=1e-5)
        assert counted == same
    few = source(10).part(slice(0, 1))
    assert float(several.step([few], 1.0, 5).loss) == pytest.approx(float(one.step([few], 1.0, 5).loss), rel=1e-5)


@pytest.mark.parametrize("again", [False, True], ids=["remembered", "rematerialised"])
def test_the_same_steps_have_the_same_bits(again: bool) -> None:
    states = []
    for _ in range(6):
        engine = trainer(tiny("llama", dropout=0.1), 3, again=again)
        for step in range(4):
            engine.step(cut(rows(step), 2), 1.0, step)
        states.append(exported(engine))
    for state in states[1:]:
        assert_same(state, states[0])


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    engine = trainer(tiny("llama"), 2, "float16")
    engine.step([rows(0)], 1.0, 0)
    engine._scale = engine._scale._replace(scale=mx.array(2.0**40))
    before = exported(engine)
    assert float(engine.step([rows(1)], 1.0, 1).skipped) == 1
    after = exported(engine)
    for name in before:
        if not name.startswith("loss_scale"):
            np.testing.assert_array_equal(after[name], before[name])


def test_there_are_as_many_as_cores_where_they_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(config: ModelConfig) -> int:
        engine = MlxTraining(config, OPTIMIZERS["adamw"], "float32", Layout(), Processes(None))
        return len(engine._functions.lanes._streams)

    told: list[int] = []
    monkeypatch.setattr(blas, "cores", lambda: 64)
    monkeypatch.setattr(blas, "divide_products", told.append)
    monkeypatch.setenv("MLX_BFS_MAX_WIDTH", "20")
    assert count(tiny("llama")) == lanes.MOST
    assert told == [1]
    # The balance of experts is over the whole batch.
    assert count(tiny("mixtral")) == 0
    assert count(tiny("mixtral", router_aux_loss_coef=0.0)) == lanes.MOST
    monkeypatch.setattr(blas, "cores", lambda: 1)
    assert count(tiny("llama")) == 0
