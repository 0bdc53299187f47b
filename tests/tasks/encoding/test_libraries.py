"""Every library against the reference, for every kind of tokenizer: the same ids for any text, or it is refused."""

import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from models.tokenizer import Tokenizer
from tasks.encoding.choice import choose, difficult_texts
from tasks.encoding.encoders import (
    Candidate,
    Encoded,
    Encoder,
    EncoderFailed,
    Reference,
    explained,
    first_difference,
    joined,
)
from tasks.encoding.libraries import LIBRARIES
from tasks.vocabulary.bpe import bpe_tokenizer, byte_bpe_tokenizer
from tasks.vocabulary.config import BPE, ByteBPE, Bytes, Hub, SentencePiece
from tasks.vocabulary.hub import files_of, resolved, write_hub_tokenizer
from tasks.vocabulary.sample import Sample, described
from tasks.vocabulary.sentencepiece_training import train
from tasks.vocabulary.written import bytes_tokenizer
from tests.tasks.encoding.corpora import SPECIAL, byte_level, characters, rows, texts, write_documents, written

needs_hub = pytest.mark.skipif("CAIRN_HUB" not in os.environ, reason="CAIRN_HUB does not say where tokenizers are")


@cache
def sample() -> Sample:
    """Text to train on; the documents stay where pytest's own folders are."""
    folder = Path(os.environ["CAIRN_TEST_DOCUMENTS"])
    return Sample([described("documents", folder)], 1 << 20)


@pytest.fixture(scope="module", autouse=True)
def _documents(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("documents") / "documents"
    write_documents(folder, {"train": rows([*texts(1500, seed=4), *difficult_texts([])[:22]])}, shard_rows=5000)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CAIRN_TEST_DOCUMENTS", str(folder))
        sample.cache_clear()
        yield


def digits_apart(folder: Path) -> Path:
    """As StarCoder and SmolLM divide text; without some bytes, as theirs."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"Ą", "Ć"})
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(sample().documents(), trainer)
    return written(folder, backend)


def sentencepiece(folder: Path, kind: str) -> Path:
    content, converted = train(SentencePiece.model_validate({"kind": kind, "vocab_size": 700}), sample())
    written(folder, converted.backend)
    (folder / "tokenizer.model").write_bytes(content)
    return folder


def hub(folder: Path, name: str) -> Path:
    folder.mkdir()
    config = resolved(Hub(kind="hub", id=name))
    write_hub_tokenizer(files_of(config), folder, name)
    return folder


def byte_bpe(folder: Path, digits: str) -> Path:
    config = ByteBPE.model_validate({"kind": "byte_bpe", "vocab_size": 700, "digits": digits})
    return written(folder, byte_bpe_tokenizer(config, sample()))


MAKERS: dict[str, Callable[[Path], Path]] = {
    "bytes": lambda folder: written(folder, bytes_tokenizer(Bytes(kind="bytes"))),
    "byte_bpe, digits split": partial(byte_bpe, digits="split"),
    "byte_bpe, digits kept": partial(byte_bpe, digits="keep"),
    "byte_bpe without some bytes": partial(byte_level, without="ĊÄĀ"),
    "byte_bpe, digits apart": digits_apart,
    "bpe": lambda folder: written(folder, bpe_tokenizer(BPE(kind="bpe", vocab_size=700), sample())),
    "sentencepiece_bpe": partial(sentencepiece, kind="sentencepiece_bpe"),
    "sentencepiece_unigram": partial(sentencepiece, kind="sentencepiece_unigram"),
    "gpt2": partial(hub, name="openai-community/gpt2"),
    "smollm2": partial(hub, name="HuggingFaceTB/SmolLM2-135M"),
    "mistral": partial(hub, name="mistralai/Mistral-7B-v0.1"),
}
KINDS = [pytest.param(kind, marks=[needs_hub] if kind in ("gpt2", "smollm2", "mistral") else []) for kind in MAKERS]
BYTES_AS_WORDS = {"gigatoken", "tiktoken"}
TAKEN = {
    "byte_bpe, digits split": BYTES_AS_WORDS,
    "byte_bpe, digits kept": BYTES_AS_WORDS,
    "byte_bpe without some bytes": BYTES_AS_WORDS,
    "byte_bpe, digits apart": BYTES_AS_WORDS,
    "gpt2": BYTES_AS_WORDS,
    "smollm2": BYTES_AS_WORDS,
    "bytes": {"gigatoken"},
    "bpe": {"gigatoken"},
    "sentencepiece_bpe": {"gigatoken", "sentencepiece"},
    "sentencepiece_unigram": {"sentencepiece"},
    "mistral": {"gigatoken", "sentencepiece"},
}
"""The libraries that at least are taken; what others are refused for is their own affair."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tokenizer of each kind, made when it is asked for."""
    place = tmp_path_factory.mktemp("tokenizers")
    return cache(lambda kind: MAKERS[kind](place / kind))


@cache
def taken(folder: Path) -> tuple[Reference, dict[str, Candidate]]:
    """The reference, and every library that `choose` would take if it were the only one."""
    reference = Reference(folder, parallel=False)
    found = {}
    for name, make in LIBRARIES.items():
        with pytest.MonkeyPatch.context() as only:
            only.setattr("tasks.encoding.choice.LIBRARIES", {name: make})
            if choose(folder, texts(300, seed=2)).library == name:
                found[name] = Candidate(partial(make, folder, False), reference)
    return reference, found


@pytest.mark.parametrize("kind", KINDS)
def test_the_libraries_that_are_known_to_agree_are_taken(kind: str, folders: Callable[[str], Path]) -> None:
    _, candidates = taken(folders(kind))
    assert candidates.keys() >= TAKEN.get(kind, set())


PIECES = [*difficult_texts(SPECIAL)[:22], *SPECIAL, " ", "\n", "x" * 300, " " * 300]
SURPRISING = st.one_of(
    st.text(max_size=60),
    st.text(st.sampled_from("ab 1٣½\n\r\t'’.,▁ĠÄ\0\u00a0éé👍漢ſſK"), max_size=40),
    st.lists(st.sampled_from(PIECES), max_size=4).map("".join),
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(documents=st.lists(SURPRISING, max_size=6))
def test_what_is_taken_gives_the_ids_of_the_reference(
    kind: str, folders: Callable[[str], Path], documents: list[str]
) -> None:
    reference, candidates = taken(folders(kind))
    if not candidates:
        pytest.skip("no library is taken")
    expected = [reference.tokenizer.encode(document) for document in documents]
    padded = pa.array(["before", *documents, "after"])
    for name, candidate in candidates.items():
        for array in (pa.array(documents, pa.string()), padded.slice(1, len(documents)).cast(pa.large_string())):
            encoded = candidate.encode(array)
            assert lists(encoded) == expected, name


def lists(encoded: Encoded) -> list[list[int]]:
    """The ids of each document."""
    if not encoded.ends_D.size:
        return []
    return [part.tolist() for part in np.split(encoded.ids_N, encoded.ends_D[:-1])]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_never_come_out_of_text(kind: str, folders: Callable[[str], Path]) -> None:
    reference, candidates = taken(folders(kind))
    special = {id_ for id_, token in reference.tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    contents = [reference.tokenizer.backend.id_to_token(id_) for id_ in special]
    written_out = [form.format(content) for content in contents for form in ("{0}", "a{0}b", "{0}{0}", " {0} ")]
    encoders: list[Encoder] = [reference, *candidates.values()]
    for encoder in encoders:
        encoded = encoder.encode(pa.array(written_out))
        assert not np.isin(encoded.ids_N, list(special)).any(), encoder.name


def test_what_knows_few_characters_is_left_to_the_reference(tmp_path: Path) -> None:
    # Where it raises for an unknown character, others would give some id.
    made = choose(characters(tmp_path / "characters"), ["1+1=2"])
    assert made.library == "tokenizers"
    assert set(made.refused) == set(LIBRARIES)
    assert all(reason.startswith("not every text can be encoded: the tokenizer") for reason in made.refused.values())


def test_joined_and_first_difference() -> None:
    one = joined([[1, 2], [], np.array([3], np.int32)])
    assert (one.ids_N.tolist(), one.ends_D.tolist()) == ([1, 2, 3], [2, 2, 3])
    assert lists(joined([])) == []
    assert first_difference(one, joined([[1, 2], [], [3]])) is None
    assert first_difference(one, joined([[1], [2], [3]])) == 0
    assert first_difference(one, joined([[1, 2], [3], []])) == 1
    assert first_difference(one, joined([[1, 2], [], [4]])) == 2


def test_a_panic_is_an_error_like_others() -> None:
    # What a panic of Rust code is in Python: no Exception.
    panic = type("PanicException", (BaseException,), {})

    def fail(error: BaseException) -> None:
        raise error

    with pytest.raises(EncoderFailed, match="index out of bounds"):
        explained(lambda: fail(panic("index out of bounds")))
    for error in (KeyboardInterrupt(), SystemExit(), ValueError()):
        with pytest.raises(type(error)):
            explained(partial(fail, error))


def test_a_cache_that_grows_is_emptied(folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from gigatoken import Tokenizer as Backend

    monkeypatch.setattr("tasks.encoding.libraries.FRESH_AFTER_BYTES", 10_000)
    made: list[str] = []
    real = Backend.from_json

    def counted(data: str) -> Any:
        made.append(data)
        return real(data)

    monkeypatch.setattr(Backend, "from_json", counted)
    folder = folders("byte_bpe, digits split")
    encoder = LIBRARIES["gigatoken"](folder, False)
    listed = texts(60)
    size = sum(len(text.encode()) for text in listed)
    for _ in range(5):
        assert lists(encoder.encode(pa.array(listed))) == [Tokenizer(folder).encode(text) for text in listed]
    assert 1 < len(made) == 1 + (4 * size) // (10_000 // size * size + size)
