"""Growing a model in depth by repeating its layers, on canonical named arrays: one implementation for every engine.

After MTLM1 and "Stacking Your Transformers" (Du et al., arXiv 2405.15319).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

from common.errors import UserError
from models.config import ModelConfig
from models.weights import Array

Method = Literal["stack", "interleave"]
_LAYER = re.compile(r"^(.*\b(?:model\.layers|transformer\.h)\.)(\d+)(\..*)$")


def source_layers(layers: int, factor: int, method: Method) -> list[int]:
    """The old layer that each new layer copies: `stack` repeats the whole (ABCABC), `interleave` each one (AABBCC)."""
    if method == "stack":
        return [layer for _ in range(factor) for layer in range(layers)]
    return [layer for layer in range(layers) for _ in range(factor)]


def grown_config(config: ModelConfig, sources: list[int]) -> ModelConfig:
    """The description of the grown model. Raises UserError for a layer that the old one does not have."""
    absent = [layer for layer in sources if not 0 <= layer < config.num_hidden_layers]
    if absent:
        raise UserError(f"layer {absent[0]} cannot be copied: the model has {config.num_hidden_layers} layers")
    return ModelConfig.model_validate({**config.model_dump(), "num_hidden_layers": len(sources)})


def grow(arrays: Mapping[str, Array], sources: list[int]) -> dict[str, Array]:
    """Arrays of the grown model: each new layer's are its source's, everything else stays; moments are layers too.

    Arrays are shared, not copied.
    """
    grown = {}
    for name, array in arrays.items():
        for new_name in _new_names(name, sources):
            grown[new_name] = array
    return grown


def _new_names(name: str, sources: Iterable[int]) -> Iterator[str]:
    match = _LAYER.match(name)
    if match is None:
        yield name
        return
    prefix, layer, suffix = match.groups()
    for new, old in enumerate(sources):
        if old == int(layer):
            yield f"{prefix}{new}{suffix}"
