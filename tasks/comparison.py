"""What models cost and came to, side by side, from their histories; and what growth saved or cost against a control.

A control is a model of the same number of parameters that had one training, from fresh weights. In the middle of its
schedule its losses are higher than they would be had it ended there, so its loss with as many FLOPs is known only where
it ends with them. The FLOPs that it takes to a loss are interpolated in straight lines between its validations.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pydantic import ConfigDict

from common.config import FrozenModel
from common.errors import UserError
from tasks.growth_record import GrowthRecord, growths
from tasks.history import Grown, History, Trained, trained_flops, trained_tokens


class Point(FrozenModel):
    """A validation."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    flops: float
    """Training FLOPs so far, those of earlier stages included."""
    loss: float
    """Mean cross-entropy in nats."""


class Phase(FrozenModel):
    """The validations of one training."""

    after_growth: bool
    """Whether the model grew right before it."""
    points: tuple[Point, ...]
    """In order."""


class AgainstControl(FrozenModel):
    """A grown model against models of its size from scratch."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    control: str | None
    """The control that ends with as many FLOPs, to within a step; null where none does."""
    loss_at_equal_flops: float | None
    """Its loss in the end."""
    difference: float | None
    """The grown model's loss less that: negative where growth paid."""
    flops_for_same_loss: float | None
    """The fewest FLOPs with which a control had the grown model's loss; null where none came to it. Those of its first
    validation are an upper bound, and have no ratio."""
    flops_at_most: float
    """The most FLOPs that a control had."""
    ratio: float | None
    """FLOPs of the grown model as a fraction of `flops_for_same_loss`; null where these are not known."""


class Compared(FrozenModel):
    """A model of a comparison."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    name: str
    """What its stage is called."""
    parameters: int
    """Parameters, tied ones counted once."""
    flops: float
    """FLOPs of all its training. Growth is copying and counts none; neither does validation."""
    tokens: int
    """Positions that all its training went through."""
    loss: float
    """Its validation loss in the end."""
    growths: tuple[GrowthRecord, ...]
    """What it grew by, in order."""
    phases: tuple[Phase, ...]
    """Its trainings, those that were validated on the same rows as in the end."""
    against: AgainstControl | None
    """What growth saved or cost; null for a model that never grew, where there is no control, and where its loss is
    not finite."""


class _Measured(NamedTuple):
    """A model, and where its losses are from."""

    model: Compared
    measured_on: str
    step_flops: float
    """FLOPs of its last training's steps, each."""
    from_scratch: bool
    """Whether it had one training, from fresh weights."""


def compare(histories: Sequence[tuple[str, History]]) -> list[Compared]:
    """The models by name, in order, each against its controls.

    Raises UserError for one that was not validated in the end, and for two that were on different rows.
    """
    measured = [_measured(name, history) for name, history in histories]
    for other in measured[1:]:
        if other.measured_on != measured[0].measured_on:
            raise UserError(
                f"the losses of '{measured[0].model.name}' and '{other.model.name}' were measured on different rows "
                f"and cannot be compared: give both the same tokens and shares, sequence_length, packing, "
                f"document_masking and validation.rows"
            )
    return [one.model.model_copy(update={"against": _against(one, measured)}) for one in measured]


def _measured(name: str, history: History) -> _Measured:
    last = history[-1] if history else None
    if not isinstance(last, Trained):
        raise UserError(f"'{name}' was not trained after it grew: compare models that were")
    if last.measured_on is None and last.validation:
        raise UserError(
            f"'{name}' was tuned on preferences, whose loss is none of tokens: compare the model before that"
        )
    if last.measured_on is None or not last.validation:
        raise UserError(f"'{name}' has no validation loss: set training.validation of its stage")
    model = Compared(
        name=name,
        parameters=last.parameters,
        flops=trained_flops(history),
        tokens=trained_tokens(history),
        loss=last.validation[-1].loss,
        growths=tuple(growths(history)),
        phases=tuple(_phases(history, last.measured_on)),
        against=None,
    )
    return _Measured(model, last.measured_on, last.flops / last.steps, len(history) == 1)


def _phases(history: History, measured_on: str) -> Iterable[Phase]:
    before, grew = 0.0, False
    for entry in history:
        if isinstance(entry, Grown):
            grew = True
            continue
        if entry.measured_on == measured_on:
            step_flops = entry.flops / entry.steps
            points = [Point(flops=before + one.step * step_flops, loss=one.loss) for one in entry.validation]
            yield Phase(after_growth=grew, points=tuple(points))
        before, grew = before + entry.flops, False


def _against(one: _Measured, others: Sequence[_Measured]) -> AgainstControl | None:
    model = one.model
    controls = [other for other in others if other.from_scratch and other.model.parameters == model.parameters]
    if not model.growths or not controls or not math.isfinite(model.loss):
        return None
    # Controls take whole steps, and so end up to one before or after.
    ending = [
        control.model
        for control in controls
        if abs(control.model.flops - model.flops) < control.step_flops and math.isfinite(control.model.loss)
    ]
    nearest = min(ending, key=lambda control: abs(control.flops - model.flops), default=None)
    found = [reached for control in controls if (reached := _reached(_points(control.model), model.loss)) is not None]
    flops, exact = min(found, default=(None, False))
    return AgainstControl(
        control=None if nearest is None else nearest.name,
        loss_at_equal_flops=None if nearest is None else nearest.loss,
        difference=None if nearest is None else model.loss - nearest.loss,
        flops_for_same_loss=flops,
        flops_at_most=max(control.model.flops for control in controls),
        ratio=model.flops / flops if flops is not None and exact else None,
    )


def _points(model: Compared) -> list[Point]:
    """The validations of a model with a finite loss, in order."""
    return [point for phase in model.phases for point in phase.points if math.isfinite(point.loss)]


def _reached(points: Sequence[Point], loss: float) -> tuple[float, bool] | None:
    """The FLOPs at which the loss was first as low, between the validations around it, and whether that is known: at
    the first validation it may have been so for long. None where it never was."""
    after = next((number for number, point in enumerate(points) if point.loss <= loss), None)
    if after is None:
        return None
    if after == 0:
        return points[0].flops, False
    before, behind = points[after - 1], points[after]
    part = (before.loss - loss) / (before.loss - behind.loss)
    return before.flops + (behind.flops - before.flops) * part, True


def lowest(models: Sequence[Compared]) -> Compared | None:
    """The model with the lowest loss in the end; None where none is finite."""
    finite = [model for model in models if math.isfinite(model.loss)]
    return min(finite, key=lambda model: model.loss, default=None)


def flops_text(flops: float) -> str:
    """A number of FLOPs, short: 1.54e18."""
    mantissa, _, exponent = f"{flops:.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def verdict(model: Compared) -> str | None:
    """What growth saved or cost, in a sentence; None where there is no control."""
    against = model.against
    if against is None:
        return None
    said = f"{model.name}: loss {model.loss:.4f} with {flops_text(model.flops)} FLOPs; "
    if against.flops_for_same_loss is None:
        said += f"from scratch it is not reached with {flops_text(against.flops_at_most)}"
    elif against.ratio is None:
        said += (
            f"from scratch it takes at most {flops_text(against.flops_for_same_loss)}, the first that were validated"
        )
    else:
        said += (
            f"from scratch it takes {flops_text(against.flops_for_same_loss)}: growth took {against.ratio:.1%} of them"
        )
    if against.loss_at_equal_flops is not None and against.difference is not None:
        more = "less" if against.difference < 0 else "more"
        said += (
            f"; from scratch the same FLOPs give {against.loss_at_equal_flops:.4f}: growth has "
            f"{abs(against.difference):.4f} {more}"
        )
    return said
