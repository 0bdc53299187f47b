import pytest
from hypothesis import given

from tasks.vocabulary.config import Bytes
from tasks.vocabulary.written import byte_characters, bytes_tokenizer
from tests.tasks.vocabulary.texts import any_text

CONFIG = Bytes(kind="bytes", special_tokens=("<|user|>",))
BACKEND = bytes_tokenizer(CONFIG)
BACKEND.encode_special_tokens = True


@given(text=any_text())
def test_a_text_is_its_bytes(text: str) -> None:
    ids = BACKEND.encode(text, add_special_tokens=False).ids
    assert ids == [4 + byte for byte in text.encode()]
    assert BACKEND.decode(ids) == text


def test_special_tokens_come_first() -> None:
    assert [BACKEND.id_to_token(index) for index in range(4)] == ["<pad>", "<bos>", "<eos>", "<|user|>"]
    assert BACKEND.get_vocab_size() == 260
    assert BACKEND.decode([1, 4 + 97, 3, 2]) == "a"


@pytest.mark.parametrize(("byte", "character"), [(0, "Ā"), (32, "Ġ"), (10, "Ċ"), (65, "A"), (173, "Ń"), (255, "ÿ")])
def test_bytes_are_written_as_gpt2_writes_them(byte: int, character: str) -> None:
    assert byte_characters()[byte] == character
    assert len(set(byte_characters())) == 256
