"""What the tests of preference tuning share: pairs of rows, engines with a reference, and the loss by its formula."""

import numpy as np
from numpy.typing import NDArray

from models import weights
from models.config import ModelConfig
from models.engine import Batch, EngineName, Layout, Precision, TrainingEngine, inference_engine, training_engine
from models.lora import adapter_shapes
from models.optimizer import OptimizerConfig
from models.tuning import LoraConfig, PreferenceConfig, Tuning
from tests.models.test_lora import random_adapters
from tests.models.tiny import Arrays, batch, pieces, random_weights

BETA = 0.7
TUNING = Tuning(preference=PreferenceConfig(beta=BETA))
LORA = LoraConfig(rank=3, alpha=6, targets=("q_proj", "v_proj", "o_proj"))
ADAMW = OptimizerConfig(learning_rate=0.002)


def preferring(
    engine: EngineName,
    config: ModelConfig,
    optimizer: OptimizerConfig = ADAMW,
    precision: Precision = "float32",
    layout: Layout = Layout(),  # noqa: B008 - it is frozen
    lora: LoraConfig | None = None,
) -> TrainingEngine:
    """An engine whose weights are near those of its reference and not the same, or that has adapters over these."""
    reference = random_weights(config, 2)
    found = training_engine(engine, config, optimizer, precision, layout, TUNING.model_copy(update={"lora": lora}))
    found.restore("weights", pieces(policy(config) if lora is None else reference | random_adapters(config, lora)))
    found.restore("reference", pieces(reference))
    return found


def policy(config: ModelConfig) -> Arrays:
    """What the reference is a third off from."""
    other, reference = random_weights(config, 1), random_weights(config, 2)
    return {name: array + (other[name] - array) / 3 for name, array in reference.items()}


def pairs(count: int = 3, length: int = 9, seed: int = 0) -> Batch:
    """Random rows of which every two begin alike, each with a loss mask of its own; something counts in all."""
    rows = batch(2 * count, length, seed)
    rows.tokens_BT[1::2, :3] = rows.tokens_BT[::2, :3]
    return rows


def rewards(rows: Batch, engine: TrainingEngine) -> NDArray[np.float64]:
    """The rows' rewards by their definition, from what the model and one of the reference's weights say of targets."""
    config = engine.inference().config
    reference = inference_engine(engine.name, config, "float32", pieces(random_weights(config, 2)))
    policy_BT, reference_BT = (one.log_probabilities(rows) for one in (engine.inference(), reference))
    found: NDArray[np.float64] = BETA * ((policy_BT.astype(np.float64) - reference_BT) * rows.loss_mask_BT).sum(1)
    return found


def gradients(
    engine: TrainingEngine, batches: list[Batch], dropout_key: int = 0, lora: LoraConfig | None = None
) -> Arrays:
    """Whole gradients by canonical name, or those of adapters."""
    config = engine.inference().config
    shapes = weights.canonical_shapes(config) if lora is None else adapter_shapes(config, lora)
    return weights.gather(engine.gradients(batches, dropout_key), shapes)
