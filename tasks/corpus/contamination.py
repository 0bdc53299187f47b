"""Documents that share a run of words with the test rows of a benchmark.

D documents, H hashes of n-grams of the benchmarks, G n-grams of the documents.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from common.config import FrozenModel
from common.errors import UserError, suggestion
from common.files import canonical_json, sha256_bytes
from tasks.corpus.benchmarks import Benchmark, known_benchmarks
from tasks.corpus.text import Texts

_NONE = -1


class ContaminationConfig(FrozenModel):
    """Which benchmarks must not be in the documents."""

    benchmarks: tuple[str | Benchmark, ...] = Field(min_length=1)
    """Names of known benchmarks, such as `arc_easy`, or where to find others."""
    ngram: int = Field(default=13, gt=0)
    """Words in a row that a document must not share with a benchmark; 13 as for GPT-3 (Brown et al. 2020, appendix
    C). A text of a benchmark that has fewer words is not looked for."""

    @field_validator("benchmarks")
    @classmethod
    def _known(cls, benchmarks: tuple[str | Benchmark, ...]) -> tuple[str | Benchmark, ...]:
        for name in benchmarks:
            if isinstance(name, str) and name not in known_benchmarks():
                raise ValueError(f"there is no benchmark '{name}'{suggestion(name, known_benchmarks())}")
        return benchmarks

    @property
    def all(self) -> tuple[Benchmark, ...]:
        """The benchmarks, names replaced by what they stand for."""
        return tuple(known_benchmarks()[one] if isinstance(one, str) else one for one in self.benchmarks)


def resolved(config: ContaminationConfig) -> ContaminationConfig:
    """The config with names replaced by what they stand for, and with the digests of those that are on this machine.

    Raises UserError where one is not what its digest says.
    """
    return config.model_copy(update={"benchmarks": tuple(benchmark.resolved() for benchmark in config.all)})


class Contamination:
    """Looks for what documents share with benchmarks; any number of threads may ask.

    Words are compared as for GPT-3, without case, punctuation and the white space between them; here what is neither
    letter, digit nor mark separates words (see Texts.plain_words), so that the "role @-@ playing" of WikiText equals
    "role-playing". GPT-3 cut out what was found and kept the rest of a document; here the document is dropped. Each
    text of a row is compared on its own, so a run that goes over from a question into an answer is not found, and
    nothing is found of texts with fewer words than the n-gram has.

    N-grams are compared by 64-bit hashes: one that is not of a benchmark is taken for one with a probability of H /
    2^64, which for a million n-grams of benchmarks and a trillion words of documents makes 0.05 documents in all.
    """

    def __init__(self, config: ContaminationConfig) -> None:
        """Reads the benchmarks.

        Raises UserError where one cannot be read or is not what its digest says, or no text of any is long enough.
        """
        self._ngram = config.ngram
        self._described = []
        hashes, numbers = [], []
        for number, benchmark in enumerate(resolved(config).all):
            texts = benchmark.texts()
            words = Texts.of(texts).plain_words
            hash_G, _ = words.ngrams(config.ngram)
            hashes.append(np.unique(hash_G))
            numbers.append(np.full(len(hashes[-1]), number, np.int16))
            self._described.append(
                {
                    "benchmark": benchmark.title,
                    "texts": len(texts),
                    "compared": int((words.count_D >= config.ngram).sum()),
                    "sha256": sha256_bytes(canonical_json(texts)),
                }
            )
        # The first benchmark of those that share an n-gram is the one that counts.
        self._hash_H, first = np.unique(np.concatenate(hashes), return_index=True)
        self._number_H = np.concatenate(numbers)[first]
        if not len(self._hash_H):
            raise UserError(
                f"contamination: no text of {', '.join(self.names)} has {config.ngram} words; take a smaller ngram"
            )
        self._shift = np.uint64(64 - max(10, (16 * len(self._hash_H)).bit_length()))
        self._may_be = np.zeros(1 << (64 - int(self._shift)), np.bool_)
        """For the first bits of a hash, whether any n-gram of a benchmark has them."""
        self._may_be[self._hash_H >> self._shift] = True

    @property
    def names(self) -> tuple[str, ...]:
        """What the benchmarks are called, in the config's order."""
        return tuple(str(own["benchmark"]) for own in self._described)

    @property
    def described(self) -> list[dict[str, Any]]:
        """Of each benchmark its texts, how many of them are long enough, and their SHA-256."""
        return [dict(own) for own in self._described]

    def matches(self, texts: Texts) -> NDArray[np.int16]:
        """The number of the first benchmark that each document shares an n-gram with, −1 where there is none."""
        hash_G, first_G = texts.plain_words.ngrams(self._ngram)
        # Nearly all n-grams are told apart by a look into a small table.
        candidates = np.flatnonzero(self._may_be[hash_G >> self._shift])
        place = np.minimum(np.searchsorted(self._hash_H, hash_G[candidates]), len(self._hash_H) - 1)
        hit = self._hash_H[place] == hash_G[candidates]
        number_D = np.full(len(texts), len(self._described), np.int16)
        np.minimum.at(number_D, texts.plain_words.document_W[first_G[candidates[hit]]], self._number_H[place[hit]])
        return np.where(number_D < len(self._described), number_D, np.int16(_NONE))

    def passes(self, texts: Texts) -> NDArray[np.bool_]:
        """Whether each document shares no n-gram with any of them."""
        return np.equal(self.matches(texts), _NONE)
