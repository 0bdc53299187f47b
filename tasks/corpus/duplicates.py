"""Documents that are alike: equal ones by a hash of the text, near ones by MinHash, with the index on disk.

D documents.
"""

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.config import FrozenModel
from common.files import canonical_json, fsync_file, write_atomically
from tasks.corpus.minhash import NearConfig, Signatures, signatures
from tasks.corpus.near import NearIndex
from tasks.corpus.runs import Runs
from tasks.corpus.text import Texts

_MANIFEST = "index"


class DuplicatesConfig(FrozenModel):
    """Which documents are dropped because an earlier one is like them."""

    exact: bool = True
    """Whether those with the same text are."""
    near: NearConfig | None = None
    """Whether those with nearly the same text are; null for no."""


class Fingerprints(NamedTuple):
    """What the index wants to know of a batch of documents."""

    digest_D2: NDArray[np.uint64]
    """The first 128 bits of the SHA-256 of each text in UTF-8, as two little-endian numbers."""
    near: Signatures | None
    """Their MinHash, where near duplicates are looked for."""

    @property
    def hash_D(self) -> NDArray[np.uint64]:
        """The first 64 bits of the SHA-256 of each text."""
        return self.digest_D2[:, 0]


class Novel(NamedTuple):
    """What became of a batch of documents."""

    kept_D: NDArray[np.bool_]
    """Candidates that are like no kept document before them."""
    exact_D: NDArray[np.bool_]
    """Candidates that equal one."""
    near_D: NDArray[np.bool_]
    """Candidates that equal none and are near to one."""


def fingerprints(texts: Texts, config: DuplicatesConfig) -> Fingerprints:
    """The fingerprints of some documents; a pure function, for any thread.

    Raises UserError where near duplicates are looked for and rensa is not installed.
    """
    data = texts.data_N.data
    digests = [hashlib.sha256(data[begin : end - 1]).digest()[:16] for begin, end in pairwise(texts.begin_D1.tolist())]
    digest_D2 = np.frombuffer(b"".join(digests), "<u8").astype(np.uint64).reshape(len(texts), 2)
    return Fingerprints(digest_D2, signatures(texts, config.near) if config.near else None)


class DuplicateIndex:
    """What is remembered of all documents kept so far, in a folder, and its user's state beside it. For one thread.

    What was entered since the last commit is gone when the process dies. Memory does not grow with the documents. On
    disk each takes 16 bytes for exact duplicates, for near ones 2 for each permutation and 16 for each band, and half
    as much again while files are merged.
    """

    def __init__(self, folder: Path, config: DuplicatesConfig) -> None:
        """Opens the index as the last commit left it, or a new one.

        Raises ValueError where it is damaged or was made with another config, OSError where files are gone.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._config = folder, config
        self._state: bytes | None = None
        header: dict[str, Any] = {"config": config.model_dump(), "exact": [], "near": [], "documents": 0}
        if (folder / _MANIFEST).exists():
            line, _, self._state = (folder / _MANIFEST).read_bytes().partition(b"\n")
            header = json.loads(line)
            if header["config"] != config.model_dump():
                raise ValueError(f"{folder} is an index of other duplicates: {header['config']}")
        self._remove_others({*header["exact"], *header["near"]})
        self._exact = Runs(folder, "exact", header["exact"])
        self._near = NearIndex(folder, config.near, header["near"], header["documents"]) if config.near else None

    def novel(self, prints: Fingerprints, candidates_D: NDArray[np.bool_]) -> Novel:
        """Which candidates are like no kept document before them; enters those, in order.

        A document equals another when 128 bits of their SHA-256 do; it is near to one when their signatures agree in
        the share of the threshold. One that equals a document which was dropped as near is dropped as near itself.
        Raises OSError where the disk is full.
        """
        exact_D, near_D = np.zeros_like(candidates_D), np.zeros_like(candidates_D)
        first_D = candidates_D.copy()
        original_D = np.arange(len(candidates_D))
        if self._config.exact:
            self._find_equal(prints.digest_D2, candidates_D, exact_D, original_D)
            first_D &= ~exact_D & (original_D == np.arange(len(candidates_D)))
        if self._near is not None and prints.near is not None:
            rows = np.flatnonzero(first_D)
            near_D[rows] = self._near.enter(prints.near, rows)
        kept_D = first_D & ~near_D
        if self._config.exact:
            self._exact.add(prints.digest_D2[kept_D, 0], prints.digest_D2[kept_D, 1])
            copies_D = candidates_D & ~first_D
            near_D |= copies_D & near_D[original_D]
            exact_D = copies_D & ~near_D
        return Novel(kept_D, exact_D, near_D)

    def _find_equal(
        self,
        digest_D2: NDArray[np.uint64],
        candidates_D: NDArray[np.bool_],
        exact_D: NDArray[np.bool_],
        original_D: NDArray[np.int64],
    ) -> None:
        """Marks the candidates that equal an entered document, and finds for each the first of the batch like it."""
        rows = np.flatnonzero(candidates_D)
        query, second = self._exact.find(digest_D2[rows, 0])
        known = rows[query[second == digest_D2[rows[query], 1]]]
        exact_D[known] = True
        seen: dict[tuple[int, ...], int] = {}
        for row, digest in zip(rows.tolist(), digest_D2[rows].tolist(), strict=True):
            original_D[row] = seen.setdefault(tuple(digest), row)

    def state(self) -> bytes | None:
        """What the last commit was given; None before the first."""
        return self._state

    def commit(self, state: bytes) -> None:
        """Makes everything entered durable, together with `state`: all of it is found after a kill, or none."""
        exact = self._exact.save()
        near = self._near.save() if self._near else []
        documents = self._near.documents if self._near else 0
        header = {"config": self._config.model_dump(), "exact": exact, "near": near, "documents": documents}
        fsync_file(self._folder)
        write_atomically(self._folder / _MANIFEST, canonical_json(header) + b"\n" + state)
        self._state = state
        self._remove_others({*exact, *near})

    def close(self) -> None:
        """Closes the files; what was not committed is forgotten."""
        if self._near:
            self._near.close()

    def _remove_others(self, names: set[str]) -> None:
        """Removes the files that are not of the last commit."""
        for path in self._folder.glob("*-*.npy"):
            if path.name not in names:
                path.unlink()
        for path in self._folder.glob(".*.tmp"):
            path.unlink()
