"""Two evaluations of the same task, pair by pair on the documents that both have been asked.

A paired test sees through what makes documents easy or hard for every model, and so tells smaller differences apart
than the two standard errors would (Miller, "Adding Error Bars to Evals", arXiv 2411.00640, section 4.2).

- Right or wrong: the exact test of McNemar, a two-sided binomial test on the documents that only one of the two got
  right (McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
  Psychometrika 12, 1947; exact as in Dietterich, "Approximate Statistical Tests for Comparing Supervised
  Classification Learning Algorithms", Neural Computation 10, 1998).
- Other measures: Student's t-test on the pairs' differences ("The probable error of a mean", Biometrika 6, 1908).

N documents that both evaluations have.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from common.config import FrozenModel
from tasks.scores import SAMPLES, Score, is_share

LEVEL = 0.01
"""The p below which a difference is called significant."""
INTERVAL = 1.96
"""Standard errors to either side that hold 95% of a normal distribution."""

IDENTITY, CATEGORY = "id", "category"
"""Columns of samples: which document it is, and which part of the task it belongs to."""
GROUP_COLON = ": "
"""What stands between the two names of a group that is one of several divisions, such as `digits: 3`."""

Floats = NDArray[np.float64]


class Difference(FrozenModel):
    """How far the first of two evaluations lies from the second in one score."""

    task: str
    """What was asked."""
    metric: str
    """What of it was measured."""
    group: str | None = None
    """The part of the task; null for the whole."""
    first: float
    """The mean of the first over the documents that both have."""
    second: float
    """That of the second."""
    difference: float
    """The first less the second."""
    standard_error: float = Field(ge=0)
    """The standard error of the difference, from the pairs."""
    p: float = Field(ge=0, le=1)
    """How probable a difference as large as this is where there is none, on either side."""
    n: int = Field(ge=2)
    """Documents that both have."""
    higher_is_better: bool = True
    """Whether more is better."""

    @property
    def is_share(self) -> bool:
        """Whether it is one of shares, which are written in per cent."""
        return is_share(self.first, self.higher_is_better)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the difference, by the normal distribution."""
        margin = INTERVAL * self.standard_error
        return self.difference - margin, self.difference + margin

    def significant(self, level: float = LEVEL) -> bool:
        """Whether chance alone would hardly give it."""
        return self.p < level

    def is_fall(self, level: float = LEVEL) -> bool:
        """Whether the first is significantly worse than the second."""
        worse = self.difference < 0 if self.higher_is_better else self.difference > 0
        return worse and self.significant(level)

    def is_rise(self, level: float = LEVEL) -> bool:
        """Whether the first is significantly better than the second."""
        return self.significant(level) and self.difference != 0 and not self.is_fall(level)


def differences(first: Path, second: Path, scores: Iterable[Score]) -> tuple[Difference, ...]:
    """The differences of two evaluations of one task, folders with `samples.parquet`, in those of `scores`, which are
    the first's, in which they can be compared."""
    found = (difference(first, second, score) for score in scores)
    return tuple(one for one in found if one is not None)


def difference(first: Path, second: Path, score: Score) -> Difference | None:
    """The difference of two evaluations in `score`, on the documents that both have by their `id`.

    None where it cannot be told: the metric is no column of both samples, there are none, or fewer than two documents
    with a finite measure are in common. A metric that is no mean over documents, such as a perplexity, is compared by
    what its documents were given.
    """
    columns = [_measured(folder, score) for folder in (first, second)]
    if any(column is None for column in columns):
        return None
    mine, theirs = (column or {} for column in columns)
    common = [identity for identity in mine if identity in theirs]
    pairs_N2 = np.array([(mine[identity], theirs[identity]) for identity in common], np.float64).reshape(-1, 2)
    pairs_N2 = pairs_N2[np.isfinite(pairs_N2).all(axis=1)]
    if len(pairs_N2) < 2:
        return None
    differences_N = pairs_N2[:, 0] - pairs_N2[:, 1]
    error = float(differences_N.std(ddof=1) / math.sqrt(len(differences_N)))
    return Difference(
        task=score.task,
        metric=score.metric,
        group=score.group,
        first=float(pairs_N2[:, 0].mean()),
        second=float(pairs_N2[:, 1].mean()),
        difference=float(differences_N.mean()),
        standard_error=error,
        p=_sign_test(differences_N) if np.isin(pairs_N2, (0, 1)).all() else _t_test(differences_N, error),
        n=len(differences_N),
        higher_is_better=score.higher_is_better,
    )


def _sign_test(differences_N: Floats) -> float:
    """The two-sided binomial test on the pairs that differ: of right and wrong, McNemar's exact test."""
    from scipy.stats import binomtest

    up, down = int((differences_N > 0).sum()), int((differences_N < 0).sum())
    return float(binomtest(up, up + down).pvalue) if up + down else 1.0


def _t_test(differences_N: Floats, error: float) -> float:
    """The two-sided t-test on the pairs' differences."""
    from scipy.stats import t

    # All pairs differ by the same, but for rounding: no spread to judge by, and their signs have to do.
    if error <= 1e-12 * float(np.abs(differences_N).max()):
        return _sign_test(differences_N)
    return float(2 * t.sf(abs(differences_N.mean()) / error, len(differences_N) - 1))


def _measured(folder: Path, score: Score) -> dict[tuple[Any, int], float] | None:
    """What each document was given, by its id; None where the samples do not say."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path = folder / SAMPLES
    if not path.is_file():
        return None
    known = pq.read_schema(path)
    column, value = _group(score, known.names)
    needed = {IDENTITY, score.metric, *([column] if column is not None else [])}
    if not needed <= set(known.names) or not _is_number(known.field(score.metric).type):
        return None
    table: Any = pq.read_table(path, columns=sorted(needed))
    if column is not None:
        table = table.filter(pc.equal(table[column].cast(pa.string()), value))
    identities = _counted(table[IDENTITY].to_pylist())
    return dict(zip(identities, table[score.metric].cast(pa.float64()).to_numpy().tolist(), strict=True))


def _group(score: Score, columns: Sequence[str]) -> tuple[str | None, str | None]:
    """The column by which the documents of a score's group are found, and what it says of them: `category`, or of a
    group `digits: 3` the column `digits`."""
    if score.group is None:
        return None, None
    name, colon, value = score.group.partition(GROUP_COLON)
    return (name, value) if colon and name in columns else (CATEGORY, score.group)


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _counted(identities: Sequence[Any]) -> list[tuple[Any, int]]:
    """The ids, each with how often it stood before: of a question that is asked twice, the first answers are a pair,
    and the second ones."""
    seen: Counter[Any] = Counter()
    found = []
    for identity in identities:
        found.append((identity, seen[identity]))
        seen[identity] += 1
    return found
