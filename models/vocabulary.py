"""A model's rows for tokens that its tokenizer did not have when it was trained."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from models.config import ModelConfig
from models.tokenizer import TOKENIZER_FILE
from models.weights import Array, parameters

_DECISIVE = ("normalizer", "pre_tokenizer", "model")
"""What in a `tokenizer.json` decides the ids of a text, the added tokens apart."""


class Vocabulary(NamedTuple):
    """The ids of a tokenizer, by whether the model was trained with them."""

    known: list[int]
    added: list[int]


def extended_vocabulary(old: Path, new: Path) -> Vocabulary:
    """What the tokenizer in the folder `new` adds to the one in `old`.

    Raises UserError, in a line without the place, unless every text without added tokens has the same ids in both.
    """
    before, after = (_read(folder / TOKENIZER_FILE) for folder in (old, new))
    for part in _DECISIVE:
        if before.get(part) != after.get(part):
            raise UserError(f"their {part.replace('_', '-')} differs")
    known, all_added = _added(before), _added(after)
    for token, number in known.items():
        if all_added.get(token) != number:
            raise UserError(
                f"the token {token!r} is {number} in the one and {all_added.get(token, 'not')} in the other"
            )
    vocabulary = set(_vocabulary(before["model"])) | set(known.values())
    return Vocabulary(sorted(vocabulary), sorted(set(all_added.values()) - vocabulary))


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no readable tokenizer ({error}); make it again") from error


def _added(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    return {token["content"]: int(token["id"]) for token in tokenizer.get("added_tokens", ())}


def _vocabulary(model: Mapping[str, Any]) -> list[int]:
    """The ids of a `tokenizer.json`'s model: a mapping to ids, or in Unigram a list in their order."""
    vocabulary = model["vocab"]
    return list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))


def with_rows(
    arrays: Mapping[str, Array], config: ModelConfig, vocab_size: int, vocabulary: Vocabulary
) -> dict[str, Array]:
    """Canonical weights or optimizer moments with `vocab_size` rows in the embedding and the output head.

    Added tokens' rows, and those past the last of `config`, are the mean of the known tokens' rows, with which the loss
    on other tokens hardly changes (Hewitt, "Initializing new word embeddings for pretrained language models", 2021);
    moments are zero there. A row that the model had to spare counts as an added token's: it was never a target.
    """
    names = {
        parameter.placements[0].name
        for parameter in parameters(config)
        if parameter.name in ("embed_tokens.weight", "lm_head.weight")
    }
    found = dict(arrays)
    for name, array in arrays.items():
        moment, _, weight = name.rpartition(":")
        if weight in names:
            found[name] = _with_rows(array, vocab_size, vocabulary, zero=bool(moment))
    return found


def _with_rows(array: Array, vocab_size: int, vocabulary: Vocabulary, zero: bool) -> Array:
    new: Sequence[int] = sorted({*vocabulary.added, *range(len(array), vocab_size)})
    rows = np.concatenate([array, np.zeros((vocab_size - len(array), *array.shape[1:]), array.dtype)])
    rows[new] = 0 if zero else array[vocabulary.known].mean(axis=0, dtype=np.float64)
    return rows
