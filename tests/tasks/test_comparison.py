"""Models side by side, from histories and from real small runs."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from tasks.compare import COMPARISON_PICTURE, REPORT
from tasks.comparison import Compared, compare, flops_text, lowest, verdict
from tasks.comparison_picture import _styles, draw_comparison
from tasks.growth_record import growths
from tasks.history import Grown, History, Loss, Trained, read_history
from tests.tasks.conftest import RunStage
from tests.tasks.training_stages import TOKENIZER, pretraining


def trained(flops: float, *losses: float, parameters: int = 16, first: int = 1, measured_on: str = "rows") -> Trained:
    """A training of ten steps to each validation."""
    validation = tuple(Loss(step=10 * number, loss=loss) for number, loss in enumerate(losses, first))
    return Trained(
        parameters=parameters,
        steps=10 * (len(losses) - 1 + first),
        tokens=100,
        flops=flops,
        measured_on=measured_on,
        validation=validation,
    )


GROWN = Grown(operator="stack × 2", parameters_before=8, parameters=16, optimizer_state="copy")
BASE = trained(400.0, 5.0, 4.0, parameters=8)
REFINED: History = (BASE, GROWN, trained(600.0, 4.5, 3.5, 3.0, first=0))


def compared(*histories: History) -> list[Compared]:
    names = [*"abcdefghijklmnopqrstuvwxyz", *(f"a{number}" for number in range(26))]
    return compare(list(zip(names, histories, strict=False)))


def test_flops_are_those_of_all_training() -> None:
    (found,) = compared(REFINED)
    assert (found.flops, found.tokens, found.parameters, found.loss) == (1000, 200, 16, 3.0)
    assert [phase.after_growth for phase in found.phases] == [False, True]
    points = [[(point.flops, point.loss) for point in phase.points] for phase in found.phases]
    assert points == [[(200, 5.0), (400, 4.0)], [(400, 4.5), (700, 3.5), (1000, 3.0)]]
    assert found.growths == tuple(growths(REFINED))
    assert found.against is None
    assert verdict(found) is None


def test_growth_that_paid() -> None:
    # One ends with 1,000 FLOPs at 3.5, the other has 3.0 half-way between 1,500 and 2,000.
    equal: History = (trained(1000.0, 4.5, 3.5),)
    longer: History = (trained(2000.0, 4.5, 3.6, 3.2, 2.8),)
    found, other, _ = compared(REFINED, equal, longer)
    assert other.against is None
    assert found.against is not None
    assert found.against.control == "b"
    assert found.against.loss_at_equal_flops == pytest.approx(3.5)
    assert found.against.difference == pytest.approx(-0.5)
    assert found.against.flops_for_same_loss == pytest.approx(1750)
    assert found.against.ratio == pytest.approx(1000 / 1750)
    assert verdict(found) == (
        "a: loss 3.0000 with 1.00e3 FLOPs; from scratch it takes 1.75e3: growth took 57.1% of them; from scratch the "
        "same FLOPs give 3.5000: growth has 0.5000 less"
    )


def test_a_control_that_ends_much_later_says_nothing_of_equal_flops() -> None:
    # In the middle of its plateau it has not decayed yet.
    found, _ = compared(REFINED, (trained(1540.0, 4.0, 3.8, 3.7, 2.9),))
    assert found.against is not None
    assert (found.against.control, found.against.loss_at_equal_flops, found.against.difference) == (None, None, None)
    assert found.against.ratio is not None
    assert "the same FLOPs" not in str(verdict(found))


def test_what_the_first_validation_has_is_an_upper_bound() -> None:
    found, _ = compared(REFINED, (trained(1540.0, 2.9),))
    assert found.against is not None
    assert (found.against.flops_for_same_loss, found.against.ratio) == (1540, None)
    assert verdict(found) == (
        "a: loss 3.0000 with 1.00e3 FLOPs; from scratch it takes at most 1.54e3, the first that were validated"
    )
    # Another that is known to take less.
    found = compared(REFINED, (trained(1540.0, 2.9),), (trained(1000.0, 3.5, 2.5),))[0]
    assert found.against is not None
    assert found.against.flops_for_same_loss == pytest.approx(750)
    assert found.against.ratio == pytest.approx(1000 / 750)


def test_a_model_that_was_trained_on_is_no_control() -> None:
    first, second = trained(500.0, 4.5, 4.0), trained(500.0, 3.9, 3.2, first=0)
    found, other = compared(REFINED, (first, second))
    assert (found.against, other.against) == (None, None)
    found = compared(REFINED, (first, second), (trained(1000.0, 4.0, 3.6),))[0]
    assert found.against is not None
    assert (found.against.control, found.against.flops_for_same_loss) == ("c", None)


def test_growth_that_cost() -> None:
    found, _ = compared(REFINED, (trained(1000.0, 3.5, 2.5),))
    assert found.against is not None
    assert found.against.ratio == pytest.approx(1000 / 750)
    assert found.against.difference == pytest.approx(0.5)
    assert "growth took 133.3% of them" in str(verdict(found))
    assert "0.5000 more" in str(verdict(found))


def test_a_loss_that_no_control_reaches_is_said() -> None:
    found, _ = compared(REFINED, (trained(1500.0, 4.0, 3.5, 3.1),))
    assert found.against is not None
    assert (found.against.flops_for_same_loss, found.against.ratio) == (None, None)
    assert found.against.flops_at_most == 1500
    assert "from scratch it is not reached with 1.50e3" in str(verdict(found))


def test_of_several_controls_that_which_ends_nearest_is_taken_and_the_best_of_all() -> None:
    # The longer one has not decayed yet where the shorter one ends.
    short: History = (trained(1000.0, 4.0, 3.2),)
    long: History = (trained(2000.0, 4.5, 4.0, 3.9, 2.9),)
    found = compared(REFINED, long, short)[0]
    assert found.against is not None
    assert found.against.control == "c"
    assert found.against.loss_at_equal_flops == 3.2
    assert found.against.flops_for_same_loss == pytest.approx(1950)


def test_a_control_may_end_less_than_a_step_before() -> None:
    almost: History = (trained(960.0, 4.0, 3.2),)  # 48 FLOPs a step
    found = compared(REFINED, almost)[0]
    assert found.against is not None
    assert found.against.loss_at_equal_flops == 3.2
    found = compared(REFINED, (trained(950.0, 4.0, 3.2),))[0]  # 47.5
    assert found.against is not None
    assert (found.against.control, found.against.loss_at_equal_flops, found.against.difference) == (None, None, None)


def test_models_of_another_size_are_no_controls() -> None:
    found = compared(REFINED, (trained(1000.0, 4.0, 3.2, parameters=12),))[0]
    assert found.against is None


def test_losses_that_are_not_finite_are_passed_over() -> None:
    found = compared(REFINED, (trained(2000.0, math.nan, 4.0, math.inf, 3.0),))[0]
    assert found.against is not None
    assert found.against.flops_for_same_loss == 2000
    found = compared(REFINED, (trained(1000.0, 4.0, math.nan),))[0]
    assert found.against is not None
    assert (found.against.control, found.against.flops_for_same_loss) == (None, None)
    bad: History = (BASE, GROWN, trained(600.0, 4.5, math.nan, first=0))
    control: History = (trained(1000.0, 4.0, 3.2),)
    found, other = compared(bad, control)
    assert found.against is None
    assert math.isnan(Compared.model_validate_json(found.model_dump_json()).loss)
    assert lowest([found, other]) == other
    assert lowest([found]) is None
    assert drawn(draw_comparison([found, other]), "#202124") > 100


def test_what_was_measured_on_other_rows_is_not_compared() -> None:
    other: History = (trained(1000.0, 4.0, 3.2, measured_on="others"),)
    with pytest.raises(UserError, match=r"losses of 'a' and 'b' were measured on different rows .* give both"):
        compared(REFINED, other)
    # The base may have been: its points are left out.
    (found,) = compared((trained(400.0, 5.0, measured_on="others"), *REFINED[1:]))
    assert [phase.after_growth for phase in found.phases] == [True]
    assert found.phases[0].points[0].flops == 400


def test_what_has_no_loss_is_refused() -> None:
    with pytest.raises(UserError, match="'a' was not trained after it grew"):
        compared((BASE, GROWN))
    with pytest.raises(UserError, match="'a' was not trained"):
        compared(())
    with pytest.raises(UserError, match="'a' was tuned on preferences, whose loss is none of tokens"):
        compared((BASE.model_copy(update={"measured_on": None}),))
    unmeasured = BASE.model_copy(update={"measured_on": None, "validation": ()})
    with pytest.raises(UserError, match=r"'a' has no validation loss: set training\.validation"):
        compared((unmeasured,))


def test_flops_are_written_short() -> None:
    assert [flops_text(number) for number in (0, 1, 1234.5, 9.999e17)] == ["0.00e0", "1.00e0", "1.23e3", "1.00e18"]


def pixels(picture: bytes) -> Any:
    from matplotlib.image import imread

    return (imread(io.BytesIO(picture))[..., :3] * 255).round().astype(int)


def drawn(picture: bytes, colour: str) -> int:
    """How many pixels have a colour, as it is or almost."""
    wanted = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)])
    return int((np.abs(pixels(picture) - wanted).max(-1) < 3).sum())


def test_the_picture_has_a_line_for_each_model() -> None:
    blue, orange, black, grey = "#4c78a8", "#e4572e", "#202124", "#9aa0a6"
    other: History = (*REFINED[:2], trained(600.0, 4.0, 3.2, 2.8, first=0))
    control: History = (trained(1500.0, 4.5, 3.4, 2.9),)
    alone = draw_comparison(compared(REFINED))
    assert drawn(alone, blue) > 1000
    assert drawn(alone, black) == 0
    assert drawn(alone, grey) == 0
    picture = draw_comparison(compared(REFINED, other, control), "growth")
    # The base is both models'.
    assert min(drawn(picture, colour) for colour in (blue, orange, black, grey)) > 300
    assert drawn(picture, blue) < drawn(alone, blue)


def test_five_models_that_never_grew_have_lines_of_their_own() -> None:
    styles = _styles(compared(*[(trained(1000.0, 4.0, 3.5),)] * 5))
    assert len({style["linestyle"] for style in styles}) == 5


def test_the_picture_holds_many_models() -> None:
    many = [(*REFINED[:2], trained(600.0, 4.0 + one / 50, 3.2, 3.0 + one / 99, first=0)) for one in range(40)]
    tall, wide = pixels(draw_comparison(compared(*many), "many")).shape[:2]
    assert 500 < tall < 2000
    assert 1000 < wide < 3000


def test_real_runs_are_compared(run_stage: RunStage) -> None:
    tokenizer, _ = run_stage("tokenizer", TOKENIZER)
    source = {"kind": "arithmetic", "maximum": 99, "train": 80, "validation": 9, "test": 3}
    documents, _ = run_stage("documents", {"source": source})
    tokens, _ = run_stage("tokens", {}, documents=documents, tokenizer=tokenizer)
    config = pretraining(steps=8, validation={"every": 2})
    training = {key: config[key] for key in ("training",)}
    base, _ = run_stage("pretrain", config, tokens=tokens)
    stacked, _ = run_stage("stack", {}, model=base)
    refined, metrics = run_stage("refine", training, model=stacked, tokens=tokens)
    growth = metrics["growth"]
    history = read_history(refined)
    assert [one.step for one in history[-1].validation] == [0, 2, 4, 6, 8]  # type: ignore[union-attr]
    assert [record["step"] for record in metrics["validation"]] == [0, 2, 4, 6, 8]
    assert growth["loss_before"] == history[0].validation[-1].loss  # type: ignore[union-attr]
    assert growth["loss_right_after"] == metrics["validation"][0]["loss"]
    assert growth["loss_at_end"] == metrics["validation"][-1]["loss"]
    assert growth["validated_every"] == 2
    assert growth["flops_after"] == pytest.approx(growth["flops_before"] + metrics["flops"])
    assert metrics["summary"].count("grown by stack") == 1
    deep = {**config, "model": {**config["model"], "num_hidden_layers": 2}}
    scratch, control_metrics = run_stage("pretrain", deep, tokens=tokens)
    assert "growth" not in control_metrics
    names = ["grown", "control"]
    output, metrics = run_stage("compare", {"names": names}, **{"models.0": refined, "models.1": scratch})
    report = json.loads((output / REPORT).read_bytes())
    assert [row["name"] for row in report] == names
    assert [Compared.model_validate(row) for row in report] == compare(
        [("grown", history), ("control", read_history(scratch))]
    )
    assert [row["loss"] for row in metrics["models"]] == [row["loss"] for row in report]
    # It ends long before the grown model's FLOPs.
    assert report[0]["against"]["control"] is None
    picture = (output.parent / "logs" / COMPARISON_PICTURE).read_bytes()
    assert drawn(picture, "#4c78a8") > 500
    assert sorted(path.name for path in output.iterdir()) == [REPORT]


def test_training_without_validation_has_a_growth_without_losses(run_stage: RunStage) -> None:
    tokenizer, _ = run_stage("tokenizer", TOKENIZER)
    documents, _ = run_stage("documents", {"source": {"kind": "arithmetic", "train": 80, "validation": 9, "test": 3}})
    tokens, _ = run_stage("tokens", {}, documents=documents, tokenizer=tokenizer)
    config = pretraining(steps=2)
    base, _ = run_stage("pretrain", config, tokens=tokens)
    stacked, _ = run_stage("stack", {"optimizer_state": "reset"}, model=base)
    refined, metrics = run_stage("refine", {"training": config["training"]}, model=stacked, tokens=tokens)
    growth = metrics["growth"]
    assert (growth["loss_before"], growth["loss_right_after"], growth["loss_at_end"]) == (None, None, None)
    assert growth["optimizer_state"] == "reset"
    assert metrics["notes"] == ["the loss before the growth was not measured"]
    # What is refined once more grew before.
    _, metrics = run_stage("refine", {"training": config["training"]}, model=refined, tokens=tokens)
    assert "growth" not in metrics
    with pytest.raises(UserError, match="has no validation loss"):
        run_stage("compare", {"names": ["refined"]}, models=Path(refined))
