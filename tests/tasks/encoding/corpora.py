"""Documents and tokenizers to encode, as the stages before `tokens` leave them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from common.files import canonical_json
from models.tokenizer import Roles, write_tokenizer
from tasks.documents import shard_name

ROLES = Roles(bos="<bos>", eos="<eos>", pad="<pad>")
SPECIAL = [ROLES.pad, ROLES.bos, ROLES.eos]
ODD_TEXTS = [
    "",
    "<eos>",
    "a<bos>b <pad>",
    "don't  stop\r\n",
    "é e\u0301 👩‍👩‍👧 漢字 ▁x",
    "nul\0nul",
    "x" * 3000,
    " " * 500,
]


def write_documents(
    folder: Path, splits: Mapping[str, Sequence[Mapping[str, str]]], shard_rows: int, **description: Any
) -> Path:
    """A documents artifact: rows by split, so many to a shard. `description`: more that its documents.json says."""
    folder.mkdir(parents=True)
    described: dict[str, Any] = {}
    for split, rows in splits.items():
        shards = []
        for number, start in enumerate(range(0, len(rows), shard_rows)):
            part = list(rows[start : start + shard_rows])
            name = shard_name(split, number, "parquet")
            pq.write_table(pa.Table.from_pylist(part), folder / name, compression="zstd")
            size = sum(len(row["text"].encode()) for row in part)
            shards.append({"name": name, "documents": len(part), "bytes": size})
        described[split] = {"shards": shards} | totals(shards)
    everything = totals(described.values())
    described_whole = {
        "source": {"name": "tests/corpus", "revision": "abc"},
        "read": {"documents": everything["documents"] + 3, "bytes": everything["bytes"] + 30},
        "splits": described,
        "dropped": [{"rule": "length", "parameters": {"minimum": 5}, "documents": 3, "bytes": 30}],
        **description,
    }
    (folder / "documents.json").write_bytes(canonical_json(described_whole))
    return folder


def totals(counted: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The sums of documents and bytes."""
    listed = list(counted)
    return {what: sum(one[what] for one in listed) for what in ("documents", "bytes")}


def texts(count: int, seed: int = 0, words: int = 60) -> list[str]:
    """Documents of made-up words, with odd ones among them."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 10, 3000)
    known = ["".join(map(chr, random.integers(97, 123, length))) for length in lengths]
    found = []
    for number in range(count):
        drawn = random.zipf(1.3, random.integers(1, words)) % len(known)
        found.append(" ".join(known[word] for word in drawn) + f". {number}\n")
    for place, text in enumerate(ODD_TEXTS):
        if found:
            found[place * 7 % count] += text
    return found


def rows(documents: Iterable[str]) -> list[dict[str, str]]:
    """Documents as rows of one column."""
    return [{"text": text} for text in documents]


def bytes_alone(folder: Path) -> Path:
    """A token for each byte: 259 with the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: number for number, token in enumerate([*SPECIAL, *letters])}
    backend = Backend(models.BPE(tokens, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return written(folder, backend)


def byte_level(folder: Path, size: int = 600, without: Sequence[str] = ()) -> Path:
    """A byte-level BPE; `without` are characters of its alphabet that it lacks."""
    alphabet = [character for character in pre_tokenizers.ByteLevel.alphabet() if character not in without]
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(alphabet),
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(texts(400, seed=9), trainer)
    return written(folder, backend)


def characters(folder: Path, known: str = "0123456789+-*/=") -> Path:
    """A token for each of some characters, and for no other."""
    tokens = [*SPECIAL, *known]
    backend = Backend(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=None))
    backend.add_special_tokens(SPECIAL)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return written(folder, backend)


def byte_fallback(folder: Path) -> Path:
    """A BPE over whole texts, as SentencePiece's, whose unknown characters are bytes."""
    backend = Backend(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = None
    special = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    backend.train_from_iterator(
        texts(400, seed=9), trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    )
    description = json.loads(backend.to_str())
    kept = set(SPECIAL)
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] in kept]
    return written(folder, Backend.from_str(json.dumps(description)))


def written(folder: Path, backend: Backend) -> Path:
    folder.mkdir(parents=True)
    write_tokenizer(folder, backend, ROLES)
    return folder
