"""Which documents are near to one that was kept, by MinHash signatures of all kept ones on disk.

R documents that are asked for, P numbers of a signature, B bands.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tasks.corpus.minhash import NearConfig, Signatures
from tasks.corpus.runs import Runs

_BAND_DOCUMENTS = 64  # documents that a band leads to


class NearIndex:
    """The signatures of all documents kept so far, found by their bands. For one thread.

    A band leads to the first 64 documents that have it: those that share much of a page's surroundings are many, and
    comparing each with all would take forever. A near one is missed where all bands that it shares lead elsewhere.
    """

    def __init__(self, folder: Path, config: NearConfig, names: Sequence[str], documents: int) -> None:
        """Opens the index with what `save` told. Raises OSError or ValueError where files are gone or damaged."""
        self._bands = Runs(folder, "near", names)
        self._row_bytes = 2 * config.permutations
        self._least = math.ceil(round(config.threshold * config.permutations, 6))
        """The numbers that near documents have in common at least."""
        self.documents = documents
        """How many there are; each is known by its place among them."""
        path = folder / "signatures.bin"
        path.touch()
        if path.stat().st_size < documents * self._row_bytes:
            raise ValueError(f"{path} has fewer signatures than its index says")
        self._file = path.open("r+b")
        self._file.truncate(documents * self._row_bytes)
        self._file.seek(0, os.SEEK_END)

    def enter(self, near: Signatures, rows_R: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each of these documents of a batch is near to one before it; enters those that are not.

        Documents without words are near to none.
        """
        near_R = np.zeros(len(rows_R), np.bool_)
        worded = np.flatnonzero(near.has_words_D[rows_R])
        near_R[worded] = self._enter(near.signature_DP[rows_R[worded]], near.band_DB[rows_R[worded]])
        return near_R

    def _enter(self, signature_RP: NDArray[np.uint16], band_RB: NDArray[np.uint64]) -> NDArray[np.bool_]:
        query, known = self._bands.find(band_RB.ravel())
        near_R = self._near_known(signature_RP, query // band_RB.shape[1], known)
        known_RB = np.bincount(query, minlength=band_RB.size).reshape(band_RB.shape)
        buckets: dict[int, list[int]] = {}
        entered: list[int] = []
        keys: list[int] = []
        values: list[int] = []
        for row in np.flatnonzero(~near_R).tolist():
            bands = band_RB[row].tolist()
            others = sorted({other for band in bands for other in buckets.get(band, ())})
            if others and self._is_near(signature_RP[others], signature_RP[row]):
                near_R[row] = True
                continue
            for band, count in zip(bands, known_RB[row].tolist(), strict=True):
                bucket = buckets.setdefault(band, [])
                if count + len(bucket) < _BAND_DOCUMENTS:
                    bucket.append(row)
                    keys.append(band)
                    values.append(self.documents + len(entered))
            entered.append(row)
        self._bands.add(np.array(keys, np.uint64), np.array(values, np.uint64))
        self._file.write(signature_RP[entered].astype("<u2").tobytes())
        self._file.flush()
        self.documents += len(entered)
        return near_R

    def _near_known(
        self, signature_RP: NDArray[np.uint16], row_M: NDArray[np.int64], known_M: NDArray[np.uint64]
    ) -> NDArray[np.bool_]:
        """Whether each document is near to one of those that its bands lead to."""
        near_R = np.zeros(len(signature_RP), np.bool_)
        order = np.argsort(row_M, kind="stable")
        rows, begins = np.unique(row_M[order], return_index=True)
        for row, known in zip(rows.tolist(), np.split(known_M[order], begins[1:]), strict=False):
            near_R[row] = self._is_near(self._read(np.unique(known)), signature_RP[row])
        return near_R

    def _is_near(self, others_RP: NDArray[np.uint16], signature_P: NDArray[np.uint16]) -> bool:
        return bool((np.count_nonzero(others_RP == signature_P, axis=1) >= self._least).any())

    def _read(self, documents: NDArray[np.uint64]) -> NDArray[np.uint16]:
        descriptor, size = self._file.fileno(), self._row_bytes
        rows = b"".join(os.pread(descriptor, size, document * size) for document in documents.tolist())
        return np.frombuffer(rows, "<u2").reshape(len(documents), -1)

    def save(self) -> list[str]:
        """Forces everything entered onto the disk; gives the names of the files that lead to the signatures."""
        os.fsync(self._file.fileno())
        return self._bands.save()

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
