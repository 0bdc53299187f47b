import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from tokenizers import Tokenizer, pre_tokenizers

from common.errors import UserError
from tasks.vocabulary.bpe import alphabet, bpe_tokenizer, byte_bpe_tokenizer, words
from tasks.vocabulary.config import BPE, ByteBPE
from tasks.vocabulary.sample import Sample, described
from tests.tasks.vocabulary.texts import ODD, any_text, english, runs, scattered, write_documents

ROOT = Path(__file__).parents[3]
SPECIAL = ("<|user|>", "ab")
TEXTS = [*english(60), *english(10, seed=3), *ODD, *scattered(20)]


def sample(folder: Path, texts: list[str]) -> Sample:
    return Sample([described("texts", write_documents(folder, [texts]))], 1 << 30)


def trained(folder: Path, texts: list[str], kind: str, **config: Any) -> Tokenizer:
    settings = {"kind": kind, "vocab_size": 1000, "special_tokens": SPECIAL, **config}
    if kind == "byte_bpe":
        settings.pop("character_coverage", None)
        backend = byte_bpe_tokenizer(ByteBPE.model_validate(settings), sample(folder, texts))
    else:
        backend = bpe_tokenizer(BPE.model_validate(settings), sample(folder, texts))
    backend.encode_special_tokens = True
    return backend


def size(kind: str, texts: list[str], merges: int) -> int:
    """The vocabulary that so many merges make."""
    return 261 + merges + (len({"▁", *"".join(texts).replace(" ", "▁")}) if kind == "bpe" else 0)


@pytest.fixture(scope="module", params=["split", "keep"])
def digits(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def over_bytes(tmp_path_factory: pytest.TempPathFactory, digits: str) -> Tokenizer:
    return trained(tmp_path_factory.mktemp("bytes") / "d", TEXTS, "byte_bpe", digits=digits)


@pytest.fixture(scope="module")
def over_characters(tmp_path_factory: pytest.TempPathFactory, digits: str) -> Tokenizer:
    return trained(tmp_path_factory.mktemp("characters") / "d", TEXTS, "bpe", digits=digits)


@given(text=any_text())
def test_over_bytes_any_text_comes_back(over_bytes: Tokenizer, text: str) -> None:
    ids = over_bytes.encode(text, add_special_tokens=False).ids
    assert over_bytes.decode(ids) == text
    assert min(ids, default=5) >= 5


@given(text=any_text())
def test_over_characters_any_text_comes_back_but_for_its_name_of_a_space(over_characters: Tokenizer, text: str) -> None:
    ids = over_characters.encode(text, add_special_tokens=False).ids
    assert over_characters.decode(ids) == text.replace("▁", " ")
    assert min(ids, default=5) >= 5


def test_words_need_not_be_divided_once_they_are_learnt(over_characters: Tokenizer, digits: str) -> None:
    texts = [*english(40, seed=7), *runs(3000), *ODD, *scattered(200, seed=5)]
    expected = [encoding.ids for encoding in over_characters.encode_batch(texts, add_special_tokens=False)]
    divided = Tokenizer.from_str(over_characters.to_str())
    divided.encode_special_tokens = True
    divided.pre_tokenizer = pre_tokenizers.Split(words(BPE(kind="bpe", vocab_size=1000, digits=digits)), "isolated")
    assert [encoding.ids for encoding in divided.encode_batch(texts, add_special_tokens=False)] == expected


@pytest.mark.parametrize("kind", ["byte_bpe", "bpe"])
def test_digits_are_apart_or_joined(tmp_path: Path, kind: str) -> None:
    texts = ["12345 12345 x12345x " * 20] * 3
    tokens = trained(tmp_path / "k", texts, kind, digits="keep", vocab_size=size(kind, texts, 5)).get_vocab()
    assert any("12345" in token for token in tokens)
    # With digits apart, what can be joined is the space and the letter x.
    tokens = trained(tmp_path / "s", texts, kind, digits="split", vocab_size=size(kind, texts, 1)).get_vocab()
    joined = [token for token in tokens if len(token) > 1 and any(digit in token for digit in "12345")]
    assert all(token.startswith("<0x") for token in joined)


@pytest.mark.parametrize("kind", ["byte_bpe", "bpe"])
def test_special_tokens_are_never_learnt(tmp_path: Path, kind: str) -> None:
    texts = ["abab <|user|> <0x41> <0x41><|user|> <eos><eos> c caca" * 50] * 4
    backend = trained(tmp_path / "d", texts, kind, vocab_size=size(kind, texts, 3), character_coverage=1.0)
    assert [backend.id_to_token(index) for index in range(5)] == ["<pad>", "<bos>", "<eos>", *SPECIAL]
    for text in ("ab", "<|user|>", "<eos>", "<0x41>", "abab<pad>"):
        ids = backend.encode(text, add_special_tokens=False).ids
        assert min(ids) >= 5
        assert backend.decode(ids) == text


def test_a_special_token_that_the_bytes_have_too_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'Ã©' is a token of the text too"):
        trained(tmp_path / "d", ["éé éé é" * 40], "byte_bpe", special_tokens=["Ã©"], vocab_size=261)


def test_the_alphabet_is_what_counting_gives(tmp_path: Path) -> None:
    texts = sample(tmp_path / "d", TEXTS)
    counts = Counter("".join(TEXTS).replace(" ", "▁"))
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    for coverage in (0.5, 0.99, 0.9995, 1.0):
        kept, rare = alphabet(texts.pieces(), coverage)
        assert [*kept, *rare] == ranked
        covered = [sum(counts[c] for c in kept[: len(kept) - less]) for less in (0, 1)]
        assert covered[0] >= coverage * counts.total() > covered[1]
    assert alphabet(["aab"], 0.5) == (["▁", "a"], ["b"])


_CHILD = """
import sys
from pathlib import Path
from tasks.vocabulary.bpe import bpe_tokenizer, byte_bpe_tokenizer
from tasks.vocabulary.config import BPE, ByteBPE
from tasks.vocabulary.sample import Sample, described
sample = Sample([described("texts", Path(sys.argv[1]))], 1 << 30)
print(byte_bpe_tokenizer(ByteBPE(kind="byte_bpe", vocab_size=900), sample).to_str())
print(bpe_tokenizer(BPE(kind="bpe", vocab_size=900), sample).to_str())
"""


def test_any_number_of_threads_gives_the_same(tmp_path: Path) -> None:
    folder = write_documents(tmp_path / "d", [TEXTS])
    outputs = set()
    for number in ("1", "2", "7"):
        environment = {"RAYON_NUM_THREADS": number, "PYTHONPATH": str(ROOT), "PATH": ""}
        ran = subprocess.run(
            [sys.executable, "-c", _CHILD, str(folder)], env=environment, capture_output=True, text=True, check=True
        )
        assert [len(json.loads(line)["model"]["vocab"]) for line in ran.stdout.split("\n")[:2]] == [900, 900]
        outputs.add(ran.stdout)
    assert len(outputs) == 1
