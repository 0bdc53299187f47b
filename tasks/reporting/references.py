"""What was published of other models, with its sources, for a report to set beside what was measured here."""

import datetime
from functools import cache
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import Field, TypeAdapter, model_validator

from common.config import FrozenModel

REFERENCES = Path(__file__).parent / "references.yaml"
_PERPLEXITIES = frozenset({"perplexity", "word_perplexity"})
_ONE_OF = {
    "accuracy": frozenset({"acc", "acc_norm"}),
    "perplexity": frozenset({"word_perplexity", "token_perplexity"}),
}
"""What a source may mean that does not say which."""


class Source(FrozenModel):
    """Where something was published."""

    title: str = Field(min_length=1)
    """What it is called."""
    url: str = Field(pattern=r"^https://[^\s<>|\\]+$")
    """Where it is."""
    accessed: datetime.date
    """When it was read."""


class ReferenceScore(FrozenModel):
    """One published number."""

    task: str = Field(min_length=1)
    """lm-eval's name of the task."""
    metric: Literal["acc", "acc_norm", "accuracy", "word_perplexity", "perplexity"]
    """lm-eval's name of the metric; `accuracy` or `perplexity` where the source does not say which of several."""
    value: float = Field(gt=0, allow_inf_nan=False)
    """The number; accuracies are shares of 1."""
    few_shot: int | None = Field(default=None, ge=0)
    """Worked examples that stood before each question; null where the source does not say."""

    @model_validator(mode="after")
    def _an_accuracy_is_a_share(self) -> Self:
        if self.metric not in _PERPLEXITIES and self.value >= 1:
            raise ValueError(f"an accuracy is a share of 1, not a percentage (given: {self.value:g})")
        return self

    def may_be(self, metric: str) -> bool:
        """Whether it is this metric, as far as its source says."""
        return metric == self.metric or metric in _ONE_OF.get(self.metric, ())


class Reference(FrozenModel):
    """What one source says of one model."""

    model: str = Field(min_length=1)
    """The model's name."""
    parameters: int = Field(gt=0)
    """How many parameters it has."""
    protocol: str | None = None
    """How it was measured, in a few words; null where nothing is said."""
    source: Source
    """Where it was published."""
    scores: tuple[ReferenceScore, ...] = Field(min_length=1)
    """What was published."""


@cache
def references() -> tuple[Reference, ...]:
    """All that is kept of what was published, in the order of the file."""
    return TypeAdapter(tuple[Reference, ...]).validate_python(yaml.safe_load(REFERENCES.read_text(encoding="utf-8")))


def reference_scores(task: str, metric: str) -> tuple[tuple[str, ReferenceScore, Source], ...]:
    """What was published for a metric of a task: the model, the score and its source.

    A score whose source does not say which accuracy or perplexity it means comes with each that it may be.
    """
    return tuple(
        (one.model, score, one.source)
        for one in references()
        for score in one.scores
        if score.task == task and score.may_be(metric)
    )
