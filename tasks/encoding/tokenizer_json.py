"""What a `tokenizer.json` says, as far as other libraries are built from it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from models.tokenizer import TOKENIZER_FILE

Description = dict[str, Any]
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How the `ByteLevel` pre-tokenizer divides text (openai/gpt-2, encoder.py)."""
_GPT2_DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
"""The same where `Digits` has taken every digit out before: to white space, a digit is then the end of the text."""


def read_description(folder: Path) -> Description:
    """The `tokenizer.json` of a folder."""
    return cast(Description, json.loads((folder / TOKENIZER_FILE).read_bytes()))


def byte_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (openai/gpt-2, encoder.py)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


def missing_bytes(description: Description) -> dict[str, int]:
    """Ids beyond the vocabulary for the bytes that a byte-level one lacks. `tokenizers` leaves such a byte out; others
    want an id for each."""
    vocabulary = description["model"]["vocab"]
    first_free = 1 + max([*vocabulary.values(), *(token["id"] for token in description["added_tokens"])])
    missing = [character for character in byte_characters() if character not in vocabulary]
    return {character: first_free + n for n, character in enumerate(missing)}


def byte_ranks(description: Description) -> dict[bytes, int]:
    """The tokens of a byte-level BPE by rank. Raises ValueError for what such ranks cannot say."""
    model = description["model"]
    refused = {
        "a model that is no BPE": model["type"] != "BPE",
        "a normalizer": description["normalizer"] is not None,
        "byte fallback": model.get("byte_fallback"),
        "dropout": model.get("dropout"),
        "an unknown token": model.get("unk_token") is not None,
        "a prefix or suffix of its words": model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"),
        "added tokens in the text": any(not token["special"] for token in description["added_tokens"]),
    }
    for what, is_there in refused.items():
        if is_there:
            raise ValueError(f"the tokenizer has {what}")
    vocabulary = model["vocab"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    merged = [vocabulary[left + right] for left, right in merges]
    if merged != sorted(set(merged)):
        raise ValueError("its merges are not in the order of its tokens")
    special = {token["content"] for token in description["added_tokens"]}
    ranks = {token: rank for token, rank in vocabulary.items() if token not in special} | missing_bytes(description)
    bytes_of = byte_characters()
    return {bytes(bytes_of[character] for character in token): rank for token, rank in ranks.items()}


def dividing_steps(description: Description) -> list[dict[str, Any]]:
    """How text is divided before anything is merged, step by step; one empty step where it is not."""
    divided = description["pre_tokenizer"] or {}
    return cast(list[dict[str, Any]], divided.get("pretokenizers", [divided]))


def dividing_pattern(description: Description) -> str:
    """The regular expression that divides text. Raises ValueError where it takes more than one."""
    steps = dividing_steps(description)
    if takes_digits_apart(steps):
        return _GPT2_DIGITS_PATTERN
    kinds = [step.get("type") for step in steps]
    first, last = steps[0], steps[-1]
    if kinds[-1] == "ByteLevel" and not last["add_prefix_space"]:
        if kinds == ["ByteLevel"] and last["use_regex"]:
            return _GPT2_PATTERN
        isolates = first.get("behavior") == "Isolated" and not first["invert"] and "Regex" in first["pattern"]
        if kinds == ["Split", "ByteLevel"] and isolates and not last["use_regex"]:
            return str(first["pattern"]["Regex"])
    raise ValueError("its text is not divided by one regular expression over bytes")


def takes_digits_apart(steps: Sequence[dict[str, Any]]) -> bool:
    """Whether every digit is by itself, and the rest is divided as GPT-2's texts are (StarCoder, SmolLM)."""
    if [step.get("type") for step in steps] != ["Digits", "ByteLevel"]:
        return False
    return bool(steps[0]["individual_digits"] and steps[1]["use_regex"] and not steps[1]["add_prefix_space"])
