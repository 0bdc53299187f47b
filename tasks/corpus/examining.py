"""What can be said of documents one by one: rules, benchmarks, hashes.

D documents of a batch, S of them that the rules keep.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.corpus.batching import Batch
from tasks.corpus.config import Config
from tasks.corpus.contamination import Contamination
from tasks.corpus.duplicates import Fingerprints, fingerprints
from tasks.corpus.sources import text_sizes
from tasks.corpus.splitting import Fractions, text_hashes
from tasks.corpus.text import Texts

if TYPE_CHECKING:
    import pyarrow as pa

KEPT = -1
ALONE_BYTES = 4 << 20
"""A batch of more text, which has a long document, is examined while no other such one is: that takes much memory."""


@dataclass(frozen=True)
class Examined:
    """What can be said of the documents of a batch one by one."""

    batch: Batch
    size_D: NDArray[np.int64]
    """Bytes of each document."""
    rule_D: NDArray[np.int16]
    """The number of the rule, or of the benchmark after them, that drops each document; KEPT for none."""
    kept: "pa.Table"
    """The documents that are kept so far."""
    prints: Fingerprints | None
    """Their fingerprints, where duplicates are looked for."""
    split_S: NDArray[np.int8] | None
    """Their splits (indices into SPLITS), where the hash decides."""


class Examiner:
    """Looks at batches; any number of threads may, since it changes nothing."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._contamination = Contamination(config.contamination) if config.contamination else None
        self._alone = Lock()
        self._columns = list(config.document_columns)

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """What the benchmarks are called that documents are compared with."""
        return self._contamination.names if self._contamination else ()

    @property
    def compared_with(self) -> list[dict[str, Any]]:
        """Of each benchmark its texts, how many of them are long enough to be compared, and their SHA-256."""
        return self._contamination.described if self._contamination else []

    def examine(self, batch: Batch) -> Examined:
        """Applies the rules, and finds the hashes that splits and duplicates go by."""
        if not batch.table.num_rows:
            # It has come for what was refused, maybe before any column was known.
            return Examined(batch, np.empty(0, np.int64), np.empty(0, np.int16), batch.table, None, None)
        size_D = text_sizes(batch.table)
        with self._alone if size_D.sum() > ALONE_BYTES else nullcontext():
            return self._examined(batch, size_D)

    def _examined(self, batch: Batch, size_D: NDArray[np.int64]) -> Examined:
        config = self._config
        texts = Texts(batch.table)
        rule_D = np.full(len(texts), KEPT, np.int16)
        for number, rule in enumerate(config.rules):
            rule_D[(rule_D == KEPT) & ~rule.passes(texts)] = number
        if self._contamination is not None:
            match_D = self._contamination.matches(texts)
            rule_D = np.where((rule_D == KEPT) & (match_D >= 0), match_D + len(config.rules), rule_D)
        kept_D = rule_D == KEPT
        kept = texts if kept_D.all() else Texts(batch.table.filter(kept_D))
        prints = fingerprints(kept, config.duplicates) if config.duplicates else None
        split_S = None
        if isinstance(config.split, Fractions):
            split_S = config.split.splits(prints.hash_D if prints else text_hashes(kept.table))
        return Examined(batch, size_D, rule_D, kept.table.select(self._columns), prints, split_S)
