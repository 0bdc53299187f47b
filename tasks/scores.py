"""A score as every evaluation writes it, so that one report reads them all: what was measured, how sure it is, and
what guessing would give.

`results.json` of an evaluation has them under `scores`; `samples.parquet` has a row per document: `id`, which is the
same for every model, `prompt`, `target`, `prediction`, `correct` where there is a right and a wrong, and a column per
metric, by which two models are compared pair by pair: what the metric is of a document alone, of a perplexity its loss,
and better in the same direction. A metric that a document alone does not have, such as an F1, has no column.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, Self

import numpy as np
from pydantic import ConfigDict, Field

from common.config import FrozenModel

RESULTS, SAMPLES = "results.json", "samples.parquet"
NEAR = 2.0
"""Standard errors within which a score is no better than chance."""
NONE = "—"
"""What stands where nothing is known."""
_OF_95_PERCENT = NormalDist().inv_cdf(0.975)


def wilson(right: int, n: int, deviations: float = _OF_95_PERCENT) -> tuple[float, float]:
    """The interval of a share, `right` of `n` > 0, that has the shares from which it lies so many standard deviations
    away at most; by default those that has the true one in 95 of 100 cases (Wilson, 1927, doi
    10.1080/01621459.1927.10502953). Unlike the standard error, it says something where none or all are right (Brown,
    Cai & DasGupta, 2001)."""
    found, per = right / n, deviations**2 / n
    centre = (found + per / 2) / (1 + per)
    half = deviations / (1 + per) * math.sqrt(found * (1 - found) / n + per / (4 * n))
    # Rounding must not leave the share itself outside.
    return (max(0.0, centre - half) if right else 0.0), (min(1.0, centre + half) if right < n else 1.0)


def is_share(value: float | None, higher_is_better: bool) -> bool:
    """Whether a measure is a share of something, which is written in per cent: more is better, and it lies between 0
    and 1."""
    return higher_is_better and value is not None and 0 <= value <= 1


def figure(value: float | None, share: bool) -> str:
    """A number as people read it: per cent with a place behind the point, or four figures."""
    if value is None:
        return NONE
    if share:
        return f"{100 * value:.1f}%"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


class Score(FrozenModel):
    """One number that a model was given."""

    model_config = ConfigDict(allow_inf_nan=False)

    task: str
    """What was asked, such as `arc_easy`."""
    metric: str
    """What of it was measured, such as `acc_norm`: the column of `samples.parquet` that it is made of, if any."""
    group: str | None = None
    """The part of the task that it is of, such as a category; null for the whole."""
    value: float | None
    """The score; null where it is too large to be a number, or none."""
    standard_error: float | None = Field(default=None, ge=0)
    """Its standard error; null where none is known."""
    n: int = Field(ge=0)
    """Documents that it is of."""
    higher_is_better: bool = True
    """Whether more is better."""
    chance: float | None = None
    """What guessing gives; null where that is not known, as of answers that are written."""
    majority: float | None = None
    """What always giving the commonest answer gives; null where answers are not a choice, and where they stand in an
    order that tells the right one."""

    @property
    def near_chance(self) -> bool:
        """Whether it is within two standard errors of guessing, or worse: for a share of which all or none are right
        and that has no such error, within Wilson's interval of two deviations."""
        bounds = self._bounds()
        if bounds is None or self.chance is None:
            return False
        return bounds[0] <= self.chance if self.higher_is_better else bounds[1] >= self.chance

    @property
    def below_chance(self) -> bool:
        """Whether it is worse than guessing by more than that."""
        bounds = self._bounds()
        if bounds is None or self.chance is None:
            return False
        return bounds[1] < self.chance if self.higher_is_better else bounds[0] > self.chance

    def _bounds(self) -> tuple[float, float] | None:
        """What lies two standard errors to either side; None where that is not known."""
        if self.value is None:
            return None
        if self.is_share and self.value in (0, 1) and self.n:
            return wilson(round(self.value * self.n), self.n, NEAR)
        if self.standard_error is None:
            return None
        return self.value - NEAR * self.standard_error, self.value + NEAR * self.standard_error

    @property
    def is_share(self) -> bool:
        """Whether it is written in per cent."""
        return is_share(self.value, self.higher_is_better)

    @property
    def text(self) -> str:
        """It and its standard error, `31.2% ± 1.0`: in points of per cent where it is a share, else with two figures.
        `∞` where it is too large to be a number."""
        shown = self.figure(self.value)
        if self.value is None:
            return shown if self.higher_is_better else "∞"
        error = self.standard_error
        # One of nothing, of answers that are all right or all wrong, says that there are few, and not that it is sure.
        if not error:
            return shown
        whole = error >= 99.5  # which two figures would be a power of ten
        return f"{shown} ± " + (f"{100 * error:.1f}" if self.is_share else f"{error:,.0f}" if whole else f"{error:.2g}")

    def figure(self, value: float | None) -> str:
        """What it is held against, such as chance, in its own unit."""
        return figure(value, self.is_share)

    @classmethod
    def of(cls, dumped: Mapping[str, Any]) -> Self:
        """The score as `dumped` has written it."""
        return cls.model_validate({name: value for name, value in dumped.items() if name in cls.model_fields})

    def dumped(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**self.model_dump(mode="json"), "near_chance": self.near_chance}


def share(
    task: str, metric: str, values: Sequence[bool | float], *, group: str | None = None, chance: float | None = None
) -> Score:
    """The mean of what the documents were given, with the standard error of a mean."""
    found = np.asarray(values, np.float64)
    error = float(found.std(ddof=1) / math.sqrt(len(found))) if len(found) > 1 else None
    return Score(
        task=task,
        metric=metric,
        group=group,
        value=float(found.mean()) if len(found) else None,
        standard_error=error,
        n=len(found),
        chance=chance,
    )
