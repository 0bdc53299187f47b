"""The data card: what it says, that it always says the same, and that text cannot break out of it."""

import json
import re
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from models.tokenizer import Tokenizer
from tasks.encoding.card import read_document, shortened, write_card
from tasks.encoding.lengths_picture import draw_lengths, quantile
from tasks.stage import Context, Runtime
from tasks.tokens import STAGE
from tests.tasks.encoding.corpora import byte_level, rows, texts, write_documents


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, list[str]]:
    """The stage's output, its logs beside it, and the training documents."""
    listed = texts(90)
    listed[9] = "long " * 1000 + "and the end"
    listed[27] = "with ``` a fence ```` in it"
    splits = {"validation": rows(texts(5, seed=1)), "train": rows(listed)}
    documents = write_documents(tmp_path / "documents", splits, shard_rows=25)
    context = Context(
        name="books",
        output=tmp_path / "output",
        logs=tmp_path / "logs",
        scratch=(fsspec.filesystem("file"), str(tmp_path / "scratch")),
        local_scratch=tmp_path / "scratch",
        runtime=Runtime(),
        report=lambda event: None,
    )
    context.output.mkdir()
    context.logs.mkdir()
    inputs = {"documents": documents, "tokenizer": byte_level(tmp_path / "tokenizer")}
    STAGE.run(STAGE.config.model_validate({"shard_tokens": 900}), inputs, context)
    return context.output, listed


def test_what_the_card_says(made: tuple[Path, list[str]]) -> None:
    output, listed = made
    card = (output.parent / "logs" / "data_card.md").read_text()
    tokens = json.loads((output / "tokens.json").read_bytes())
    assert card.startswith("# Data card of `books`: tests/corpus\n")
    assert "| `revision` | abc |" in card
    assert "| dropped | **length**: minimum 5 | 3 | 30 |" in card
    assert "| read |  | 98 |" in card
    assert "| **kept** |  | **95** |" in card
    train, validation = (tokens["splits"][split] for split in ("train", "validation"))
    (row,) = re.findall(r"\| train \|.*", card)
    assert card.index("| train |") < card.index("| validation |")
    found = [cell.strip() for cell in row.strip("| ").split("|")]
    lengths = sorted(length for length, count in train["lengths"] for _ in range(count))
    assert found == [
        "train",
        "90",
        f"{train['bytes']:,}",
        f"{train['tokens']:,}",
        f"{train['counted_tokens']:,}",
        f"{train['bytes'] / train['tokens']:.3f}",
        f"{lengths[(len(lengths) - 1) // 2]:,}",
        f"{lengths[-1]:,}",
        f"{len(train['shards'])}",
    ]
    assert f"{train['tokens'] + validation['tokens']:,} tokens in 95 documents, with a tokenizer of 600 tokens" in card
    assert "Tokenizer: BPE, 600 tokens; `<eos>` (2) after each document. Ids are uint16." in card
    assert "](document_lengths.png)" in card
    assert re.findall(r"### train, document (\d+)", card) == ["9", "27", "45", "63", "81"]
    for number in (27, 45, 63, 81):
        assert listed[number] in card
    assert "````" + "`text\nwith ``` a fence ```` in it\n`````" in card
    assert f"[… {len(listed[9]) - 1000:,} characters left out …]" in card
    assert "and the end\n```" in card
    assert (output.parent / "logs" / "document_lengths.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_is_the_same_again(made: tuple[Path, list[str]], tmp_path: Path) -> None:
    output, _ = made
    documents, tokens = (
        json.loads(path.read_bytes()) for path in (tmp_path / "documents" / "documents.json", output / "tokens.json")
    )
    again = tmp_path / "again"
    again.mkdir()
    write_card(again, documents, tokens, output, "books")
    for name in ("data_card.md", "document_lengths.png"):
        assert (again / name).read_bytes() == (output.parent / "logs" / name).read_bytes()


def test_documents_are_found_in_their_shards(made: tuple[Path, list[str]]) -> None:
    output, listed = made
    entries = json.loads((output / "tokens.json").read_bytes())["splits"]["train"]["shards"]
    assert len(entries) > 5
    tokenizer = Tokenizer(output / "tokenizer")
    assert [tokenizer.decode(read_document(output, entries, number)[0]) for number in range(90)] == listed
    with pytest.raises(IndexError):
        read_document(output, entries, 90)


def test_a_table_holds_whatever_a_source_is_called(made: tuple[Path, list[str]], tmp_path: Path) -> None:
    output, _ = made
    documents: dict[str, Any] = json.loads((tmp_path / "documents" / "documents.json").read_bytes())
    documents["source"] |= {"files": ["a|b.txt", "c\nd.txt"], "none": None, "": ""}
    tokens = json.loads((output / "tokens.json").read_bytes())
    write_card(tmp_path / "logs", documents, tokens, output, "books")
    card = (tmp_path / "logs" / "data_card.md").read_text()
    assert '| `files` | ["a\\|b.txt", "c\\nd.txt"] |' in card
    assert "| `none` | null |" in card


def test_shortened() -> None:
    assert shortened("x" * 1000) == "x" * 1000
    assert shortened("a" * 700 + "b" * 7 + "c" * 300) == "a" * 700 + "\n[… 7 characters left out …]\n" + "c" * 300


@pytest.mark.parametrize("seed", range(5))
def test_quantile(seed: int) -> None:
    random = np.random.default_rng(seed)
    drawn = random.integers(0, 50, random.integers(1, 200))
    lengths = [(int(value), int(count)) for value, count in zip(*np.unique(drawn, return_counts=True), strict=True)]
    for share in (0.0, 0.25, 0.5, 1.0):
        expected = np.quantile(drawn, share, method="inverted_cdf")
        assert quantile(lengths, share) == expected


@pytest.mark.parametrize("lengths", [[(0, 5)], [(1, 1)], [(13, 400_000)], [(1, 2), (3_000_000, 1)]])
def test_any_lengths_can_be_drawn(lengths: list[tuple[int, int]]) -> None:
    picture = draw_lengths({"train": lengths, "test": lengths}, "title")
    assert picture.startswith(b"\x89PNG")
