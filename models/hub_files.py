"""The weights of a model in the layout of `transformers`: `model.safetensors`, or shards and the index that names them.

A folder from elsewhere is untrusted: shards lie in the folder itself, arrays are held against the model's description
before they are read, and nothing but safetensors is opened. The index is described in the documentation of
`transformers` (big models), the format in that of safetensors.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from common.errors import UserError
from models.config import ModelConfig
from models.hub import from_hub_weights, published_names
from models.weights import Array, canonical_shapes

HUB_CONFIG, HUB_WEIGHTS, HUB_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_BUFFER = re.compile(
    r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)|(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
)
"""What older releases of `transformers` saved beside the weights, and make themselves."""
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_HEAD = "lm_head.weight"
_TOLD = 8
"""Faults that an error names."""


class _Entry(NamedTuple):
    """Where an array stands."""

    path: Path
    dtype: str
    """As safetensors calls it."""
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""


def read_object(path: Path) -> dict[str, Any]:
    """A file with a JSON object. Raises UserError where it is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} cannot be read: it is no JSON object")
    return found


def weight_files(folder: Path) -> tuple[str, ...]:
    """The names of the files that hold the weights, sorted; those in an index need not be there yet.

    Raises UserError where there is neither a file nor an index, and for an index that is none.
    """
    if (folder / HUB_WEIGHTS).is_file():
        return (HUB_WEIGHTS,)
    if (folder / HUB_INDEX).is_file():
        return tuple(sorted(set(_weight_map(folder).values())))
    raise UserError(
        f"{folder} has neither {HUB_WEIGHTS} nor {HUB_INDEX}; a pytorch_model.bin is a pickle, which runs code when it "
        "is read, so it never is: open the model with transformers and save it again"
    )


def _weight_map(folder: Path) -> dict[str, str]:
    """The shard of each array."""
    path = folder / HUB_INDEX
    found = read_object(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path} has no weight_map that says in which file each array is")
    for shard in found.values():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise UserError(f"{path} names the file {shard!r}, which is no safetensors file of its folder")
    return found


def read_weights(folder: Path, config: ModelConfig) -> dict[str, Array]:
    """The canonical weights of the model that a folder's `config.json` describes, as float32.

    Names may lack the prefix of the whole model, as GPT-2's on the hub do. Raises UserError, with the arrays' names,
    for what is missing, unexpected or misshapen, and for files that are not what they have to be.
    """
    entries = _entries(folder)
    # Before a list of all arrays is made, which a description from elsewhere could make endless.
    if config.num_hidden_layers * (config.num_local_experts or 1) > len(entries):
        raise UserError(
            f"{folder} has {len(entries)} arrays, too few for the {config.num_hidden_layers} layers of its config.json"
        )
    shapes = canonical_shapes(published_names(config))
    named = _named(folder, config, shapes, entries)
    arrays = {name: _read(entry) for name, entry in named.items()}
    if config.tie_word_embeddings and _HEAD in entries:
        _check_tied(folder, entries[_HEAD], arrays[next(iter(shapes))])
    return from_hub_weights(config, arrays)


def _named(
    folder: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], entries: Mapping[str, _Entry]
) -> dict[str, _Entry]:
    """The arrays by the names of the published class. Raises UserError that says which ones do not fit."""
    prefix = "transformer." if published_names(config).architecture == "gpt2" else "model."
    named: dict[str, _Entry] = {}
    faults = []
    for name, entry in entries.items():
        known = name if name in shapes else prefix + name
        if known in named:
            faults.append(f"{known} is there twice")
        elif known in shapes:
            named[known] = entry
        elif not (name == _HEAD and config.tie_word_embeddings):
            faults.append(f"{name} is unexpected")
    for name, shape in shapes.items():
        if name not in named:
            faults.append(f"{name} is missing")
        elif named[name].shape != shape:
            faults.append(f"{name} has the shape {named[name].shape}, not {shape}")
        elif named[name].dtype not in _DTYPES:
            faults.append(f"{name} is of the type {named[name].dtype}, which is none of {', '.join(_DTYPES)}")
    if faults:
        more = f" and {len(faults) - _TOLD} more" if len(faults) > _TOLD else ""
        raise UserError(f"the weights in {folder} are not of its config.json: {'; '.join(faults[:_TOLD])}{more}")
    return named


def _check_tied(folder: Path, head: _Entry, embedding: Array) -> None:
    if head.dtype not in _DTYPES or head.shape != embedding.shape or not np.array_equal(_read(head), embedding):
        raise UserError(
            f"{folder} has a {_HEAD} that is not the token embedding, though its config.json says "
            "tie_word_embeddings: one of them is wrong"
        )


def _entries(folder: Path) -> dict[str, _Entry]:
    """The arrays of all files by the names that they have there, buffers left out."""
    files = weight_files(folder)
    sharded = files != (HUB_WEIGHTS,)
    placed = _weight_map(folder) if sharded else {}
    found: dict[str, _Entry] = {}
    for file in files:
        for name, entry in _header(folder / file).items():
            if sharded and placed.get(name) != file:
                raise UserError(f"{folder / file} has the array {name}, which {HUB_INDEX} does not place there")
            found[name] = entry
    lost = sorted(placed.keys() - found.keys())
    if lost:
        raise UserError(f"{folder / placed[lost[0]]} has no array {lost[0]}, which {HUB_INDEX} places there")
    return {name: entry for name, entry in found.items() if not _BUFFER.fullmatch(name)}


def _header(path: Path) -> dict[str, _Entry]:
    """Where the arrays of a file stand."""
    try:
        # The library checks the header against the file; it has no way to read bfloat16 into NumPy.
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is no readable safetensors file ({error}); get it again") from error
    header.pop("__metadata__", None)
    return {
        name: _Entry(path, value["dtype"], tuple(value["shape"]), 8 + length + value["data_offsets"][0])
        for name, value in header.items()
    }


def _read(entry: _Entry) -> NDArray[np.float32]:
    """An array as float32, of which a bfloat16 is the upper half."""
    flat = np.fromfile(entry.path, _DTYPES[entry.dtype], math.prod(entry.shape), offset=entry.start)
    if entry.dtype == "BF16":
        flat = (flat.astype("<u4") << np.uint32(16)).view("<f4")
    return flat.astype(np.float32, copy=False).reshape(entry.shape)
