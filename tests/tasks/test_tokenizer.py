from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from common.errors import UserError
from models.tokenizer import Tokenizer, write_characters_tokenizer
from tasks.tokenizer import ARITHMETIC_CHARACTERS
from tests.tasks.conftest import RunStage

VOCABULARY = ["<pad>", "<bos>", "<eos>", *"0123456789", *"+-*/", "="]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("characters")
    write_characters_tokenizer(place, ARITHMETIC_CHARACTERS)
    return place


def test_the_vocabulary_is_exactly_the_18_tokens(run_stage: RunStage) -> None:
    folder, metrics = run_stage("tokenizer", {"kind": "characters"})
    tokenizer = Tokenizer(folder)
    assert metrics["vocab_size"] == 18
    assert [tokenizer.backend.id_to_token(index) for index in range(18)] == VOCABULARY
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)


def test_transformers_opens_it_with_the_same_ids(folder: Path) -> None:
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    text = "<bos>554+456=1010<eos>"
    assert theirs(text).input_ids == ours.encode(text) == [1, 8, 8, 7, 13, 7, 8, 9, 17, 4, 3, 4, 3, 2]
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    assert theirs.decode(ours.encode(text), skip_special_tokens=True) == ours.decode(ours.encode(text))
    assert ours.decode(ours.encode(text)) == "554+456=1010"


@given(text=st.text(st.sampled_from(ARITHMETIC_CHARACTERS)))
def test_decoding_undoes_encoding(folder: Path, text: str) -> None:
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode(f"<bos>{text}<eos>")) == text


@pytest.mark.parametrize("character", ["a", " ", "\n", "é", "％"])
def test_an_unknown_character_is_named(folder: Path, character: str) -> None:
    with pytest.raises(UserError, match="does not know the character") as error:
        Tokenizer(folder).encode(f"<bos>12{character}")
    assert repr(character) in str(error.value)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no readable tokenizer"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no readable tokenizer"):
        Tokenizer(tmp_path)
