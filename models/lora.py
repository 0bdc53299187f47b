"""Low-rank adapters (Hu et al., arXiv 2106.09685), one definition for every engine.

An adapted matrix is W + (alpha/rank)·B·A, formed once for each step from a base W that stays as it is. Its gradient G
gives those of the adapters, s·Bᵀ·G and s·G·Aᵀ with s = alpha/rank, so a model computes with adapters exactly as it
does without. Adapters are named by the engine's parameter, as `models.weights.parameters` has it:
`lora_A:layers.3.attention.q_proj.weight` is (rank, in), `lora_B:…` (out, rank).

The optimizer has AdamW for all of them, with the decay of matrices, Muon's config too: a factor's orthogonalised
update says nothing of that of the product.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from models.config import ModelConfig
from models.optimizer import ADAMW_MOMENTS, UPDATES, OptimizerConfig
from models.tuning import LoraConfig
from models.weights import (
    Array,
    Parameter,
    canonical_shapes,
    from_canonical,
    parameters,
    random_stream,
    to_canonical,
)
from models.weights import optimizer_shapes as whole_optimizer_shapes

LORA_A, LORA_B = "lora_A:", "lora_B:"
"""What an adapter's name has before that of its parameter."""


def adapted_parameters(config: ModelConfig, lora: LoraConfig) -> list[Parameter]:
    """The engine parameters that have adapters. Raises UserError where there is none, and for experts."""
    projections = {parameter.name: _projection(parameter.name) for parameter in parameters(config)}
    experts = {projections[name] for name in projections if ".experts." in name}
    asked = [target for target in lora.targets if target in experts]
    if asked:
        raise UserError(
            f"lora.targets: {', '.join(asked)} of a mixture are its experts', which have no adapters; "
            f"name q_proj, k_proj, v_proj or o_proj alone"
        )
    found = [parameter for parameter in parameters(config) if projections[parameter.name] in lora.targets]
    if not found:
        there = dict.fromkeys(projection for projection in projections.values() if projection)
        raise UserError(
            f"lora.targets: the model has no {' or '.join(lora.targets)}; it has {', '.join(map(str, there))}"
        )
    return found


def _projection(name: str) -> str | None:
    """`q_proj` of `layers.3.attention.q_proj.weight`; None of what is no matrix of a projection."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    return module if module.endswith("_proj") else None


def adapter_shapes(config: ModelConfig, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every adapter."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter in adapted_parameters(config, lora):
        rows, columns = parameter.shape
        shapes[LORA_A + parameter.name] = (lora.rank, columns)
        shapes[LORA_B + parameter.name] = (rows, lora.rank)
    return shapes


def adapter_count(config: ModelConfig, lora: LoraConfig) -> int:
    """The number of trained parameters."""
    return sum(math.prod(shape) for shape in adapter_shapes(config, lora).values())


def weights_shapes(config: ModelConfig, lora: LoraConfig | None) -> dict[str, tuple[int, ...]]:
    """Name and shape of every array of an engine's exported weights."""
    return canonical_shapes(config) | ({} if lora is None else adapter_shapes(config, lora))


def optimizer_shapes(
    config: ModelConfig, optimizer: OptimizerConfig, lora: LoraConfig | None
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every array of an exported optimizer's state; with adapters, it has moments of them alone."""
    if lora is None:
        return whole_optimizer_shapes(config, optimizer)
    shapes = adapter_shapes(config, lora)
    return {UPDATES: ()} | {f"{moment}:{name}": shape for name, shape in shapes.items() for moment in ADAMW_MOMENTS}


def initial_adapters(config: ModelConfig, lora: LoraConfig, seed: int) -> dict[str, NDArray[np.float32]]:
    """Fresh adapters, the same for every engine: each A has its own stream, keyed by its name, and B is zero.

    A is drawn as PEFT draws it (Kaiming's uniform distribution with a = √5): evenly within ±1/√in.
    """
    found: dict[str, NDArray[np.float32]] = {}
    for name, shape in adapter_shapes(config, lora).items():
        found[name] = np.zeros(shape, np.float32)
        if name.startswith(LORA_A):
            bound = np.float32(1 / math.sqrt(shape[1]))
            found[name] = (2 * random_stream(f"{seed}:{name}").random(shape, np.float32) - 1) * bound
    return found


def merged(
    config: ModelConfig, lora: LoraConfig, weights: Mapping[str, Array], adapters: Mapping[str, Array]
) -> dict[str, Array]:
    """Canonical weights with the adapters in them; arrays that have none are shared, not copied."""
    changed = {parameter.name for parameter in adapted_parameters(config, lora)}
    pieces, touched = [], set()
    for parameter in parameters(config):
        if parameter.name not in changed:
            continue
        base = np.asarray(from_canonical(parameter, weights.__getitem__), np.float32)
        a, b = (np.asarray(adapters[kind + parameter.name], np.float32) for kind in (LORA_A, LORA_B))
        pieces += list(to_canonical(parameter, base + np.float32(lora.scale) * (b @ a)))
        touched |= {place.name for place in parameter.placements}
    # A fused array may have parts without adapters.
    found = {name: array.copy() if name in touched else array for name, array in weights.items()}
    for name, region, array in pieces:
        found[name][region] = array
    return found
