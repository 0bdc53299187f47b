"""One shard of documents: whatever a library does, the ids are the reference's, and it is said where it failed."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from models.tokenizer import Tokenizer
from models.training.shards import open_shard
from tasks.encoding import units as module
from tasks.encoding.choice import choose, sampled_texts
from tasks.encoding.encoders import Encoder
from tasks.encoding.libraries import LIBRARIES
from tasks.encoding.units import EncodedUnit, Encoders, Job, Unit, encode_unit, read_documents
from tests.tasks.encoding.corpora import ODD_TEXTS, byte_level, rows, texts, write_documents


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("byte-level") / "tokenizer")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that agrees with the first one on short words alone."""
    return byte_level(tmp_path_factory.mktemp("other") / "tokenizer", size=550)


def job(library: str) -> Job:
    return Job(library=library, loss_on="text", bos_id=None, eos_id=2, vocab_size=600, shard_tokens=1 << 25)


def unit_of(place: Path, listed: list[str]) -> Unit:
    """A corpus of one shard."""
    write_documents(place, {"train": rows(listed)}, shard_rows=len(listed))
    size = sum(len(text.encode()) for text in listed)
    return Unit(split="train", number=0, name="train-00000.parquet", documents=len(listed), bytes=size)


def encoded_with(
    library: str, tokenizer: Path, listed: list[str], place: Path, in_memory: bool = False
) -> tuple[EncodedUnit, list[list[int]]]:
    """A unit encoded, and the ids of its documents."""
    unit = unit_of(place / "documents", listed)
    path = place / "documents" / unit.name
    source = pa.py_buffer(path.read_bytes()) if in_memory else str(path)
    (place / "shards").mkdir()
    chosen = job(library)
    encoded = encode_unit(unit, source, chosen, Encoders.load(chosen, tokenizer, False), place / "shards")
    ids: list[list[int]] = []
    for entry in encoded.shards:
        shard = open_shard(place / "shards" / entry.name).map()
        ids += [part.tolist() for part in np.split(shard.tokens_N, shard.document_ends_D[:-1].astype(np.int64))]
    return encoded, ids


def expected(tokenizer: Path, listed: list[str]) -> list[list[int]]:
    read = Tokenizer(tokenizer)
    return [[*read.encode(text), read.eos_id] for text in listed]


@pytest.mark.parametrize("library", ["tokenizers", "gigatoken", "tiktoken"])
@pytest.mark.parametrize("batch_bytes", [1, 5000, 1 << 20])
def test_a_unit(
    tokenizer: Path, tmp_path: Path, library: str, batch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", batch_bytes)
    listed = [*ODD_TEXTS, *texts(150), *ODD_TEXTS]
    encoded, ids = encoded_with(library, tokenizer, listed, tmp_path, in_memory=batch_bytes == 5000)
    assert ids == expected(tokenizer, listed)
    assert encoded.documents == len(listed)
    assert encoded.bytes == sum(len(text.encode()) for text in listed)
    assert dict(encoded.lengths) == Counter(map(len, ids))
    assert encoded.note is None


@pytest.mark.parametrize("place", [0, 70, 199])
def test_other_ids_are_found_by_the_sample(
    tokenizer: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    # The real library with another vocabulary: its ids differ wherever a longer word stands.
    monkeypatch.setitem(LIBRARIES, "gigatoken", lambda folder, parallel: LIBRARIES["tiktoken"](other, parallel))
    monkeypatch.setattr(module, "CHECKED_AT_LEAST", 40)
    listed = ["a b c d"] * 200
    listed[place // 5 * 5] = texts(1, seed=9)[0]
    encoded, ids = encoded_with("gigatoken", tokenizer, listed, tmp_path)
    assert ids == expected(tokenizer, listed)
    assert encoded.note is not None
    found = f"the ids of '{listed[place // 5 * 5][:20]}"
    assert encoded.note.startswith(f"train-00000.parquet was encoded by tokenizers, not gigatoken: {found}")


def test_a_library_that_fails_in_the_middle(tokenizer: Path, tmp_path: Path) -> None:
    # tiktoken gives up on a long run of spaces.
    listed = [*texts(30), " " * (1 << 20), *texts(30)]
    encoded, ids = encoded_with("tiktoken", tokenizer, listed, tmp_path)
    assert ids == expected(tokenizer, listed)
    assert encoded.note is not None
    assert "not tiktoken: Regex error while tokenizing" in encoded.note


@pytest.mark.parametrize("run", ["a", " ", "\0", "é", "random letters"])
def test_a_megabyte_without_a_word(tokenizer: Path, tmp_path: Path, run: str) -> None:
    letters = np.random.default_rng(0).integers(97, 123, 1 << 20).astype(np.uint8).tobytes().decode()
    listed = ["before", letters if run == "random letters" else run * (1 << 20), "after"]
    encoded, ids = encoded_with("gigatoken", tokenizer, listed, tmp_path)
    assert encoded.note is None
    assert ids == expected(tokenizer, listed)


def absent(folder: Path, parallel: bool) -> Encoder:
    raise ImportError("No module named 'gigatoken'")


def test_a_library_that_is_absent_where_the_unit_is(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LIBRARIES, "gigatoken", absent)
    listed = texts(20)
    encoded, ids = encoded_with("gigatoken", tokenizer, listed, tmp_path)
    assert ids == expected(tokenizer, listed)
    assert encoded.note is not None
    assert encoded.note.endswith("not gigatoken: ImportError: No module named 'gigatoken'")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (absent, "not installed: pip install 'cairn[data]'"),
        (None, "its ids differ from those of tokenizers for '"),
    ],
)
def test_a_library_is_refused_with_the_reason(
    tokenizer: Path, other: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Encoder] | None, reason: str
) -> None:
    real = LIBRARIES["gigatoken"]
    monkeypatch.setitem(LIBRARIES, "gigatoken", make or (lambda folder, parallel: real(other, parallel)))
    made = choose(tokenizer, texts(50))
    assert made.library == "tiktoken"
    assert made.refused.keys() == {"gigatoken"}
    assert made.refused["gigatoken"].startswith(reason)


def test_the_sample_is_from_all_over_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.encoding.choice.SAMPLED_BYTES", 8000)
    listed = [f"{number:05d} " + "x" * 94 for number in range(1000)]
    write_documents(tmp_path / "documents", {"train": rows(listed)}, shard_rows=50)
    found = [
        Unit(split="train", number=number, name=f"train-{number:05d}.parquet", documents=50, bytes=5000)
        for number in range(20)
    ]
    sampled = sampled_texts(tmp_path / "documents", found)
    assert set(sampled) <= set(listed)
    assert {int(text[:5]) // 50 for text in sampled} >= {0, 19}
    assert len({int(text[:5]) // 50 for text in sampled}) == 16
    assert sampled_texts(tmp_path / "documents", found[:1])[0] == listed[0]


def test_batches_are_of_about_so_many_bytes(tmp_path: Path) -> None:
    listed = [text * 20 for text in texts(300)]
    unit = unit_of(tmp_path / "documents", listed)
    batches = list(read_documents(str(tmp_path / "documents" / unit.name), unit, ["text"], 20_000))
    assert [row for _, columns in batches for row in columns["text"].to_pylist()] == listed
    firsts = [first for first, _ in batches]
    assert firsts == [sum(len(columns["text"]) for _, columns in batches[:n]) for n in range(len(batches))]
    sizes = [columns["text"].nbytes for _, columns in batches]
    assert len(sizes) > 5
    assert max(sizes) < 80_000


def test_whoever_stops_is_heard_between_batches(tokenizer: Path, tmp_path: Path) -> None:
    from common.errors import StageInterrupted

    unit = unit_of(tmp_path / "documents", texts(10))
    chosen = job("tokenizers")
    encode = partial(encode_unit, unit, str(tmp_path / "documents" / unit.name), chosen)
    with pytest.raises(StageInterrupted):
        encode(Encoders.load(chosen, tokenizer, False), tmp_path, lambda: True)
    assert not list(tmp_path.glob("*.safetensors"))
