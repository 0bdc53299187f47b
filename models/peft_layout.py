"""Adapters as PEFT has them: `adapter_config.json` and `adapter_model.safetensors`, for the published base model.

PEFT knows the modules of the published class. Where one of them is several projections, as GPT-2's `c_attn` is q, k
and v, its adapter is exactly theirs together: every A below the last, every B in rows and columns of its own, zeros
elsewhere; so its rank and alpha are as many times those of one.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.config import ModelConfig
from models.hub import published_names
from models.lora import LORA_A, LORA_B, adapted_parameters
from models.tuning import LoraConfig
from models.weights import Array, canonical_shapes, gather, whole_pieces


class _Part(NamedTuple):
    """One projection of a module."""

    name: str
    """The engine parameter."""
    ranks: slice
    """Its rows of the module's A, and columns of its B."""
    rows: slice
    """Its rows of B."""


class _Module(NamedTuple):
    """One module of the published class."""

    parts: list[_Part]
    size: tuple[int, int]
    """Its weight as (out, in)."""


def peft_config(config: ModelConfig, lora: LoraConfig, base_model: str | None = None) -> dict[str, Any]:
    """The `adapter_config.json`; `base_model` says where the model beneath is to be had."""
    fused = {
        _target(config, name): len(module.parts)
        for name, module in _modules(config, lora).items()
        if len(module.parts) > 1
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": _number(lora.alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({_target(config, name) for name in _modules(config, lora)}),
        "fan_in_fan_out": published_names(config).architecture == "gpt2",
        "rank_pattern": {target: parts * lora.rank for target, parts in fused.items()},
        "alpha_pattern": {target: _number(parts * lora.alpha) for target, parts in fused.items()},
    }


def to_peft(config: ModelConfig, lora: LoraConfig, adapters: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
    """The arrays of `adapter_model.safetensors` out of adapters by their own names."""
    found: dict[str, NDArray[np.float32]] = {
        name: np.zeros(shape, np.float32) for name, shape in _shapes(config, lora).items()
    }
    for name, module in _modules(config, lora).items():
        a, b = (found[key] for key in _keys(name))
        for part in module.parts:
            a[part.ranks] = adapters[LORA_A + part.name]
            b[part.rows, part.ranks] = adapters[LORA_B + part.name]
    return found


def from_peft(config: ModelConfig, lora: LoraConfig, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Adapters by their own names out of what `to_peft` gave; ValueError names what is missing, odd or misshapen."""
    whole = gather(whole_pieces(arrays), _shapes(config, lora))
    found: dict[str, Array] = {}
    for name, module in _modules(config, lora).items():
        a, b = (whole[key] for key in _keys(name))
        for part in module.parts:
            found[LORA_A + part.name] = np.array(a[part.ranks], order="C")
            found[LORA_B + part.name] = np.array(b[part.rows, part.ranks], order="C")
    return found


def _modules(config: ModelConfig, lora: LoraConfig) -> dict[str, _Module]:
    """The adapted modules by their names in the published class."""
    published = published_names(config)
    shapes, modules = canonical_shapes(published), dict[str, _Module]()
    for parameter in adapted_parameters(published, lora):
        (place,) = parameter.placements
        rows, columns = shapes[place.name][::-1] if place.transposed else shapes[place.name]
        module = modules.setdefault(place.name.removesuffix(".weight"), _Module([], (rows, columns)))
        start = len(module.parts) * lora.rank
        # A part of a fused matrix is some of its rows as (out, in).
        own = place.region[-1] if place.region else slice(None)
        module.parts.append(_Part(parameter.name, slice(start, start + lora.rank), own))
    return modules


def _keys(module: str) -> tuple[str, str]:
    """What PEFT calls the arrays of a module's adapter."""
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def _shapes(config: ModelConfig, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name, module in _modules(config, lora).items():
        (rows, columns), rank = module.size, len(module.parts) * lora.rank
        found |= zip(_keys(name), ((rank, columns), (rows, rank)), strict=True)
    return found


def _target(config: ModelConfig, module: str) -> str:
    """What tells a kind of module from others: its own name, and with GPT-2, where two are called `c_proj`, its
    parent's too."""
    parts = 2 if published_names(config).architecture == "gpt2" else 1
    return ".".join(module.split(".")[-parts:])


def _number(alpha: float) -> int | float:
    """Some readers take whole numbers alone."""
    return int(alpha) if alpha.is_integer() else alpha
