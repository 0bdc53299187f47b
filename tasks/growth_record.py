"""What the growths of a model did to its loss and its cost, read from its history."""

from collections.abc import Sequence
from itertools import groupby

from pydantic import ConfigDict

from common.config import FrozenModel
from tasks.history import Grown, History, Trained

SAME_LOSS = 1e-4
"""Nats within which a loss counts as back: engines and precisions differ by as much on the same weights."""


class GrowthRecord(FrozenModel):
    """A growth between two trainings. Losses are mean cross-entropies in nats on the validation rows."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    operator: str
    """How it grew; several operators one after the other are joined by a plus."""
    optimizer_state: str | None
    """What became of the moments: copy, copy-momentum or reset; null where it is not known."""
    parameters_before: int
    parameters_after: int
    flops_per_token_before: float
    """FLOPs that training takes for a token."""
    flops_per_token_after: float
    flops_before: float
    """FLOPs of all training up to the growth."""
    flops_after: float
    """FLOPs of all training up to the end of the refinement."""
    loss_before: float | None
    """At the end of the training before; null where that was measured on other rows, or not at all."""
    loss_right_after: float | None
    """Of the grown weights, before the first step of refinement; null where it was not measured."""
    loss_at_end: float | None
    """At the end of the refinement; null where it was not measured."""
    steps_until_back: int | None
    """Refinement steps at the first validation whose loss was that before or lower, to within `SAME_LOSS`; null for
    never, or where the loss before is not known."""
    validated_every: int | None
    """Steps between two validations of the refinement: how exactly `steps_until_back` is known."""
    note: str | None
    """Why the loss before is not known."""


def growths(history: History) -> list[GrowthRecord]:
    """A record of each growth that came between two trainings, in order."""
    runs = [list(entries) for _, entries in groupby(history, key=lambda entry: entry.kind)]
    found = []
    for number in range(1, len(runs) - 1):
        grown = [entry for entry in runs[number] if isinstance(entry, Grown)]
        before, after = runs[number - 1][-1], runs[number + 1][0]
        if grown and isinstance(before, Trained) and isinstance(after, Trained):
            flops = sum(entry.flops for run in runs[:number] for entry in run if isinstance(entry, Trained))
            found.append(_record(before, grown, after, flops))
    return found


def _record(before: Trained, grown: Sequence[Grown], after: Trained, flops: float) -> GrowthRecord:
    note = _incomparable(before, after)
    loss_before = before.validation[-1].loss if note is None else None
    # Those of preference tuning are no cross-entropies: they are measured on nothing that others are.
    validation = () if after.measured_on is None else after.validation
    start = [one.loss for one in validation if one.step == 0]
    back = [one.step for one in validation if loss_before is not None and one.loss <= loss_before + SAME_LOSS]
    steps = [one.step for one in validation]
    return GrowthRecord(
        operator=" + ".join(one.operator for one in grown),
        optimizer_state="reset" if after.fresh_optimizer else _optimizer_state(grown),
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        flops_per_token_before=before.flops / before.tokens,
        flops_per_token_after=after.flops / after.tokens,
        flops_before=flops,
        flops_after=flops + after.flops,
        loss_before=loss_before,
        loss_right_after=start[0] if start else None,
        loss_at_end=validation[-1].loss if validation else None,
        steps_until_back=back[0] if back else None,
        validated_every=steps[1] - steps[0] if len(steps) > 1 else None,
        note=note,
    )


def _incomparable(before: Trained, after: Trained) -> str | None:
    """Why the losses of two trainings cannot be compared."""
    if not before.validation:
        return "the loss before the growth was not measured"
    if before.measured_on is None or before.measured_on != after.measured_on:
        return "the loss before the growth was measured on other rows"
    return None


def _optimizer_state(grown: Sequence[Grown]) -> str | None:
    """What is left of the moments after several growths: what one of them drops, none brings back."""
    states = {one.optimizer_state for one in grown}
    return next((state for state in (None, "reset", "copy-momentum", "copy") if state in states), None)


def growth_phrase(record: GrowthRecord) -> str:
    """A growth in some words, for the line that says what a refinement did."""
    before = "—" if record.loss_before is None else f"{record.loss_before:.4f}"
    right_after = "—" if record.loss_right_after is None else f"{record.loss_right_after:.4f}"
    back = "" if record.loss_before is None else ", back " + _when(record)
    return f"grown by {record.operator}: loss {before} → {right_after}{back}"


def _when(record: GrowthRecord) -> str:
    if record.steps_until_back is None:
        return "never"
    return "at once" if record.steps_until_back == 0 else f"after {record.steps_until_back:,} steps"
