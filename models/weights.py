"""Canonical weights: the names and shapes of the matching `transformers` class, and the way from and to an engine.

Every engine has the same parameters under the same names, matrices as (out, in) and experts stacked as
(expert, out, in). `placements` says where each of them stands in the canonical arrays: an array of its own
(Llama), a transposed block of columns of a fused one (GPT-2), or one array per expert (Mixtral). Optimizer moments
have the shapes of their parameters, so the same map carries them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from common.errors import UserError
from common.files import sha256_bytes, write_atomically
from models.config import ModelConfig
from models.optimizer import OPTIONAL, UPDATES, OptimizerConfig, moments_of

Array = NDArray[np.generic]


class Piece(NamedTuple):
    """A part of a canonical array: `canonical[region] = array`."""

    name: str
    region: tuple[slice, ...]
    array: Array


@dataclass(frozen=True)
class Placement:
    """Where one engine parameter, or one of its experts, stands in a canonical array."""

    name: str
    """The canonical array."""
    region: tuple[slice, ...] = ()
    """The part of the canonical array, after transposition; empty for the whole."""
    transposed: bool = False
    """Whether the canonical array is (in, out), as GPT-2's are."""
    expert: int | None = None
    """The row of a stacked parameter, where each expert has its own canonical array."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of an engine."""

    name: str
    shape: tuple[int, ...]
    placements: tuple[Placement, ...]


def parameters(config: ModelConfig) -> list[Parameter]:
    """Every engine parameter of a model in a fixed order: its name, shape, and place in the canonical arrays."""
    names = _GPT2 if config.architecture == "gpt2" else _LLAMA
    width, heads_size, groups_size = config.hidden_size, config.query_size, config.key_value_size
    found = [_whole(names, "embed_tokens.weight", (config.vocab_size, width))]
    if config.position_embedding == "learned":
        found.append(_whole(names, "embed_positions.weight", (config.max_position_embeddings, width)))
    for layer in range(config.num_hidden_layers):
        block = f"layers.{layer}."
        found += _norm(config, names, block + "input_norm")
        for projection, size in (("q", heads_size), ("k", groups_size), ("v", groups_size)):
            found += _linear(config, names, f"{block}attention.{projection}_proj", size, width, config.attention_bias)
        found += _linear(config, names, f"{block}attention.o_proj", width, heads_size, config.attention_bias)
        found += _norm(config, names, block + "post_attention_norm")
        found += _mlp(config, names, block + "mlp.")
    found += _norm(config, names, "norm")
    if not config.tie_word_embeddings:
        found.append(_whole(names, "lm_head.weight", (config.vocab_size, width)))
    return found


_LLAMA = {
    "embed_tokens": "model.embed_tokens",
    "embed_positions": "model.embed_positions",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "layers": "model.layers",
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attention": "self_attn",
    "router": "gate",
}
_MIXTRAL_EXPERT = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_GPT2 = {
    "embed_tokens": "transformer.wte",
    "embed_positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "layers": "transformer.h",
    "input_norm": "ln_1",
    "post_attention_norm": "ln_2",
    "attention": "attn",
    "o_proj": "c_proj",
    "up_proj": "c_fc",
    "down_proj": "c_proj",
}


def _rename(names: Mapping[str, str], name: str) -> str:
    return ".".join(names.get(part, part) for part in name.split("."))


def _whole(names: Mapping[str, str], name: str, shape: tuple[int, ...]) -> Parameter:
    return Parameter(name, shape, (Placement(_rename(names, name)),))


def _norm(config: ModelConfig, names: Mapping[str, str], name: str) -> list[Parameter]:
    kinds = ("weight", "bias") if config.norm == "layer_norm" else ("weight",)
    return [_whole(names, f"{name}.{kind}", (config.hidden_size,)) for kind in kinds]


def _linear(
    config: ModelConfig, names: Mapping[str, str], name: str, rows: int, columns: int, bias: bool
) -> list[Parameter]:
    fused = name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj") and config.architecture == "gpt2"
    part: tuple[slice, ...] = ()
    if fused:
        canonical = _rename(names, name.rpartition(".")[0]) + ".c_attn"
        start = ("q_proj", "k_proj", "v_proj").index(name.rpartition(".")[2]) * rows
        part = (slice(start, start + rows),)
    else:
        canonical = _rename(names, name)
    transposed = config.architecture == "gpt2"
    matrix_part = (slice(None), *part) if part else ()
    found = [Parameter(f"{name}.weight", (rows, columns), (Placement(f"{canonical}.weight", matrix_part, transposed),))]
    if bias:
        found.append(Parameter(f"{name}.bias", (rows,), (Placement(f"{canonical}.bias", part),)))
    return found


def _mlp(config: ModelConfig, names: Mapping[str, str], prefix: str) -> list[Parameter]:
    width, inner = config.hidden_size, config.intermediate_size
    shapes = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    if config.mlp == "dense":
        del shapes["gate_proj"]
    if config.mlp != "mixture":
        linears = [_linear(config, names, prefix + name, *shape, config.mlp_bias) for name, shape in shapes.items()]
        return [parameter for linear in linears for parameter in linear]
    assert config.num_local_experts is not None  # for the type checker: ModelConfig refuses a mixture without
    experts = config.num_local_experts
    canonical = _rename(names, prefix.removesuffix(".mlp.")) + ".block_sparse_moe"
    found = [Parameter(f"{prefix}router.weight", (experts, width), (Placement(f"{canonical}.gate.weight"),))]
    for name, shape in shapes.items():
        places = tuple(
            Placement(f"{canonical}.experts.{expert}.{_MIXTRAL_EXPERT[name]}.weight", expert=expert)
            for expert in range(experts)
        )
        found.append(Parameter(f"{prefix}experts.{name}", (experts, *shape), places))
    return found


def canonical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The canonical arrays of a model and their shapes, in the order of `parameters`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter in parameters(config):
        for place in parameter.placements:
            shape = parameter.shape if place.expert is None else parameter.shape[1:]
            if place.transposed:
                shape = shape[::-1]
            ends = [part.stop or 0 for part in place.region] + [0] * (len(shape) - len(place.region))
            grown = tuple(max(size, end) for size, end in zip(shape, ends, strict=True))
            known = shapes.get(place.name, grown)
            shapes[place.name] = tuple(max(old, new) for old, new in zip(known, grown, strict=True))
    return shapes


def optimizer_shapes(config: ModelConfig, optimizer: OptimizerConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every array of an exported optimizer's state, but for what it may have or not."""
    canonical = canonical_shapes(config)
    return {UPDATES: ()} | {
        f"{moment}:{place.name}": canonical[place.name]
        for parameter in parameters(config)
        for moment in moments_of(optimizer, parameter.name)
        for place in parameter.placements
    }


def parameter_count(config: ModelConfig) -> int:
    """The number of parameters, tied ones counted once."""
    return sum(math.prod(parameter.shape) for parameter in parameters(config))


def to_canonical(parameter: Parameter, array: Array, prefix: str = "") -> Iterator[Piece]:
    """The pieces of canonical arrays that one engine parameter (or its moment, named by `prefix`) fills."""
    for place in parameter.placements:
        part = array if place.expert is None else array[place.expert]
        part = part.T if place.transposed else part
        yield Piece(prefix + place.name, place.region or (slice(None),) * part.ndim, part)


def from_canonical(parameter: Parameter, read: Callable[[str], Array], prefix: str = "") -> Array:
    """One engine parameter (or its moment) out of canonical arrays, as a C-contiguous array of its own."""
    parts = []
    for place in parameter.placements:
        part = read(prefix + place.name)[place.region]
        parts.append(part.T if place.transposed else part)
    stacked = parameter.placements[0].expert is not None
    array = np.stack(parts) if stacked else parts[0]
    if array.shape != parameter.shape:
        raise ValueError(f"{parameter.placements[0].name}: shape {array.shape} does not fit {parameter.shape}")
    return np.array(array, order="C")


def whole_pieces(arrays: Mapping[str, Array]) -> Iterator[Piece]:
    """Whole arrays in the form that an engine restores."""
    return (Piece(name, (), array) for name, array in arrays.items())


def assemble(pieces: Iterable[Piece], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Whole canonical arrays out of their pieces; `shapes` by the name after the last `:` (the moment's prefix)."""
    arrays: dict[str, Array] = {}
    for name, region, array in pieces:
        if name not in arrays:
            shape = shapes.get(name.rpartition(":")[2], array.shape)
            arrays[name] = np.empty(shape, array.dtype)
        arrays[name][region] = array
    return arrays


def gather(pieces: Iterable[Piece], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Exactly the arrays that `shapes` names, whole, out of their pieces.

    Raises ValueError that names what is missing (wholly or in part), unexpected or misshapen. What an optimizer's state
    may have or not (`models.optimizer.OPTIONAL`) is never unexpected. Pieces are taken to not overlap.
    """
    arrays: dict[str, Array] = {}
    filled: dict[str, int] = {}
    faults: list[str] = []
    for name, region, array in pieces:
        if name not in shapes:
            if name in OPTIONAL:
                continue
            faults.append(f"{name} is unexpected")
            continue
        if name not in arrays:
            arrays[name], filled[name] = np.empty(shapes[name], array.dtype), 0
        room = arrays[name][region] if len(region) <= len(shapes[name]) else None
        if room is None or room.shape != array.shape:
            faults.append(f"{name} has shape {array.shape} in {region or 'whole'}, which does not fit {shapes[name]}")
            filled[name] = arrays[name].size
            continue
        arrays[name][region] = array
        filled[name] += array.size
    for name, shape in shapes.items():
        if filled.get(name, -1) < math.prod(shape):
            faults.append(f"{name} is missing" + (" in part" if name in arrays else ""))
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ValueError("; ".join(faults[:8]) + more)
    return arrays


def initial_weights(config: ModelConfig, seed: int) -> dict[str, NDArray[np.float32]]:
    """Fresh canonical weights, the same for every engine: see `initial_parameter`."""
    pieces = [
        piece
        for parameter in parameters(config)
        for piece in to_canonical(parameter, initial_parameter(config, parameter, seed))
    ]
    return assemble(pieces, canonical_shapes(config))  # type: ignore[return-value]  # every array drawn is float32


def initial_parameter(config: ModelConfig, parameter: Parameter, seed: int) -> NDArray[np.float32]:
    """One fresh engine parameter, out of a stream of its own.

    Distributions are those of the `transformers` classes: matrices and embeddings N(0, initializer_range), biases
    zero, norms one; GPT-2's residual projections scaled by 1/sqrt(2·num_hidden_layers) (Radford et al., 2019).
    """
    kind = parameter.name.rpartition(".")[2]
    if kind == "bias":
        return np.zeros(parameter.shape, np.float32)
    if "norm" in parameter.name.rpartition(".")[0].rpartition(".")[2]:
        return np.ones(parameter.shape, np.float32)
    deviation = config.initializer_range
    residual = parameter.name.endswith(("o_proj.weight", "down_proj.weight"))
    if residual and config.architecture == "gpt2":
        deviation /= math.sqrt(2 * config.num_hidden_layers)
    numbers = random_stream(f"{seed}:{parameter.name}").standard_normal(parameter.shape, np.float32)
    return numbers * np.float32(deviation)


def random_stream(label: str) -> np.random.Generator:
    """Random numbers that depend on the label alone."""
    return np.random.Generator(np.random.Philox(key=int(sha256_bytes(label.encode())[:32], 16)))


def write_arrays(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> None:
    """Writes arrays as one safetensors file, whole or not at all; sorted names, so equal arrays give equal bytes."""
    contiguous = {name: np.asarray(arrays[name], order="C") for name in sorted(arrays)}
    write_atomically(path, save(contiguous, dict(metadata) if metadata else None))


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays of a safetensors file. Raises UserError when it is no such file."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no readable safetensors file ({error}); make it again") from error
