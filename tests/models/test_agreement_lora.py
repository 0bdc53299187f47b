"""Every engine against every other where adapters are trained: losses, gradients, a run that changes engines."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

from models import weights
from models.engine import EngineName, TrainingEngine, training_engine
from models.lora import adapter_shapes
from models.tuning import LoraConfig, Tuning
from tests.models.agreement import (
    ADAMW,
    HERE,
    by_engine,
    largest_share,
    pairs_of,
    rows_of,
    several_engines,
    small,
    tell,
)
from tests.models.loop_run import go, settings, write_data
from tests.models.test_agreement_loop import difference
from tests.models.test_lora import random_adapters
from tests.models.tiny import cut, pieces, random_weights

pytestmark = [several_engines, pytest.mark.agreement]
LORA = LoraConfig(rank=8, alpha=16)
STEPS = 30


def trainer(engine: EngineName, variant: str) -> TrainingEngine:
    """An engine that trains random adapters of random weights."""
    config = small(variant)
    optimizer = ADAMW.model_copy(update={"learning_rate": 3e-3})
    found = training_engine(engine, config, optimizer, "float32", tuning=Tuning(lora=LORA))
    adapters = {name: np.float32(0.2) * array for name, array in random_adapters(config, LORA).items()}
    found.restore("weights", pieces({**random_weights(config, 1), **adapters}))
    return found


@pytest.mark.parametrize("variant", ["gpt2", "llama"])
def test_gradients_and_losses_agree(variant: str) -> None:
    """Of several micro-batches of other sizes, and over some dozens of steps that learn something."""
    batches = [rows_of("short", 3), *cut(rows_of("long", 5), 2)]
    shapes = adapter_shapes(small(variant), LORA)
    engines = by_engine(lambda engine: trainer(engine, variant))
    found = {name: weights.gather(engine.gradients(batches, 0), shapes) for name, engine in engines.items()}
    for names, one, other in pairs_of(found):
        share, where = largest_share(one, other)
        tell(names, share)
        assert share <= 1, f"{names}: {where}"
    rows = [rows_of("short", 6, seed=seed) for seed in range(3)]
    losses = {
        name: np.array([float(engine.step([rows[step % 3]], 1.0, step).loss) for step in range(STEPS)])
        for name, engine in engines.items()
    }
    for names, first, second in pairs_of(losses):
        tell(names, float(abs(first - second).max()))
        assert abs(first - second).max() <= 1e-3, names
    assert losses[HERE[0]][-3:].mean() < losses[HERE[0]][:3].mean() - 0.5


@pytest.mark.slow
def test_a_run_goes_on_with_any_other_engine(tmp_path: Path) -> None:
    """From the adapters that the first engine has left, over weights that no checkpoint holds."""
    config = settings("adamw", 24)
    write_data(tmp_path)
    whole = {name: go(name, "gpt2", config, tmp_path, f"whole-{name}", lora=LORA) for name in HERE}
    first = {name: go(name, "gpt2", config, tmp_path, f"half-{name}", stop=12, lora=LORA) for name in HERE}
    for origin, target in itertools.product(HERE, HERE):
        shutil.copytree(tmp_path / f"half-{origin}", tmp_path / f"{origin}-{target}")
        second = go(target, "gpt2", config, tmp_path, f"{origin}-{target}", lora=LORA)
        assert "going on from the checkpoint of step 12" in second.notes[0]
        found = max(difference([first[origin], second], whole[name]) for name in (origin, target))
        tell(origin, target, found)
        assert found <= 1e-3
        if origin == target:
            assert second.state == whole[target].state
