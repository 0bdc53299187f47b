"""Documents that are alike: equal ones by a hash of the text, near ones by MinHash, with the index on disk.

D documents.
"""

import hashlib
import sqlite3
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from common.config import FrozenModel
from tasks.corpus.text import Texts


class NearConfig(FrozenModel):
    """What counts as nearly the same document."""

    threshold: float = Field(default=0.8, gt=0, lt=1)
    """The Jaccard similarity of two documents' shingles from which on the later one is dropped."""
    ngram: int = Field(default=5, gt=0)
    """Words of a shingle."""
    permutations: int = Field(default=128, gt=1)
    """Numbers of a MinHash signature."""


class DuplicatesConfig(FrozenModel):
    """Which documents are dropped because an earlier one is like them."""

    exact: bool = True
    """Whether those with the same text are."""
    near: NearConfig | None = None
    """Whether those with nearly the same text are."""


class Fingerprints(NamedTuple):
    """What the index wants to know of a batch of documents."""

    digests_D: list[bytes]
    """The first 128 bits of the SHA-256 of each text in UTF-8."""

    @property
    def hash_D(self) -> NDArray[np.uint64]:
        """The first 64 of them as a little-endian number, for the splitter."""
        return np.frombuffer(b"".join(self.digests_D), "<u8")[::2]


class Novel(NamedTuple):
    """What became of a batch of documents."""

    kept_D: NDArray[np.bool_]
    """Candidates that nothing before them is like."""
    exact_D: NDArray[np.bool_]
    """Candidates that equal an earlier kept document."""
    near_D: NDArray[np.bool_]
    """Candidates that equal none and are near to one."""


def fingerprints(texts: Texts, config: DuplicatesConfig) -> Fingerprints:
    """The fingerprints of some documents; a pure function, for any thread."""
    found = texts.table["text"].to_pylist()
    return Fingerprints([hashlib.sha256(text.encode()).digest()[:16] for text in found])


class DuplicateIndex:
    """The fingerprints of all documents kept so far, in a folder, and its user's state beside them.

    For one thread. What was entered since the last commit is gone when the process dies.
    """

    def __init__(self, folder: Path, config: DuplicatesConfig) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._config = config
        self._database = sqlite3.connect(folder / "duplicates.sqlite", isolation_level=None)
        self._database.execute("CREATE TABLE IF NOT EXISTS state (id INTEGER PRIMARY KEY, state BLOB)")
        self._database.execute("CREATE TABLE IF NOT EXISTS exact (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def novel(self, prints: Fingerprints, candidates_D: NDArray[np.bool_]) -> Novel:
        """Enters the candidates that are like no kept document before them, in order."""
        kept_D = candidates_D.copy()
        if self._config.exact:
            for document in np.flatnonzero(candidates_D):
                done = self._database.execute("INSERT OR IGNORE INTO exact VALUES (?)", [prints.digests_D[document]])
                kept_D[document] = done.rowcount == 1
        return Novel(kept_D, candidates_D & ~kept_D, np.zeros_like(kept_D))

    def state(self) -> bytes | None:
        """What the last commit was given; None before the first."""
        row = self._database.execute("SELECT state FROM state").fetchone()
        return bytes(row[0]) if row else None

    def commit(self, state: bytes) -> None:
        """Makes everything entered durable, together with `state`."""
        self._database.execute("INSERT OR REPLACE INTO state VALUES (0, ?)", [state])
        self._database.execute("COMMIT")
        self._database.execute("BEGIN")

    def close(self) -> None:
        """Closes the files; what was not committed is forgotten."""
        self._database.close()
