"""What the loop tells while it runs, and what it ends with."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from models.preference import PreferenceFigures
from models.training.state import RunState, TaskScore, ValidationRecord


@dataclass(frozen=True)
class Progress:
    """How far training is and how fast, some times a second at most."""

    step: int
    """Steps done."""
    steps: int
    loss: float
    """Mean over the steps since the last logged one."""
    gradient_norm: float
    """Of the last step, before clipping."""
    learning_rate_scale: float
    tokens_per_second: float
    """Positions that went through the model, padding included, while training; validation is not counted."""
    flops_per_second: float
    mfu: float | None
    """Model FLOP/s as a fraction of the device's peak; None where the peak is unknown."""
    eta_seconds: float
    elapsed_seconds: float
    """Over all starts of the run."""
    skipped: int
    """Steps so far whose loss or gradient was not finite."""
    preferences: PreferenceFigures | None = None
    """In preference tuning, means over the same steps as the loss."""


@dataclass(frozen=True)
class Sample:
    """A generated continuation, as text where the loop was given a decoder, else as token ids."""

    prompt: str
    continuation: str
    expected: str | None
    """What the validation row goes on with; None where the whole row counts and so nothing in it is the answer."""


@dataclass(frozen=True)
class Validation:
    """What a validation measured."""

    step: int
    loss: float
    exact_match: float | None
    """Fraction of rows that were generated exactly; None where none were."""
    samples: tuple[Sample, ...]
    by_source: Mapping[str, float] = field(default_factory=dict)
    """The loss on each source by its name, where there are several."""
    preferences: PreferenceFigures | None = None
    """In preference tuning, what else was measured."""
    tasks: tuple[TaskScore, ...] = ()
    """The scores of the tasks that were asked."""


@dataclass(frozen=True)
class Note:
    """A sentence for people."""

    text: str


Event = Progress | Validation | Note


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended. The weights are in the engine."""

    state: RunState
    stopped_early: bool
    loss: float | None
    """Mean training loss over the last logged steps; None where this start took no step."""
    tokens: int
    """Positions over all steps."""
    flops: float
    """Training FLOPs over all steps, as `models.training.flops` counts them."""
    resumed_from: int | None
    """The step of the checkpoint that this start went on from."""
    other_engines: tuple[str, ...]
    """The engines beside this one that took steps of the run, over all its starts."""

    @property
    def best(self) -> ValidationRecord | None:
        """The validation with the lowest loss."""
        return self.state.best
