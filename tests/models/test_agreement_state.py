"""What an engine holds goes to another engine and back without losing a bit, optimizer included."""

import numpy as np
import pytest

from models.optimizer import OptimizerConfig
from tests.models.agreement import (
    ADAMW,
    HERE,
    MODELS,
    MUON,
    PAIRS,
    assert_bitwise,
    exported,
    restore,
    several_engines,
    small,
    trainer,
)
from tests.models.tiny import Arrays

pytestmark = several_engines


@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=lambda config: config.name)
@pytest.mark.parametrize("variant", MODELS)
def test_what_one_engine_exports_another_takes_over_bitwise(variant: str, optimizer: OptimizerConfig) -> None:
    config = small(variant)
    random = np.random.default_rng(4)
    begun = exported(trainer(HERE[0], config, optimizer))
    state: Arrays = {
        name: random.standard_normal(array.shape, np.float32) if array.ndim else np.array(41, np.int64)
        for name, array in begun.items()
    }
    for origin, target in PAIRS:
        first, second = (trainer(name, config, optimizer) for name in (origin, target))
        restore(first, state)
        restore(second, exported(first))
        assert_bitwise(exported(second), state)
