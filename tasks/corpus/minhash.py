"""Signatures by which nearly equal documents are found: MinHash over runs of words, cut into bands.

D documents, G shingles (n-grams of words), P permutations, B bands.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from common.config import FrozenModel
from common.errors import UserError
from tasks.corpus.text import Texts
from tasks.corpus.words import mix

_ALGORITHM = 2  # rensa's RMinHash.ALGORITHM_VERSION: other versions give other signatures
_SEED = 1
_NUMBERS_AT_ONCE = 1 << 18  # rensa gives them as Python's, of 45 bytes each
_MISSED = 0.95  # how much pairs that are missed weigh against pairs that are compared in vain, when bands are chosen
_STEP = np.uint64(0x9E3779B97F4A7C15)


class NearConfig(FrozenModel):
    """What counts as nearly the same document."""

    threshold: float = Field(default=0.8, gt=0, lt=1)
    """The Jaccard similarity of two documents' shingles, as their signatures tell it, from which on the later one is
    dropped."""
    ngram: int = Field(default=5, gt=0)
    """Words of a shingle; 5 as in FineWeb (Penedo et al. 2024, arXiv 2406.17557)."""
    permutations: int = Field(default=128, gt=1, le=4096)
    """Numbers of a signature: the estimate of a similarity s errs by about the root of s(1 − s) over this."""


class Signatures(NamedTuple):
    """What is compared of documents."""

    has_words_D: NDArray[np.bool_]
    """Whether there is anything to compare."""
    signature_DP: NDArray[np.uint16]
    """The lower halves of the MinHash: two that differ are taken for equal once in 65,536."""
    band_DB: NDArray[np.uint64]
    """A number for each band of the MinHash, which documents share that are equal in it."""


def signatures(texts: Texts, config: NearConfig) -> Signatures:
    """The signatures of some documents; a pure function, for any thread.

    A document's shingles are its runs of plain words (see Texts.plain_words: lower case, without punctuation), or all
    its words together where it has fewer. The MinHash is rensa's RMinHash over their 64-bit hashes. Raises UserError
    where rensa is not installed.
    """
    hash_G, begin_D1 = _shingles(texts, config.ngram)
    mixed_DP = _minhash(hash_G, begin_D1, config.permutations)
    bands, rows = bands_and_rows(config.threshold, config.permutations)
    parts_DBR = mixed_DP[:, : bands * rows].reshape(len(texts), bands, rows)
    band_DB = np.tile(np.arange(bands, dtype=np.uint64), (len(texts), 1))
    for row in range(rows):
        band_DB = mix(band_DB * _STEP + parts_DBR[:, :, row])
    return Signatures(np.diff(begin_D1) > 0, mixed_DP.astype(np.uint16), band_DB)


def _shingles(texts: Texts, ngram: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The hashes of the shingles of all documents, and where those of each begin and the last ones end."""
    words = texts.plain_words
    hash_G, first_G = words.ngrams(ngram)
    document_G = words.document_W[first_G]
    for size in range(1, ngram):
        short = np.flatnonzero(words.count_D == size)
        if len(short):
            own_G, own_first_G = words.ngrams(size)
            chosen = np.searchsorted(own_first_G, words.first_D1[short])
            hash_G, document_G = np.append(hash_G, own_G[chosen]), np.append(document_G, short)
    order = np.argsort(document_G, kind="stable") if len(document_G) and (np.diff(document_G) < 0).any() else None
    if order is not None:
        hash_G, document_G = hash_G[order], document_G[order]
    return hash_G, np.searchsorted(document_G, np.arange(len(texts) + 1))


def _minhash(hash_G: NDArray[np.uint64], begin_D1: NDArray[np.int64], permutations: int) -> NDArray[np.uint32]:
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise UserError("near duplicates are found with rensa, which is not installed: pip install rensa") from error
    if RMinHash.ALGORITHM_VERSION != _ALGORITHM:
        raise RuntimeError(f"rensa has another algorithm: {RMinHash.ALGORITHM_VERSION} instead of {_ALGORITHM}")
    minhash_DP = np.empty((len(begin_D1) - 1, permutations), np.uint32)
    step = max(1, _NUMBERS_AT_ONCE // permutations)
    for first in range(0, len(minhash_DP), step):
        part_D1 = begin_D1[first : first + step + 1]
        own_G, begin = hash_G[part_D1[0] : part_D1[-1]], (part_D1 - part_D1[0]).astype(np.uint64)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(own_G, begin, permutations, _SEED)
        minhash_DP[first : first + step] = matrix.to_rows()
    return minhash_DP


@cache
def bands_and_rows(threshold: float, permutations: int, missed: float = _MISSED) -> tuple[int, int]:
    """How many bands of how many rows a signature is cut into.

    Documents of similarity s share a band with probability 1 − (1 − s^rows)^bands. As datasketch does, of all cuts the
    one is taken for which the weighted sum of two areas under that curve is least: of pairs below the threshold that
    share one, and of pairs above it that share none. The latter weigh far more here, for whoever shares a band is
    compared by the whole signature.
    """
    cells = 1000
    similarity = (np.arange(cells) + 0.5) / cells
    below = similarity < threshold
    best = (np.inf, 1, 1)
    for bands in range(1, permutations + 1):
        for rows in range(1, permutations // bands + 1):
            none = (1 - similarity**rows) ** bands
            cost = ((1 - missed) * (1 - none[below]).sum() + missed * none[~below].sum()) / cells
            best = min(best, (float(cost), bands, rows))
    return best[1], best[2]
