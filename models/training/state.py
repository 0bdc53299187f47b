"""What a training run knows of itself: everything that a checkpoint needs beside weights and moments."""

import json
import math
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict

from common.config import FrozenModel
from models.preference import PreferenceFigures
from models.training.config import EarlyStoppingConfig


@dataclass(frozen=True)
class TaskScore:
    """What a model's answers to a task of lm-eval are worth."""

    task: str
    metric: str
    """What of it is measured, such as `acc`."""
    value: float
    """The share of right answers."""
    standard_error: float | None
    """None of a single answer."""
    n: int
    """Documents that were asked."""
    chance: float | None
    """What guessing gives; None where that is not known."""


class ValidationRecord(FrozenModel):
    """One validation. A loss may be infinite or NaN, which JSON has no numbers for."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    step: int
    loss: float
    exact_match: float | None = None
    by_source: tuple[float, ...] = ()
    """The loss on each source, in their order, where there are several."""
    preferences: PreferenceFigures | None = None
    """In preference tuning, what else was measured."""
    tasks: tuple[TaskScore, ...] = ()
    """The scores of the tasks that were asked."""


class RunState(FrozenModel):
    """A run between two steps. All decisions of the loop are functions of it, so a resumed run takes the same ones."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    step: int = 0
    """Steps done."""
    skipped: int = 0
    """Steps whose loss or gradient was not finite."""
    skipped_in_row: int = 0
    """Such steps since the last good one."""
    validations: tuple[ValidationRecord, ...] = ()
    """All validations so far."""
    seconds: float = 0.0
    """Time spent, over all starts of the run."""
    engines: tuple[str, ...] = ()
    """The engines that it was trained with, in the order in which they came."""

    @property
    def best(self) -> ValidationRecord | None:
        """The first validation with the lowest loss; None where no loss was finite."""
        finite = [record for record in self.validations if math.isfinite(record.loss)]
        return min(finite, key=lambda record: record.loss, default=None)

    @property
    def validated(self) -> bool:
        """Whether the weights as they are have been validated."""
        return bool(self.validations) and self.validations[-1].step == self.step

    @property
    def _trained(self) -> list[ValidationRecord]:
        """The validations of what training made. That of step 0 is of what came in, which nobody needs a checkpoint of,
        and which training may have to get worse than at first: where it warms up anew, say."""
        return [record for record in self.validations if record.step > 0]

    @property
    def score(self) -> float | None:
        """The validation loss of the weights as they are; None where it was not measured or is not finite, and for
        those that came in."""
        if not self.validated or self.step == 0 or not math.isfinite(self.validations[-1].loss):
            return None
        return self.validations[-1].loss

    def is_among_best(self, count: int) -> bool:
        """Whether the last validation is one of the `count` best since the first step."""
        losses = [record.loss for record in self._trained]
        if not losses or not math.isfinite(losses[-1]):
            return False
        return sum(loss <= losses[-1] for loss in losses[:-1]) < count

    def stops_early(self, config: EarlyStoppingConfig | None) -> bool:
        """Whether the last `patience` validations all failed to improve on the best before them since the first
        step."""
        if config is None:
            return False
        lowest, stale = math.inf, 0
        for record in self._trained:
            if record.loss < lowest - config.minimum_improvement or (lowest == math.inf and math.isfinite(record.loss)):
                lowest, stale = record.loss, 0
            else:
                stale += 1
        return stale >= config.patience

    def to_json(self) -> dict[str, Any]:
        """JSON values, from which `model_validate` makes an equal state."""
        values: dict[str, Any] = json.loads(self.model_dump_json())
        return values
