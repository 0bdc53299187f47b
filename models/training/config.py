"""What a training run is, apart from the model and the data."""

from typing import Literal, Self

from pydantic import Field, model_validator

from common.config import FrozenModel
from models.optimizer import OptimizerConfig

Packing = Literal["stream", "documents", "pairs", "whole"]


class ScheduleConfig(FrozenModel):
    """The learning rate over the steps, as a fraction of its peak."""

    name: Literal["cosine", "wsd"] = "cosine"
    """Warm-up then cosine, or warm-up, stable, then decay (WSD)."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up in equal parts; the first step already has one part. Each training stage has its own: for
    a model that comes in, one that was grown above all, this is how long the rate is warmed up anew."""
    decay_steps: int | None = Field(default=None, ge=0)
    """WSD's last steps, in which the rate falls; needed with wsd (0 for none), meaningless with cosine."""
    # Linear stands in no key: what was trained before there were others counts as it did.
    decay: Literal["linear", "cosine"] = Field(default="linear", exclude_if=lambda decay: decay == "linear")
    """How the rate falls in them: in equal parts, or as half a cosine."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """The rate at the end, as a fraction of the peak."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.name == "wsd") != (self.decay_steps is not None):
            raise ValueError("decay_steps belongs to wsd, which needs it")
        if self.name != "wsd" and self.decay != "linear":
            raise ValueError("decay belongs to wsd")
        return self


class TasksConfig(FrozenModel):
    """Tasks of lm-eval that are asked of a model while it trains."""

    names: tuple[str, ...] = Field(min_length=1)
    """Tasks whose score is a share of right answers, such as `arc_easy`."""
    limit: int | None = Field(default=100, gt=0)
    """Documents of each that are asked, the first ones; null for all."""
    every: int | None = Field(default=None, gt=0)
    """Steps between two askings, a multiple of those between two validations; null for each validation. The last step
    and a model that comes in are always asked."""
    harness: str | None = None
    """The version of lm-eval; null for the one that is installed, which then stands here."""
    data: dict[str, str] | None = None
    """What tells the contents of the tasks' data sets, digest or commit by id; null for those of now."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.names)) != len(self.names):
            raise ValueError("a task is named twice")
        return self

    def asks(self, step: int, last: int) -> bool:
        """Whether the validation after a step asks them."""
        return self.every is None or step % self.every == 0 or step == last


class ValidationConfig(FrozenModel):
    """What is measured while training, on the validation split above all."""

    every: int = Field(gt=0)
    """Steps between two validations; the last step always has one, and so does a model that comes in before its first
    step."""
    rows: int | None = Field(default=None, gt=0)
    """Rows of the validation split that the loss is taken over, the first ones in order; null for all."""
    exact_match_rows: int = Field(default=0, ge=0)
    """Rows whose first masked part is also generated greedily and compared, the first ones in order; with packing
    "whole", that of each of their documents."""
    samples: int = Field(default=0, ge=0)
    """Generated continuations that are logged as text at each validation."""
    # Without tasks it stands in no key: what was trained before there were any counts as it did.
    tasks: TasksConfig | None = Field(default=None, exclude_if=lambda tasks: tasks is None)
    """Tasks of lm-eval that are asked with it; null for none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        asked = None if self.tasks is None else self.tasks.every
        if asked is not None and asked % self.every:
            raise ValueError(f"tasks are asked with a validation: tasks.every {asked} is no multiple of {self.every}")
        return self


class Portion(FrozenModel):
    """How much of a blend comes from one of its sources."""

    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Share of the tokens, relative to the other sources' weights."""
    budget: int | None = Field(default=None, gt=0)
    """Tokens at most that are drawn from it over the whole run, after which the others share its place; null for any
    number. Counted in whole rows; one document to a row counts as the mean of the source's."""
    epochs: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Times at most that it is gone through, in the same way; null for any number."""


class EarlyStoppingConfig(FrozenModel):
    """When a run ends before its last step."""

    patience: int = Field(gt=0)
    """Validations in a row without improvement after which training stops; one before the first step does not count."""
    minimum_improvement: float = Field(default=0.0, ge=0)
    """How much lower the validation loss has to be to count as better."""


class TrainingConfig(FrozenModel):
    """One training run: everything that its weights depend on."""

    steps: int = Field(gt=0)
    """Optimizer steps."""
    batch_size: int = Field(gt=0)
    """Rows of the global batch of one step."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Rows that go through the model at once; null for the whole batch. It has to divide batch_size."""
    sequence_length: int = Field(gt=0)
    """Positions of a row: each predicts the token after it."""
    packing: Packing = "stream"
    """Rows cut from the stream of tokens; one document to a row, padded; that with a chosen and a rejected document
    side by side, for preference tuning (pairs); or whole documents to a row, as many as fit, each a context of its own
    as with document_masking, padded."""
    document_masking: bool = False
    """Whether attention stays inside a document and positions restart with each, in rows cut from the stream. What a
    document begins with is then no target, so generation needs a <bos> or a prompt."""
    optimizer: OptimizerConfig
    """The optimizer and its peak rates."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over the steps."""
    seed: int = 0
    """Keys the initial weights, the order of the data and dropout."""
    validation: ValidationConfig | None = None
    """What is measured on the validation split; null for nothing."""
    early_stopping: EarlyStoppingConfig | None = None
    """When to stop early; null for never. Needs validation."""
    skipped_steps_limit: int = Field(default=20, gt=0)
    """Non-finite steps in a row after which training stops with an error."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        if self.packing == "pairs":
            self._check_pairs()
        schedule = self.schedule
        if schedule.warmup_steps + (schedule.decay_steps or 0) > self.steps:
            raise ValueError(f"warm-up and decay together exceed the {self.steps} steps")
        if self.early_stopping is not None and self.validation is None:
            raise ValueError("early_stopping needs validation")
        return self

    def _check_pairs(self) -> None:
        rows = {"batch_size": self.batch_size, "micro_batch_size": self.micro_batch_size}
        if self.validation is not None:
            rows["validation.rows"] = self.validation.rows
            if self.validation.exact_match_rows:
                raise ValueError(
                    "pairs have no answer that is to be met exactly; leave validation.exact_match_rows out"
                )
        for name, number in rows.items():
            if number is not None and number % 2:
                raise ValueError(f"packing 'pairs' takes rows by two: {name} {number} has to be even")


class CheckpointConfig(FrozenModel):
    """How often and how many checkpoints are kept: no part of what is computed, so no part of a stage's key."""

    every_seconds: float = Field(default=30.0, ge=0)
    """Seconds between two checkpoints; 0 for one after every step."""
    keep_last: int = Field(default=2, ge=2)
    """Newest checkpoints kept: two at least, so that a damaged one has a predecessor."""
    keep_best: int = Field(default=1, ge=0)
    """Checkpoints kept of the lowest validation losses."""
