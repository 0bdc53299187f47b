import hashlib
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.corpus import minhash
from tasks.corpus.minhash import NearConfig, bands_and_rows, signatures
from tasks.corpus.text import Texts
from tests.tasks.corpus import reference
from tests.tasks.corpus.reference import TEXTS


def shingles(text: str, ngram: int) -> set[tuple[str, ...]]:
    words = reference.plain_words(text)
    return set(reference.ngrams(words, ngram)) or ({tuple(words)} if words else set())


@settings(deadline=None, max_examples=60)
@given(st.lists(TEXTS, max_size=8), st.integers(1, 6))
def test_signatures_are_equal_where_the_shingles_are(batch: list[str], ngram: int) -> None:
    config = NearConfig(ngram=ngram, permutations=16)
    found = signatures(Texts.of(batch), config)
    expected = [shingles(text, ngram) for text in batch]
    assert found.has_words_D.tolist() == [bool(own) for own in expected]
    rows = [(own, row.tobytes(), bands.tobytes()) for own, row, bands in zip(expected, *found[1:], strict=True) if own]
    for own, row, bands in rows:
        for other, other_row, other_bands in rows:
            assert (own == other) == (row == other_row) == (bands == other_bands)


@settings(deadline=None, max_examples=30)
@given(st.lists(TEXTS, max_size=8))
def test_signatures_do_not_depend_on_the_batch(batch: list[str]) -> None:
    together = signatures(Texts.of(batch), NearConfig())
    for row, text in enumerate(batch):
        alone = signatures(Texts.of([text]), NearConfig())
        assert together.has_words_D[row] == alone.has_words_D[0]
        assert (together.signature_DP[row] == alone.signature_DP[0]).all()
        assert (together.band_DB[row] == alone.band_DB[0]).all()


def test_many_short_documents_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{number:x}" for number in range(8000)]
    tracemalloc.start()
    try:
        found = signatures(Texts.of(texts), NearConfig())
        # All numbers of the signatures as Python's take 41 MB.
        assert tracemalloc.get_traced_memory()[1] < 36e6
    finally:
        tracemalloc.stop()
    monkeypatch.setattr(minhash, "_NUMBERS_AT_ONCE", 128 * 7)
    again = signatures(Texts.of(texts[:100]), NearConfig())
    assert (again.signature_DP == found.signature_DP[:100]).all()
    assert (again.band_DB == found.band_DB[:100]).all()


def test_the_share_of_equal_numbers_estimates_the_similarity() -> None:
    source = np.random.default_rng(0)
    pairs, similarities = [], []
    for cut in range(0, 1000, 20):
        words = [f"{word:x}" for word in source.integers(0, 1 << 40, 2000).tolist()]
        one, other = words[:1000], words[cut : cut + 1000]
        pairs += [" ".join(one), " ".join(other)]
        sets = shingles(pairs[-2], 5), shingles(pairs[-1], 5)
        similarities.append(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
    signature_DP = signatures(Texts.of(pairs), NearConfig(permutations=1024)).signature_DP
    errors = (signature_DP[::2] == signature_DP[1::2]).mean(axis=1) - similarities
    own = np.array(similarities)
    expected = np.sqrt(own * (1 - own) / 1024)
    assert abs(errors.mean()) < 3 * expected.mean() / np.sqrt(len(errors))
    assert (np.abs(errors) <= 4 * expected).all()


def test_signatures_stay_what_they_are() -> None:
    """An index that an earlier version began is gone on with: a new algorithm needs a new version of the stage."""
    text = (
        "The Annual Labour of every nation is the fund which originally supplies it with all the necessaries of life."
    )
    found = signatures(Texts.of([text, "Éa b"]), NearConfig())
    content = found.signature_DP.astype("<u2").tobytes() + found.band_DB.astype("<u8").tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == "495dc05e320e53ca"


@pytest.mark.parametrize(
    ("threshold", "permutations", "missed", "expected"),
    # As datasketch 2.0 chooses them with the weights (1 - missed, missed).
    [
        (0.8, 128, 0.5, (9, 13)),
        (0.5, 128, 0.5, (25, 5)),
        (0.7, 128, 0.5, (14, 9)),
        (0.9, 128, 0.5, (5, 25)),
        (0.8, 128, 0.95, (16, 8)),
        (0.5, 128, 0.95, (26, 3)),
        (0.7, 128, 0.95, (21, 6)),
        (0.9, 128, 0.95, (9, 14)),
    ],
)
def test_bands_are_those_of_datasketch(
    threshold: float, permutations: int, missed: float, expected: tuple[int, int]
) -> None:
    assert bands_and_rows(threshold, permutations, missed) == expected


@pytest.mark.parametrize("permutations", [2, 7, 64, 300])
def test_there_are_bands_for_any_number_of_permutations(permutations: int) -> None:
    for threshold in (0.01, 0.5, 0.99):
        bands, rows = bands_and_rows(threshold, permutations)
        assert 1 <= bands * rows <= permutations
        found = signatures(Texts.of(["a b c"]), NearConfig(threshold=threshold, permutations=permutations))
        assert found.band_DB.shape == (1, bands)
        assert all(one != other for one, other in pairwise(sorted(found.band_DB[0].tolist())))
