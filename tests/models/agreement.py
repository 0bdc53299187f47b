"""What the tests of all engines against each other share: the same model in each of them, and how far they differ."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import numpy as np
import pytest

from models import weights
from models.config import ModelConfig
from models.engine import (
    Batch,
    EngineName,
    InferenceEngine,
    TrainingEngine,
    inference_engine,
    is_installed,
    training_engine,
)
from models.optimizer import OptimizerConfig
from tests.models.tiny import Arrays, batch, pieces, random_weights, tiny

ENGINES: list[EngineName] = ["torch", "jax", "mlx"]
HERE = [name for name in ENGINES if is_installed(name)]
several_engines = pytest.mark.skipif(len(HERE) < 2, reason="one engine alone is installed")
PAIRS = list(itertools.permutations(HERE, 2))
"""From which engine to which."""

MODELS = ["gpt2", "llama", "mixtral", "llama-tied", "mtlm2"]
VOCABULARY = 300
LENGTHS = {"short": 48, "long": 120}
"""Engines have other ways of attention for long rows than for short ones."""
ADAMW = OptimizerConfig(learning_rate=3e-4)
MUON = OptimizerConfig(name="muon", learning_rate=3e-4, muon_learning_rate=5e-3)
Result = TypeVar("Result")


def small(variant: str, **changes: object) -> ModelConfig:
    """A model that is larger than the tiny ones: 64 wide, four layers, 300 tokens."""
    size = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "head_dim": 16,
        "max_position_embeddings": max(LENGTHS.values()),
        "initializer_range": 0.1,  # times the root of the width, that is what the tiny ones have
    }
    return tiny(variant, **{**size, **changes})


def rows_of(kind: str, count: int, seed: int = 0) -> Batch:
    """Random rows of a length, each with a loss mask of its own; the long ones hold several documents."""
    length = LENGTHS[kind]
    rows = batch(count, length, seed, vocabulary=VOCABULARY)
    if kind == "short":
        return rows
    begins = np.random.default_rng(seed + 1).random(rows.tokens_BT.shape) < 0.05
    return rows._replace(documents_BT=begins.cumsum(1, dtype=np.int32))


def trainer(engine: EngineName, config: ModelConfig, optimizer: OptimizerConfig = ADAMW) -> TrainingEngine:
    """A training engine with random weights."""
    found = training_engine(engine, config, optimizer, "float32")
    found.restore("weights", pieces(random_weights(config, 1)))
    return found


def reader(engine: EngineName, config: ModelConfig) -> InferenceEngine:
    """An engine that reads with the same weights."""
    return inference_engine(engine, config, "float32", pieces(random_weights(config, 1)))


def by_engine(make: Callable[[EngineName], Result]) -> dict[EngineName, Result]:
    """What each engine that is here comes to."""
    return {engine: make(engine) for engine in HERE}


def pairs_of(found: Mapping[EngineName, Result]) -> Iterator[tuple[str, Result, Result]]:
    """Any two, with their names in words."""
    for one, other in itertools.combinations(found, 2):
        yield f"{one} and {other}", found[one], found[other]


def gradients(engine: TrainingEngine, batches: list[Batch], dropout_key: int = 0) -> Arrays:
    """Whole gradients by canonical name."""
    shapes = weights.canonical_shapes(engine.inference().config)
    return weights.gather(engine.gradients(batches, dropout_key), shapes)


def exported(engine: TrainingEngine) -> Arrays:
    """Everything that an engine holds, whole, with copies of its own."""
    shapes = weights.canonical_shapes(engine.inference().config)
    return weights.assemble([*engine.export("weights"), *engine.export("optimizer")], shapes)


def restore(engine: TrainingEngine, arrays: Mapping[str, weights.Array]) -> None:
    """Takes over what `exported` gave."""
    names = weights.canonical_shapes(engine.inference().config)
    engine.restore("weights", pieces({name: array for name, array in arrays.items() if name in names}))
    engine.restore("optimizer", pieces({name: array for name, array in arrays.items() if name not in names}))


def assert_bitwise(one: Mapping[str, weights.Array], other: Mapping[str, weights.Array]) -> None:
    """The same names, types, shapes and bytes."""
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert (array.dtype, array.shape) == (other[name].dtype, other[name].shape), name
        assert array.tobytes() == other[name].tobytes(), name


def largest_share(one: Arrays, other: Arrays) -> tuple[float, str]:
    """How far gradients differ, as a share of what is allowed: ‖Δ‖ / (1e-4 · max(‖g‖, 1e-3 · global norm)); where."""
    assert one.keys() == other.keys()
    norms = {name: float(np.linalg.norm(array.astype(np.float64))) for name, array in one.items()}
    whole = float(np.sqrt(sum(norm**2 for norm in norms.values())))
    return max(
        (float(np.linalg.norm((one[name] - other[name]).astype(np.float64))) / (1e-4 * max(norm, 1e-3 * whole)), name)
        for name, norm in norms.items()
    )


def tell(*what: object) -> None:
    """Prints a figure for those who ask pytest for them (`-rP`)."""
    print(*(f"{part:.2e}" if isinstance(part, float) else part for part in what))
