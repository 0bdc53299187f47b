"""Controls of growth: the same final architecture from scratch for the same FLOPs, and a comparison with it.

`control: scratch` on a refinement stands for two more stages after it: `<name>-scratch`, which trains the control, and
`<name>-growth`, which compares the two. `control: {flops: [1, 1.54]}` trains a control for each multiple of the FLOPs.
All that the grown model was trained on is one blend, without budgets: a control has the same from its first step on.
"""

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from common.config import FrozenModel
from common.errors import UserError
from flows.entry import StageEntry, chain, training_of, trainings
from flows.problems import first_problem
from flows.written import Written
from models.training.config import Portion, ScheduleConfig, TrainingConfig
from models.training.flops import training_flops_per_token
from tasks.stage import Runtime
from tasks.training import TrainingStageConfig

CONTROL, CONTROLLED = "control", "refine"
"""The key of a stage that asks for a control, and the kind of stage that has it."""


class Control(FrozenModel):
    """Controls of a growth."""

    flops: tuple[Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)], ...] = Field(default=(1.0,), min_length=1)
    """The FLOPs that each control trains for, as a multiple of those of the grown model's whole training; one or
    several, which differ in their first six digits."""
    compared: bool = True
    """Whether a comparison with the grown model follows: false for controls of a comparison of the recipe's own."""

    @field_validator("flops", mode="before")
    @classmethod
    def _one_is_several(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else [value]

    @field_validator("flops")
    @classmethod
    def _refuse_twice(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len({_short(multiple) for multiple in value}) != len(value):
            raise ValueError("names a multiple twice, to six digits")
        return value


def controls(refined: Written, entry: StageEntry, before: Mapping[str, StageEntry]) -> Iterator[Written]:
    """The stages that the control of a refinement stands for; none where it asks for none.

    `entry`: the refinement; `before`: all stages before it by name.

    Raises UserError where no model grew, where it is not validated, where FLOPs are not known before, and where its
    trainings had other data than one another.
    """
    control = _control(refined)
    if control is None:
        return
    where = refined.place(CONTROL)
    if not any(one.stage == "stack" for one in chain(entry, before)):
        raise UserError(f"{where}: the model of this stage never grew: a control is of what came of a stage `stack`")
    trained = list(trainings(entry, before))
    for one in trained:
        if training_of(one).early_stopping is not None:
            raise UserError(
                f"{where}: '{one.name}' may stop early, so nobody knows before for how many FLOPs its control has to "
                f"train; give '{one.name}' training.early_stopping: null, or leave the control out"
            )
    if training_of(entry).validation is None:
        raise UserError(f"{where}: '{entry.name}' has no training.validation, by which it is compared with its control")
    _check_data(where, entry, trained)
    total = sum(training_of(one).steps * _step_flops(one) for one in trained)
    names = [_name(entry.name, multiple) for multiple in control.flops]
    for name, multiple in zip(names, control.flops, strict=True):
        steps = max(1, round(multiple * total / _step_flops(entry)))
        training = control_training(training_of(trained[-1]), training_of(entry), steps, multiple)
        yield Written(name, _scratch(refined, entry, training), where)
    if control.compared:
        yield Written(f"{entry.name}-growth", {"stage": "compare", "models": [entry.name, *names]}, where)


def control_training(base: TrainingConfig, refined: TrainingConfig, steps: int, multiple: float) -> TrainingConfig:
    """How a control trains for so many steps, which cost `multiple` times the FLOPs of base and refinement together.

    What decides the rows is the refinement's: length, batch size, packing, masking, and validation, so that the losses
    can be compared. What decides how fresh weights begin is the base's: optimizer, seed, and warm-up, which is as long
    as it was there. The batches begin with the base's own and go on in its order, where it has the same data. How the
    rate falls is the refinement's: a cosine to its floor over the whole run, or a decay of the same shape and steps as
    there, which cost as much because the architecture is the same; of `multiple` times as many steps in a run of
    `multiple` times the FLOPs, and of as many as warm-up leaves.
    """
    warmup_steps, decay_steps = base.schedule.warmup_steps, refined.schedule.decay_steps
    if decay_steps is not None:
        decay_steps = max(0, min(round(multiple * decay_steps), steps - warmup_steps))
    schedule = ScheduleConfig(
        name=refined.schedule.name,
        warmup_steps=min(warmup_steps, steps),
        decay_steps=decay_steps,
        decay=refined.schedule.decay,
        floor=refined.schedule.floor,
    )
    own = {"steps": steps, "optimizer": base.optimizer, "schedule": schedule, "seed": base.seed}
    return TrainingConfig.model_validate({**dict(refined), **own})


def _control(refined: Written) -> Control | None:
    value = refined.keys.get(CONTROL)
    if value is None or value is False:
        return None
    if value == "scratch":
        return Control()
    where = refined.place(CONTROL)
    if not isinstance(value, dict):
        raise UserError(f"{where}: there is no control {value!r}; give `scratch`, or {{flops: 1.54}} for other FLOPs")
    try:
        return Control.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{where}.{first_problem(error, Control)}") from error


def _check_data(where: str, entry: StageEntry, trained: Sequence[StageEntry]) -> None:
    """Raises UserError where one training could not have the same data as those behind a model together."""
    otherwise = "leave the control out and write one of your own, a stage `pretrain` and a stage `compare`"
    for one in trained:
        if any(portion.budget is not None or portion.epochs is not None for portion in _portions(one).values()):
            raise UserError(
                f"{where}: '{one.name}' has a budget or epochs, which count for each training apart: a control would "
                f"have other shares than all of them together; give '{one.name}' tokens without, or {otherwise}"
            )
        if _shares(one) != _shares(entry):
            raise UserError(
                f"{where}: '{one.name}' trains on other tokens or shares than '{entry.name}', and a control on one "
                f"blend from first to last; give both the same tokens, or {otherwise}"
            )


def _shares(entry: StageEntry) -> dict[str, Fraction]:
    """The share of each of the tokens that a stage trains on, by the stage that made them."""
    weights = {source: Fraction(str(portion.weight)) for source, portion in _portions(entry).items()}
    return {source: weight / sum(weights.values()) for source, weight in weights.items()}


def _portions(entry: StageEntry) -> dict[str, Portion]:
    """How much a stage draws of each of its tokens, by the stage that made them."""
    assert isinstance(entry.config, TrainingStageConfig)
    sources = [source for key, source in entry.inputs.items() if key.partition(".")[0] == "tokens"]
    return dict(zip(sources, entry.config.blend or [Portion()] * len(sources), strict=True))


def _step_flops(entry: StageEntry) -> float:
    """Training FLOPs of a step, as the history of its model counts them."""
    assert entry.model is not None
    training = training_of(entry)
    tokens = training.batch_size * training.sequence_length
    return tokens * training_flops_per_token(entry.model, training.sequence_length, reference=entry.stage == "dpo")


def _name(name: str, multiple: float) -> str:
    """`refined-scratch`, or `refined-scratch-1-54x`: a stage's name has no dots."""
    return f"{name}-scratch" if multiple == 1 else f"{name}-scratch-{_short(multiple)}x".replace(".", "-")


def _short(multiple: float) -> str:
    """A multiple to six digits."""
    return f"{multiple:g}"


def _scratch(refined: Written, entry: StageEntry, training: TrainingConfig) -> dict[str, Any]:
    """The keys of a control's stage."""
    assert isinstance(entry.config, TrainingStageConfig)
    assert entry.model is not None
    return {
        "stage": "pretrain",
        "tokens": refined.keys["tokens"],
        "engine": entry.config.engine,
        "precision": entry.config.precision,
        "model": entry.model.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
        **{key: value for key, value in refined.keys.items() if key in Runtime.model_fields},
    }
