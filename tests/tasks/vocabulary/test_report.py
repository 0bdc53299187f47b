from pathlib import Path

import pytest

from models.tokenizer import Tokenizer, write_tokenizer
from tasks.vocabulary.config import ROLES, Bytes
from tasks.vocabulary.report import report, wikitext
from tasks.vocabulary.written import bytes_tokenizer
from tests.tasks.vocabulary.texts import english, needs_hub

TEXTS = ["Two words", "thrée  more\nwords ", ""]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bytes").mkdir()
    write_tokenizer(tmp_path / "bytes", bytes_tokenizer(Bytes(kind="bytes")), ROLES)
    return tmp_path / "bytes"


def test_what_cannot_be_had_is_said(folder: Path, empty_hub: Path) -> None:
    found = report("bytes", folder, iter(TEXTS))
    (row,) = found.rows
    assert row == ("bytes", "training documents", 259, 5, 28, 28)
    assert (row.tokens_per_word, row.bytes_per_token) == (5.6, 1.0)
    assert [note.partition(":")[0] for note in found.notes] == [
        "not measured on WikiText-2",
        "not compared with GPT-2",
        "not compared with SmolLM2",
    ]
    assert all(f"not below CAIRN_HUB={empty_hub}" in note for note in found.notes)
    assert found.markdown().splitlines()[4] == "| bytes | 259 | training documents | 5 | 5.600 | 1.000 |"
    assert found.notes[0] in found.markdown()


@needs_hub
def test_others_are_compared_on_the_same_texts(folder: Path) -> None:
    texts = english(300)
    found = report("bytes", folder, texts)
    assert [(row.text, row.tokenizer) for row in found.rows] == [
        (text, tokenizer)
        for text in ("training documents", "WikiText-2 test")
        for tokenizer in ("bytes", "GPT-2", "SmolLM2")
    ]
    assert found.notes == []
    for row in found.rows:
        assert row[3:5] == next(own[3:5] for own in found.rows if own.text == row.text)
    bytes_here, gpt2 = found.rows[:2]
    assert bytes_here.tokens == bytes_here.bytes == sum(len(text.encode()) for text in texts)
    assert gpt2.vocab_size == 50_257


@needs_hub
def test_wikitext_is_whole() -> None:
    lines = wikitext()
    assert len(lines) == 4358
    # 241,211 words, and 245,569 with the <eos> of each line that the paper counts (Merity et al., 2016).
    assert sum(len(line.split()) for line in lines) == 241_211
    assert sum(len(line.split()) + 1 for line in lines) == 245_569


def test_the_count_is_that_of_encoding_each_text_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.tokenizer.ENCODED_AT_ONCE", 1000)
    monkeypatch.setattr("tasks.vocabulary.report.COMPARED", {})
    monkeypatch.setattr("tasks.vocabulary.report.wikitext", lambda: ["a", "", "b c"])
    texts = english(20)
    rows = report("bytes", folder, texts).rows
    tokenizer = Tokenizer(folder)
    assert [row.tokens for row in rows] == [sum(len(tokenizer.encode(text)) for text in texts), 4]
    assert [row.words for row in rows] == [sum(len(text.split()) for text in texts), 3]
