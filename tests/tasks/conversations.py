"""Conversations as tokens, written by hand, and the stages around them, for tests of tuning."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.files import canonical_json
from models.chat import Chat, Message, Template
from models.tokenizer import Tokenizer
from models.training.shards import write_shard
from tasks.encoding.conversations import give_template

CHARACTERS = "\n !?:ABSUabcdefghijklmnopqrstuvwxyz_<|>"
TOKENIZER: dict[str, Any] = {"vocabulary": {"kind": "characters", "characters": CHARACTERS}}
VOCABULARY = len(CHARACTERS) + 3
"""With <pad>, <bos> and <eos>."""


def asked(letters: str) -> list[Message]:
    """A question that nobody can foresee, and its answer, which is the same as always but for the letter at its end."""
    return [{"role": "user", "content": f"{letters}?"}, {"role": "assistant", "content": f"yes {letters[-1]}!"}]


def conversations(count: int, seed: int = 0) -> list[list[Message]]:
    """Conversations of one to three exchanges."""
    numbers = np.random.default_rng(seed)
    letters = ["".join(numbers.choice(list("abcdef"), numbers.integers(2, 7))) for _ in range(3 * count)]
    return [
        [message for one in letters[3 * number : 3 * number + numbers.integers(1, 4)] for message in asked(one)]
        for number in range(count)
    ]


def write_tokens(
    folder: Path,
    tokenizer: Path,
    template: Template = "plain",
    splits: Mapping[str, Sequence[Sequence[Message]]] | None = None,
    bos: bool = True,
) -> Path:
    """A tokens artifact of conversations."""
    folder.mkdir(parents=True)
    shutil.copytree(tokenizer, folder / "tokenizer")
    give_template(folder / "tokenizer", template, bos)
    chat = Chat(Tokenizer(folder / "tokenizer"), template, bos)
    made = {}
    for split, found in (splits or {"train": conversations(80), "validation": conversations(10, 1)}).items():
        ids, counted = zip(*(chat.conversation(messages) for messages in found), strict=True)
        lengths = [len(one) for one in ids]
        name = f"{split}-00000.safetensors"
        write_shard(folder / name, np.concatenate(ids).astype(np.uint16), np.cumsum(lengths), np.concatenate(counted))
        shard = {"name": name, "tokens": sum(lengths), "documents": len(lengths)}
        histogram = [[length, lengths.count(length)] for length in sorted(set(lengths))]
        made[split] = {"lengths": histogram, "shards": [shard]}
    ends = {"pad_id": chat.tokenizer.pad_id, "bos_id": chat.tokenizer.bos_id, "eos_id": chat.closing_id}
    description = {**ends, "template": template, "loss_on": "assistant", "splits": made}
    (folder / "tokens.json").write_bytes(canonical_json(description))
    return folder


def model(architecture: str = "llama", **changes: Any) -> dict[str, Any]:
    """A model of some thousand parameters."""
    return {
        "architecture": architecture,
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 96,
        **changes,
    }


def training(**changes: Any) -> dict[str, Any]:
    """A run over rows of several conversations."""
    return {
        "steps": 6,
        "batch_size": 4,
        "sequence_length": 95,
        "packing": "whole",
        "optimizer": {"learning_rate": 0.01},
        **changes,
    }
