from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.corpus.text import Texts
from tasks.corpus.words import Lines, Words, grouped
from tests.tasks.corpus import reference
from tests.tasks.corpus.reference import TEXTS

PATIENT = settings(deadline=None)
BATCHES = st.lists(TEXTS, max_size=6)


def found_words(words: Words, data: bytes) -> list[list[str]]:
    spans = list(zip(words.begin_W.tolist(), words.end_W.tolist(), strict=True))
    firsts = words.first_D1.tolist()
    return [[data[begin:end].decode() for begin, end in spans[first:last]] for first, last in pairwise(firsts)]


def found_lines(texts: Texts, lines: Lines) -> list[list[str]]:
    data = texts.data_N.tobytes()
    spans = list(zip(lines.begin_L.tolist(), lines.end_L.tolist(), strict=True))
    firsts = lines.first_D1.tolist()
    return [[data[begin:end].decode() for begin, end in spans[first:last]] for first, last in pairwise(firsts)]


@PATIENT
@given(BATCHES)
def test_words_are_what_split_finds(batch: list[str]) -> None:
    texts = Texts.of(batch)
    words = texts.words
    expected = [text.split() for text in batch]
    assert found_words(words, texts.data_N.tobytes()) == expected
    assert words.count_D.tolist() == [len(own) for own in expected]
    assert words.characters_W.tolist() == [len(word) for own in expected for word in own]
    assert words.document_W.tolist() == [number for number, own in enumerate(expected) for _ in own]
    assert words.sum_D(words.characters_W).tolist() == [sum(map(len, own)) for own in expected]
    assert texts.characters_D.tolist() == [len(text) for text in batch]
    assert texts.bytes_D.tolist() == [len(text.encode()) for text in batch]


@PATIENT
@given(BATCHES)
def test_plain_words_are_letters_digits_and_marks_in_lower_case(batch: list[str]) -> None:
    texts = Texts.of(batch)
    words = texts.plain_words
    expected = [reference.plain_words(text) for text in batch]
    assert words.count_D.tolist() == [len(own) for own in expected]
    assert words.characters_W.tolist() == [len(word) for own in expected for word in own]
    # The words themselves are only to be had by their hashes.
    flat = [word for own in expected for word in own]
    assert words.hash_W.tolist() == [Texts.of([word]).plain_words.hash_W[0] for word in flat]
    assert [len(set(own)) for own in expected] == [
        len(set(words.hash_W[first:last].tolist())) for first, last in pairwise(words.first_D1.tolist())
    ]


@PATIENT
@given(BATCHES)
def test_lines_and_paragraphs(batch: list[str]) -> None:
    texts = Texts.of(batch)
    for found, expected in (
        (texts.lines, [reference.lines(text) for text in batch]),
        (texts.paragraphs, [reference.paragraphs(text) for text in batch]),
    ):
        assert found_lines(texts, found) == expected
        assert found.characters_L.tolist() == [len(line) for own in expected for line in own]
        assert found.words_L.tolist() == [len(line.split()) for own in expected for line in own]
        assert found.document_L.tolist() == [number for number, own in enumerate(expected) for _ in own]
        keys = [tuple(line.split()) for own in expected for line in own]
        hashes = found.hash_L.tolist()
        assert len(set(keys)) == len(set(hashes)) == len(set(zip(keys, hashes, strict=True)))


def test_lines_of_the_same_words_in_another_order_differ() -> None:
    hashes = Texts.of(["a b\nb a\na  b\na b a b\na\nb\na a"]).lines.hash_L.tolist()
    assert hashes[0] == hashes[2]
    assert len(set(hashes)) == 6


def mixed(value: int) -> int:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


@PATIENT
@given(st.lists(st.text(st.sampled_from("ab\x00é戦"), min_size=1, max_size=40), min_size=1, max_size=8))
def test_words_hash_by_their_bytes_alone(words: list[str]) -> None:
    expected = []
    for word in words:
        data = word.encode()
        chunks = [int.from_bytes(data[begin : begin + 8], "little") for begin in range(0, len(data), 8)]
        value = mixed(chunks[0] ^ len(data) * 0x9E3779B97F4A7C15 % 2**64)
        for chunk in chunks[1:]:
            value = mixed(value ^ chunk)
        expected.append(value)
    short = [len(word.encode()) <= 64 for word in words]
    texts = Texts.of([" ".join(words)])
    assert texts.words.hash_W[short].tolist() == [value for value, own in zip(expected, short, strict=True) if own]
    assert len(set(words)) == len(set(texts.words.hash_W.tolist()))
    assert [texts.words.where(word).tolist() for word in words] == [
        [place for place, other in enumerate(words) if other == word] for word in words
    ]


def test_words_of_all_lengths_differ_in_every_byte() -> None:
    for size in (1, 7, 8, 9, 16, 63, 64, 65, 200):
        words = ["x" * size] + ["x" * place + "y" + "x" * (size - place - 1) for place in range(size)]
        assert len(set(Texts.of(words).words.hash_W.tolist())) == size + 1


@PATIENT
@given(BATCHES, st.integers(1, 5))
def test_ngrams_stay_in_their_documents(batch: list[str], n: int) -> None:
    words = Texts.of(batch).words
    hashes, firsts = words.ngrams(n)
    expected = [ngram for text in batch for ngram in reference.ngrams(text.split(), n)]
    flat = [word for text in batch for word in text.split()]
    assert [tuple(flat[first : first + n]) for first in firsts.tolist()] == expected
    assert len(set(expected)) == len(set(hashes.tolist())) == len(set(zip(expected, hashes.tolist(), strict=True)))
    longer, places = words.ngrams(n + 1)
    kept = np.isin(firsts, places)
    assert words.longer(hashes[kept], firsts[kept], n + 1).tolist() == longer.tolist()


@PATIENT
@given(st.lists(st.integers(0, 5) | st.sampled_from([2**64 - 1, 2**63, 2**63 + 1, 2**40, 2**40 + 1]), max_size=50))
def test_grouped_is_a_stable_order(keys: list[int]) -> None:
    order, new = grouped(np.array(keys, np.uint64))
    assert order.tolist() == sorted(range(len(keys)), key=lambda place: keys[place])
    assert new.tolist() == [True] * bool(keys) + [keys[a] != keys[b] for a, b in pairwise(order.tolist())]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_a_batch_may_be_of_chunks_and_slices(kind: pa.DataType) -> None:
    chunks = [pa.array(own, kind) for own in (["a b", "c"], [], ["é d e", "", "f\ng"])]
    table = pa.table({"text": pa.chunked_array(chunks, kind)}).slice(1, 3)
    texts = Texts(table)
    assert len(texts) == 3
    assert texts.words.count_D.tolist() == [1, 3, 0]
    assert texts.words.hash_W.tolist() == Texts.of(["c é d e"]).words.hash_W.tolist()


def test_no_documents_have_no_words() -> None:
    texts = Texts.of([])
    assert len(texts) == len(texts.words) == len(texts.plain_words) == len(texts.lines) == len(texts.paragraphs) == 0
    assert texts.words.hash_W.tolist() == texts.lines.hash_L.tolist() == texts.lines.characters_L.tolist() == []
