"""Splits by the hash of a document."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.corpus.duplicates import DuplicatesConfig, fingerprints
from tasks.corpus.sources import SPLITS
from tasks.corpus.splitting import Fractions, text_hashes
from tasks.corpus.text import Texts


def table(texts: list[str]) -> pa.Table:
    return pa.table({"text": pa.array(texts, pa.string())})


def split(text: str, validation: float, test: float) -> str:
    """The split by its definition, with whole numbers alone."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    if number < int(validation * 2**64):
        return "validation"
    return "test" if number >= 2**64 - int(test * 2**64) else "train"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(), max_size=20), st.integers(0, 5), st.floats(0, 0.5), st.floats(0, 0.49))
def test_the_split_is_that_of_the_hash(texts: list[str], first: int, validation: float, test: float) -> None:
    hash_D = text_hashes(table(texts).slice(first))
    found = [SPLITS[index] for index in Fractions(validation=validation, test=test).splits(hash_D)]
    assert found == [split(text, validation, test) for text in texts[first:]]


@given(st.lists(st.text(), max_size=20))
def test_the_hash_is_the_one_that_duplicates_are_found_by(texts: list[str]) -> None:
    prints = fingerprints(Texts(table(texts)), DuplicatesConfig())
    assert prints.hash_D.tolist() == text_hashes(table(texts)).tolist()
    large = table(texts).cast(pa.schema([("text", pa.large_string())]))
    assert text_hashes(large).tolist() == prints.hash_D.tolist()


def test_the_split_is_pinned() -> None:
    # A document that moved to another split would be tested on after it was trained on.
    hash_D = text_hashes(table([f"document {number}" for number in range(10_000)]))
    assert hash_D[:2].tolist() == [10835871625752995353, 8529056751021236426]
    splits_D = Fractions(validation=0.1, test=0.2).splits(hash_D)
    assert np.bincount(splits_D).tolist() == [7057, 1005, 1938]
    np.testing.assert_allclose(np.bincount(splits_D) / 10_000, [0.7, 0.1, 0.2], atol=0.02)


@given(st.lists(st.text(), max_size=50, unique=True), st.floats(0, 0.3), st.floats(0, 0.3))
def test_a_larger_fraction_takes_from_training_alone(texts: list[str], smaller: float, more: float) -> None:
    hash_D = text_hashes(table(texts))
    before_D = Fractions(validation=smaller, test=0.1).splits(hash_D)
    after_D = Fractions(validation=smaller + more, test=0.1).splits(hash_D)
    assert all(before == after or before == 0 for before, after in zip(before_D, after_D, strict=True))


def test_fractions_that_leave_nothing_to_train_on_are_refused() -> None:
    with pytest.raises(ValueError, match="leave nothing to train on"):
        Fractions(validation=0.5, test=0.5)
