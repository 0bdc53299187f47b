"""What one of several MLX processes does in the tests of training together, and what one alone does beside it.

As a program: `python -m tests.models.mlx_engine.ring FOLDER NAME…` in each of the processes, which do the named works
one after the other; process 0 writes what each came to, as JSON and as arrays.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from models import weights
from models.engine import Batch, Layout, TrainingEngine, training_engine
from models.lora import adapter_shapes
from models.optimizer import OptimizerConfig
from models.tuning import LoraConfig, Tuning
from tests.models import preferring, several
from tests.models.several import Found
from tests.models.test_lora import random_adapters
from tests.models.tiny import batch, cut, pieces, tiny

OPTIMIZERS = {
    "adamw": OptimizerConfig(learning_rate=3e-4),
    "muon": OptimizerConfig(name="muon", learning_rate=3e-4, muon_learning_rate=5e-3),
}
LORA = LoraConfig(rank=3, alpha=6)
"""Trained where the optimizer is called `lora`, which is AdamW."""
STEPS = 20
# They do not divide among two processes, and one of the micro-batches is a single row.
ROWS = 7


def micro_batches(step: int) -> list[Batch]:
    """One, or three and one of a single row, by turns."""
    rows = batch(rows=ROWS, seed=step)
    return [*cut(rows.part(slice(0, 6)), 3), rows.part(slice(6, 7))] if step % 2 else [rows]


def train(name: str) -> Found:
    """`COMPOSITION:OPTIMIZER:DROPOUT[:STATE:FROM]`: the steps that are left of twenty; losses and what is left."""
    composition, optimizer, dropout, *start = name.split(":")
    config = tiny(composition, dropout=float(dropout))
    lora = LORA if optimizer == "lora" else None
    engine: TrainingEngine = training_engine(
        "mlx", config, OPTIMIZERS["adamw" if lora else optimizer], "float32", Layout(), Tuning(lora=lora)
    )
    canonical, first = weights.canonical_shapes(config), 0
    if start:
        state, first = dict(np.load(start[0])), int(start[1])
        engine.restore("weights", pieces({key: array for key, array in state.items() if key in canonical}))
        engine.restore("optimizer", pieces({key: array for key, array in state.items() if key not in canonical}))
    else:
        adapters = {} if lora is None else random_adapters(config, lora)
        engine.restore("weights", pieces({**weights.initial_weights(config, 1), **adapters}))
    steps = [engine.step(micro_batches(step), 1.0, step) for step in range(first, STEPS)]
    gradients = weights.gather(
        engine.gradients(micro_batches(1), 1), canonical if lora is None else adapter_shapes(config, lora)
    )
    found = {
        "losses": [float(step.loss) for step in steps],
        "norms": [float(step.gradient_norm) for step in steps],
        "loss": engine.loss(batch(rows=ROWS, seed=99)),
        "agreed": engine.agreed(engine.process * 2**40 + 3),
        "device": engine.device,
    }
    arrays = weights.assemble([*engine.export("weights"), *engine.export("optimizer")], canonical)
    return found, {**arrays, **{f"gradient {key}": array for key, array in gradients.items()}}


def prefer(name: str) -> Found:
    """`pairs:COMPOSITION:DROPOUT`: some steps of preference tuning on pairs that do not divide among two processes."""
    _, composition, dropout = name.split(":")
    config = tiny(composition, dropout=float(dropout))
    engine = preferring.preferring("mlx", config)
    batches = [[preferring.pairs(3, seed=step), preferring.pairs(1, seed=50 + step)] for step in range(6)]
    gradients = preferring.gradients(engine, batches[0])
    steps = [engine.step(batch, 1.0, step) for step, batch in enumerate(batches)]
    found = {
        "losses": [float(step.loss) for step in steps],
        "figures": [step.figures.tolist() for step in steps],
        "rewards": engine.rewards(preferring.pairs(3, seed=99)).tolist(),
    }
    return found, gradients


def do(name: str) -> Found:
    """One work, in this process."""
    return prefer(name) if name.startswith("pairs:") else train(name)


def together(folder: Path, names: Sequence[str]) -> dict[str, Found]:
    """The works in two processes."""
    return several.together("mlx", "tests.models.mlx_engine.ring", folder, 2, names, {})


if __name__ == "__main__":
    several.main(do)
