"""What a growth did, out of a history."""

import math

from tasks.growth_record import SAME_LOSS, GrowthRecord, growth_phrase, growths
from tasks.history import Entry, Grown, History, Loss, Trained


def trained(*losses: float, every: int = 10, parameters: int = 8, first: int = 1, **changes: object) -> Trained:
    """A training whose validations begin with that of step `first · every`."""
    validation = tuple(Loss(step=number * every, loss=loss) for number, loss in enumerate(losses, first))
    values = {
        "parameters": parameters,
        "steps": 20,
        "tokens": 100,
        "flops": 100.0 * parameters,
        "measured_on": "rows",
        "validation": validation,
        **changes,
    }
    return Trained.model_validate(values)


def grown(operator: str = "stack × 2", state: str | None = "copy") -> Grown:
    return Grown(operator=operator, parameters_before=8, parameters=16, optimizer_state=state)


def only(*history: Entry) -> GrowthRecord:
    (found,) = growths(history)
    return found


def test_losses_and_costs_stand_before_and_after() -> None:
    found = only(trained(4.0, 3.0), grown(), trained(3.6, 3.2, 2.9, first=0, parameters=16))
    assert found.operator == "stack × 2"
    assert found.optimizer_state == "copy"
    assert (found.parameters_before, found.parameters_after) == (8, 16)
    assert (found.flops_per_token_before, found.flops_per_token_after) == (8, 16)
    assert (found.flops_before, found.flops_after) == (800, 2400)
    assert (found.loss_before, found.loss_right_after, found.loss_at_end) == (3.0, 3.6, 2.9)
    assert (found.steps_until_back, found.validated_every) == (20, 10)
    assert found.note is None
    assert growth_phrase(found) == "grown by stack × 2: loss 3.0000 → 3.6000, back after 20 steps"


def test_a_loss_that_never_comes_back_is_said() -> None:
    found = only(trained(3.0), grown(), trained(3.6, 3.2, first=0))
    assert found.steps_until_back is None
    assert growth_phrase(found).endswith("3.0000 → 3.6000, back never")


def test_a_growth_that_keeps_the_function_is_back_at_once() -> None:
    found = only(trained(3.0), grown("zero × 2"), trained(3.0 + SAME_LOSS / 2, 3.2, first=0))
    assert found.steps_until_back == 0
    assert growth_phrase(found).endswith("back at once")


def test_losses_on_other_rows_are_not_compared() -> None:
    for before, reason in (
        (trained(3.0, measured_on="others"), "the loss before the growth was measured on other rows"),
        (trained(measured_on=None), "the loss before the growth was not measured"),
    ):
        found = only(before, grown(), trained(2.0, 1.9, first=0))
        assert (found.loss_before, found.steps_until_back, found.note) == (None, None, reason)
        assert found.loss_right_after == 2.0
        assert growth_phrase(found) == "grown by stack × 2: loss — → 2.0000"


def test_what_was_not_measured_after_it_is_null() -> None:
    found = only(trained(3.0), grown(), trained(measured_on=None))
    assert (found.loss_right_after, found.loss_at_end, found.validated_every) == (None, None, None)
    # What preference tuning minimises is none of these losses.
    found = only(trained(3.0), grown(), trained(0.7, 0.2, first=0, measured_on=None))
    assert (found.loss_right_after, found.loss_at_end, found.validated_every) == (None, None, None)
    found = only(trained(3.0), grown(), trained(2.5, 2.4))
    assert (found.loss_right_after, found.steps_until_back) == (None, 10)


def test_rounds_have_a_record_each_and_count_all_training() -> None:
    history: History = (
        trained(4.0),
        trained(3.5),
        grown(),
        trained(3.6, 3.0, first=0),
        grown("zero × 2"),
        trained(3.0, 2.5, first=0),
        trained(2.4),
    )
    first, second = growths(history)
    assert (first.flops_before, first.flops_after, first.loss_before) == (1600, 2400, 3.5)
    assert (second.flops_before, second.flops_after, second.loss_before) == (2400, 3200, 3.0)
    assert (first.loss_at_end, second.loss_at_end) == (3.0, 2.5)


def test_growths_one_upon_the_other_are_one() -> None:
    found = only(trained(3.0), grown("stack × 2"), grown("width × 2", "copy-momentum"), trained(2.0, first=0))
    assert (found.operator, found.optimizer_state) == ("stack × 2 + width × 2", "copy-momentum")
    assert only(trained(3.0), grown(), grown(state="reset"), trained(2.0)).optimizer_state == "reset"
    assert only(trained(3.0), grown(), grown(state=None), trained(2.0)).optimizer_state is None
    assert only(trained(3.0), grown(), trained(2.0, fresh_optimizer=True)).optimizer_state == "reset"


def test_a_growth_that_nothing_follows_or_precedes_has_no_record() -> None:
    assert growths((trained(3.0), grown())) == []
    assert growths((grown(), trained(3.0))) == []
    assert growths(()) == []


def test_losses_without_end_are_told() -> None:
    found = only(trained(3.0), grown(), trained(math.inf, math.nan, 2.0, first=0))
    assert found.steps_until_back == 20
    assert GrowthRecord.model_validate_json(found.model_dump_json()) == found
