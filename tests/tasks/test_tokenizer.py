from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoTokenizer

from artifacts.identity import describe_files
from common.errors import UserError
from models.tokenizer import Tokenizer
from tasks.registry import stage_named
from tests.tasks.conftest import RunStage
from tests.tasks.vocabulary.texts import english, write_documents

CHARACTERS = "0123456789+-*/="
ARITHMETIC = {"vocabulary": {"kind": "characters", "characters": CHARACTERS}}
VOCABULARY = ["<pad>", "<bos>", "<eos>", *"0123456789", *"+-*/", "="]
TRAINED = ("byte_bpe", "bpe", "sentencepiece_bpe", "sentencepiece_unigram")


pytestmark = pytest.mark.usefixtures("empty_hub")


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "documents", [english(60), english(60, seed=1)])


@pytest.fixture
def arithmetic(run_stage: RunStage) -> Path:
    return run_stage("tokenizer", ARITHMETIC)[0]


def test_the_vocabulary_of_arithmetic_is_exactly_the_18_tokens(run_stage: RunStage) -> None:
    folder, metrics = run_stage("tokenizer", ARITHMETIC)
    tokenizer = Tokenizer(folder)
    summary = "18 tokens in the vocabulary"
    assert metrics == {"summary": summary, "kind": "characters", "vocab_size": 18, "notes": []}
    assert [tokenizer.backend.id_to_token(index) for index in range(18)] == VOCABULARY
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)


def test_transformers_opens_that_of_arithmetic_with_the_same_ids(arithmetic: Path) -> None:
    ours, theirs = Tokenizer(arithmetic), AutoTokenizer.from_pretrained(arithmetic)
    text = "554+456=1010"
    assert theirs(text).input_ids == ours.encode(text) == [8, 8, 7, 13, 7, 8, 9, 17, 4, 3, 4, 3]
    assert theirs(f"<bos>{text}<eos>").input_ids == [1, *ours.encode(text), 2]
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    assert theirs.decode([1, *ours.encode(text), 2], skip_special_tokens=True) == text


@pytest.mark.parametrize("character", ["a", " ", "\n", "é", "％", "<"])
def test_an_unknown_character_is_named(arithmetic: Path, character: str) -> None:
    with pytest.raises(UserError, match="does not know the character") as error:
        Tokenizer(arithmetic).encode(f"12{character}")
    assert repr(character) in str(error.value)
    assert str(error.value).endswith("it has: *+-/0123456789=")


@pytest.mark.parametrize("kind", TRAINED)
def test_trained_ones_have_the_size_and_the_special_tokens_asked_for(
    run_stage: RunStage, documents: Path, kind: str
) -> None:
    special = ["<|user|>", "<|end|>"]
    vocabulary = {"kind": kind, "vocab_size": 500, "special_tokens": special}
    template = "{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}"
    config = {"vocabulary": vocabulary, "chat_template": template}
    folder, metrics = run_stage("tokenizer", config, documents=documents)
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert len(ours) == len(theirs) == metrics["vocab_size"] == 500
    assert (ours.pad_id, ours.bos_id, ours.eos_id) == (0, 1, 2)
    assert (theirs.pad_token, theirs.bos_token, theirs.eos_token) == ("<pad>", "<bos>", "<eos>")
    chat = theirs.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<|user|>ab<|end|>"
    markers = [ours.backend.token_to_id(token) for token in special]
    assert theirs(chat).input_ids[:: len(theirs(chat).input_ids) - 1] == markers
    assert not set(markers) & set(ours.encode(chat))
    assert (folder / "tokenizer.model").is_file() == kind.startswith("sentencepiece")
    assert metrics["trained_on"][0]["documents"] == 120


@pytest.mark.parametrize("kind", TRAINED)
def test_the_same_documents_give_the_same_bytes(run_stage: RunStage, documents: Path, kind: str) -> None:
    config = {"vocabulary": {"kind": kind, "vocab_size": 500}}
    folders = [run_stage("tokenizer", config, documents=documents)[0] for _ in range(2)]
    assert describe_files(folders[0]) == describe_files(folders[1])


def test_several_documents_are_blended_by_weight(run_stage: RunStage, tmp_path: Path) -> None:
    letters = [write_documents(tmp_path / letter, [[f"{letter * 9} "] * 2000]) for letter in "ab"]
    config = {
        "vocabulary": {"kind": "byte_bpe", "vocab_size": 262, "training_bytes": 1000},
        "blend": [{"weight": 1}, {"weight": 9}],
    }
    inputs = {f"documents.{number}": folder for number, folder in enumerate(letters)}
    labels = {"documents.0": "first", "documents.1": "second"}
    folder, metrics = run_stage("tokenizer", config, labels=labels, **inputs)
    assert [(drawn["source"], drawn["bytes"]) for drawn in metrics["trained_on"]] == [("first", 100), ("second", 900)]
    merged = sorted(Tokenizer(folder).backend.get_vocab().items(), key=lambda item: item[1])[-3:]
    assert all(set(token) <= {"b", "Ġ"} for token, _ in merged)


def test_the_words_are_measured_where_there_are_documents(run_stage: RunStage, documents: Path) -> None:
    folder, metrics = run_stage("tokenizer", {"vocabulary": {"kind": "bytes"}}, documents=documents)
    (row,) = metrics["fertility"]
    assert row["bytes_per_token"] == 1.0
    assert row["tokens"] == row["bytes"] == sum(len(text.encode()) for text in english(60) + english(60, seed=1))
    assert len(metrics["notes"]) == 3
    assert "| tokenizer | 259 | training documents |" in (folder.parent / "logs" / "report.md").read_text()


@pytest.mark.parametrize("kind", TRAINED)
def test_what_is_learnt_needs_documents(run_stage: RunStage, kind: str) -> None:
    with pytest.raises(UserError, match=f"documents is missing: a vocabulary of the kind {kind} is learnt from text"):
        run_stage("tokenizer", {"vocabulary": {"kind": kind, "vocab_size": 500}})


def test_shares_without_documents_are_refused(run_stage: RunStage) -> None:
    with pytest.raises(UserError, match="blend has 1 shares for 0 artifacts"):
        run_stage("tokenizer", {**ARITHMETIC, "blend": [{"weight": 1}]})


@pytest.mark.parametrize("kind", TRAINED)
def test_too_little_text_is_refused_in_a_line(run_stage: RunStage, tmp_path: Path, kind: str) -> None:
    documents = write_documents(tmp_path / "few", [["hello world"]])
    with pytest.raises(UserError, match=r"^vocabulary\.vocab_size: .*(not 5,000|ask for \d+ or fewer)") as error:
        run_stage("tokenizer", {"vocabulary": {"kind": kind, "vocab_size": 5000}}, documents=documents)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", TRAINED[1:])
def test_more_characters_than_tokens_are_refused_in_a_line(run_stage: RunStage, tmp_path: Path, kind: str) -> None:
    letters = "".join(map(chr, range(0x4E00, 0x4F00)))
    documents = write_documents(tmp_path / "letters", [[letters] * 3])
    vocabulary = {"kind": kind, "vocab_size": 300, "character_coverage": 1.0}
    with pytest.raises(UserError, match=r"^vocabulary\.vocab_size: 300 has no room for the (257 )?char") as error:
        run_stage("tokenizer", {"vocabulary": vocabulary}, documents=documents)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({"kind": "bytes", "special_tokens": ["<a>", "<a>"]}, "'<a>' is there twice"),
        ({"kind": "bytes", "special_tokens": ["<eos>"]}, "'<eos>' is there twice"),
        ({"kind": "bytes", "special_tokens": ["a"]}, "'a' cannot be one"),
        ({"kind": "bytes", "special_tokens": ["a b"]}, "'a b' cannot be one"),
        ({"kind": "bytes", "special_tokens": ["<0x41>"]}, "'<0x41>' cannot be one"),
        ({"kind": "characters", "characters": "abca"}, "'a' is there twice"),
        (
            {"kind": "byte_bpe", "vocab_size": 259},
            "259 is too small: special tokens and bytes alone are 259",
        ),
        ({"kind": "sentencepiece_bpe", "vocab_size": 260}, "bytes alone are 260"),
        ({"kind": "bpe", "vocab_size": 500, "merges": 3}, "Extra inputs"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(vocabulary: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        stage_named("tokenizer").config.model_validate({"vocabulary": vocabulary})


@pytest.fixture(scope="module")
def spelled(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    from models.tokenizer import write_tokenizer
    from tasks.vocabulary.config import ROLES, Characters
    from tasks.vocabulary.written import characters_tokenizer

    folder = tmp_path_factory.mktemp("characters")
    config = Characters(kind="characters", characters=CHARACTERS, special_tokens=("<a>",))
    write_tokenizer(folder, characters_tokenizer(config), ROLES)
    return Tokenizer(folder)


@given(text=st.text(st.sampled_from(CHARACTERS)))
def test_decoding_undoes_encoding(spelled: Tokenizer, text: str) -> None:
    assert spelled.encode(text) == [3 + CHARACTERS.index(character) for character in text]
    assert spelled.decode([1, *spelled.encode(text), 18, 2]) == text
