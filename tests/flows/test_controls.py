"""Controls of growth and rounds of it: the stages that they stand for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.errors import UserError
from flows.controls import control_training
from flows.entry import StageEntry
from flows.recipe import known_recipes, load_recipe
from models.training.config import TrainingConfig
from models.training.flops import training_flops_per_token

CONTROL = "stages.refined.control"


def stages(name: str | Path, *overrides: str) -> dict[str, StageEntry]:
    return {entry.name: entry for entry in load_recipe(str(name), overrides).stages}


def training(entry: StageEntry) -> TrainingConfig:
    found = entry.config.training  # type: ignore[attr-defined]  # the caller knows that it trains
    assert isinstance(found, TrainingConfig)
    return found


def flops(*entries: StageEntry) -> float:
    """What a training costs, counted anew."""
    total = 0.0
    for entry in entries:
        one = training(entry)
        assert entry.model is not None
        positions = one.steps * one.batch_size * one.sequence_length
        total += positions * training_flops_per_token(entry.model, one.sequence_length)
    return total


def step_flops(entry: StageEntry) -> float:
    return flops(entry) / training(entry).steps


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A copy of arithmetic-tiny, for other stages in place of `stacked` and `refined`."""
    path = tmp_path / "rounds.yaml"
    path.write_text(known_recipes()["arithmetic-tiny"].read_text())
    return path


def rewrite(path: Path, changes: Mapping[str, Any], without: tuple[str, ...] = ()) -> Path:
    content = yaml.safe_load(path.read_text())
    found = content["stages"]
    names = list(found)
    last = {name: found.pop(name) for name in names[names.index("refined") + 1 :]}
    last = {name: keys for name, keys in last.items() if name not in changes}
    for name in without:
        del found[name]
    content["stages"] = {**found, **changes, **last}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def rounds(path: Path, **changes: Any) -> Path:
    """The recipe with two rounds of growth, called `refined`."""
    one = yaml.safe_load(path.read_text())["stages"]["refined"]
    grow = {
        "stage": "grow",
        "model": "base",
        "tokens": "tokens",
        "training": one["training"],
        "rounds": [{}, {"stack": {"method": "interleave"}, "refine": {"training": {**one["training"], "seed": 3}}}],
        **changes,
    }
    return rewrite(path, {"refined": grow}, ("stacked", "refined"))


def test_a_control_and_a_comparison_follow_their_refinement() -> None:
    assert list(stages("arithmetic-tiny")) == list(stages("arithmetic-tiny", f"{CONTROL}=null"))
    found = stages("arithmetic-tiny", f"{CONTROL}=scratch")
    assert list(found)[5:10] == ["base", "stacked", "refined", "refined-scratch", "refined-growth"]
    assert [found[name].stage for name in ("refined-scratch", "refined-growth")] == ["pretrain", "compare"]
    assert found["refined-growth"].inputs == {"models.0": "refined", "models.1": "refined-scratch"}
    assert found["refined-growth"].config.model_dump()["names"] == ("refined", "refined-scratch")
    assert found["refined-scratch"].inputs == {"tokens": "tokens"}


@pytest.mark.parametrize("steps", [1, 7, 40, 333])
@pytest.mark.parametrize("multiple", [1, 0.7, 1.54])
def test_a_control_trains_the_same_model_for_the_same_flops(steps: int, multiple: float) -> None:
    sets = (f"stages.base.training.steps={steps}", "stages.base.training.schedule={}")
    found = stages("arithmetic-tiny", *sets, f"{CONTROL}={{flops: {multiple}}}")
    name = {1: "refined-scratch", 0.7: "refined-scratch-0-7x", 1.54: "refined-scratch-1-54x"}[multiple]
    control = found[name]
    assert control.model == found["refined"].model
    wanted = multiple * flops(found["base"], found["refined"])
    assert abs(flops(control) - wanted) <= step_flops(control) / 2


def test_a_control_may_be_compared_elsewhere() -> None:
    found = stages("arithmetic-tiny", f"{CONTROL}={{compared: false}}")
    assert list(found)[7:10] == ["refined", "refined-scratch", "tuned"]


def test_several_multiples_have_a_control_each() -> None:
    found = stages("arithmetic-tiny", f"{CONTROL}={{flops: [1, 1.54, 2]}}")
    names = ["refined-scratch", "refined-scratch-1-54x", "refined-scratch-2x"]
    assert list(found)[8:12] == [*names, "refined-growth"]
    assert list(found["refined-growth"].inputs.values()) == ["refined", *names]
    assert training(found[names[2]]).steps == pytest.approx(2 * training(found[names[0]]).steps, abs=1)


def test_a_control_sees_the_same_batches_in_the_same_way() -> None:
    sets = (
        "stages.base.training.seed=5",
        "stages.base.training.optimizer.learning_rate=0.02",
        "stages.refined.training.seed=6",
        "stages.refined.precision=bfloat16",
        "stages.refined.tokens={tokens: 0.5}",
        "stages.refined.checkpoints.keep_last=7",
        "stages.refined.training.validation.every=7",
    )
    found = stages("arithmetic-tiny", *sets, f"{CONTROL}=scratch")
    base, refined, control = (found[name] for name in ("base", "refined", "refined-scratch"))
    assert (training(control).seed, training(control).optimizer) == (5, training(base).optimizer)
    same = ("batch_size", "sequence_length", "packing", "document_masking", "validation", "micro_batch_size")
    for key in same:
        assert getattr(training(control), key) == getattr(training(refined), key)
    assert control.config.precision == "bfloat16"  # type: ignore[attr-defined]
    assert control.config.blend == refined.config.blend != ()  # type: ignore[attr-defined]
    assert control.runtime == refined.runtime
    assert control.runtime.checkpoints.keep_last == 7


def test_the_same_shares_may_be_written_in_other_ways() -> None:
    sets = ("stages.base.tokens=[tokens, answers]", "stages.refined.tokens={answers: 0.3, tokens: 0.3}")
    assert "refined-scratch" in stages("arithmetic-tiny", *sets, f"{CONTROL}=scratch")


def test_preference_tuning_counts_its_reference(recipe: Path) -> None:
    content = yaml.safe_load(recipe.read_text())["stages"]
    tuned = {**content["base"]["training"], "packing": "pairs", "validation": {"every": 20}}
    preferring = {"stage": "dpo", "model": "base", "tokens": "tokens", "training": tuned}
    stacked, refined = {**content["stacked"], "model": "preferring"}, {**content["refined"], "control": "scratch"}
    found = stages(
        rewrite(recipe, {"preferring": preferring, "stacked": stacked, "refined": refined}, ("stacked", "refined"))
    )
    # Four passes to three.
    wanted = flops(found["base"], found["refined"]) + flops(found["preferring"]) * 4 / 3
    assert abs(flops(found["refined-scratch"]) - wanted) <= step_flops(found["refined-scratch"]) / 2


def run(steps: int, **schedule: Any) -> TrainingConfig:
    values = {"steps": steps, "batch_size": 4, "sequence_length": 8, "optimizer": {"learning_rate": 0.1}}
    return TrainingConfig.model_validate({**values, "schedule": schedule})


def test_a_control_warms_up_as_the_base_did_and_decays_as_the_refinement() -> None:
    base = run(100, name="wsd", warmup_steps=10, decay_steps=0)
    late = run(50, name="wsd", warmup_steps=2, decay_steps=40, floor=0.1)
    found = control_training(base, late, 75, 1.0).schedule
    assert (found.name, found.warmup_steps, found.decay_steps, found.floor) == ("wsd", 10, 40, 0.1)
    assert found.decay == "linear"
    falling = late.model_copy(update={"schedule": late.schedule.model_copy(update={"decay": "cosine"})})
    assert control_training(base, falling, 75, 1.0).schedule.decay == "cosine"
    found = control_training(base, late, 150, 2.0).schedule
    assert (found.warmup_steps, found.decay_steps) == (10, 80)
    found = control_training(base, run(50, warmup_steps=5, floor=0.1), 75, 1.0).schedule
    assert (found.name, found.warmup_steps, found.decay_steps, found.floor) == ("cosine", 10, None, 0.1)


@pytest.mark.parametrize("steps", [1, 5, 12, 49, 50])
def test_a_short_control_has_a_schedule_too(steps: int) -> None:
    base, late = run(100, name="wsd", warmup_steps=10, decay_steps=0), run(50, name="wsd", decay_steps=40)
    found = control_training(base, late, steps, 0.5).schedule
    assert found.warmup_steps == min(10, steps)
    assert found.decay_steps == min(20, steps - found.warmup_steps)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((f"{CONTROL}=scrach",), r"stages\.refined\.control: there is no control 'scrach'; give `scratch`"),
        ((f"{CONTROL}=true",), r"stages\.refined\.control: there is no control True"),
        ((f"{CONTROL}={{flop: 2}}",), r"stages\.refined\.control\.flop: there is no such key; did you mean 'flops'\?"),
        ((f"{CONTROL}={{flops: -1}}",), r"stages\.refined\.control\.flops\.0: input should be greater than 0"),
        ((f"{CONTROL}={{flops: []}}",), r"stages\.refined\.control\.flops: tuple should have at least 1 item"),
        ((f"{CONTROL}={{flops: [1, 1.0]}}",), r"stages\.refined\.control\.flops: names a multiple twice"),
        (
            (f"{CONTROL}={{flops: [1.0000001, 1.0000002]}}",),
            r"stages\.refined\.control\.flops: names a multiple twice, to six digits",
        ),
        (
            (f"{CONTROL}={{flops: 1e+20}}",),
            r"stages\.refined\.control\.flops\.0: input should be less than or equal to",
        ),
        ((f"{CONTROL}={{flops: many}}",), r"stages\.refined\.control\.flops\.0: input should be a valid number"),
        (("stages.base.control=scratch",), r"stages\.base\.control: there is no such key"),
        (
            (f"{CONTROL}=scratch", "stages.refined.model=base"),
            r"stages\.refined\.control: the model of this stage never grew",
        ),
        (
            (f"{CONTROL}=scratch", "stages.base.training.early_stopping={patience: 2}"),
            r"stages\.refined\.control: 'base' may stop early, .*; give 'base' training\.early_stopping: null, or",
        ),
        (
            (f"{CONTROL}=scratch", "stages.refined.training.early_stopping={patience: 2}"),
            r"stages\.refined\.control: 'refined' may stop early",
        ),
        (
            (f"{CONTROL}=scratch", "stages.refined.training.validation=null"),
            r"stages\.refined\.control: 'refined' has no training\.validation",
        ),
        (
            (f"{CONTROL}=scratch", "stages.refined.tokens=answers"),
            r"stages\.refined\.control: 'base' trains on other tokens or shares than 'refined', .* the same tokens, or",
        ),
        (
            (f"{CONTROL}=scratch", "stages.base.tokens=[tokens, answers]", "stages.refined.tokens=tokens"),
            r"stages\.refined\.control: 'base' trains on other tokens or shares than 'refined'",
        ),
        (
            (
                f"{CONTROL}=scratch",
                "stages.base.tokens=[tokens, answers]",
                "stages.refined.tokens={tokens: 0.6, answers: 0.4}",
            ),
            r"stages\.refined\.control: 'base' trains on other tokens or shares than 'refined'",
        ),
        (
            (f"{CONTROL}=scratch", "stages.refined.tokens={tokens: {epochs: 1}}"),
            r"stages\.refined\.control: 'refined' has a budget or epochs, .*; give 'refined' tokens without, or leave",
        ),
        (
            (f"{CONTROL}=scratch", "stages.base.tokens={tokens: {budget: 4000}}"),
            r"stages\.refined\.control: 'base' has a budget or epochs",
        ),
    ],
)
def test_what_is_wrong_with_a_control_is_said(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        load_recipe("arithmetic-tiny", overrides)
    assert "\n" not in str(refused.value)


def test_a_name_that_is_taken_is_refused(recipe: Path) -> None:
    rewrite(recipe, {"refined-growth": {"stage": "compare", "models": ["refined"]}})
    assert "refined-growth" in stages(recipe)
    with pytest.raises(UserError, match=r"stages\.refined\.control makes a stage 'refined-growth', which is there"):
        stages(recipe, f"{CONTROL}=scratch")


def test_rounds_are_a_stack_and_a_refinement_each(recipe: Path) -> None:
    found = stages(rounds(recipe))
    names = ["base", "refined-1-stacked", "refined-1-refined", "refined-2-stacked", "refined"]
    assert list(found)[5:10] == names
    assert [found[name].stage for name in names] == ["pretrain", "stack", "refine", "stack", "refine"]
    assert [found[name].inputs["model"] for name in names[1:]] == names[:-1]
    assert [entry.model.num_hidden_layers for entry in found.values() if entry.model] == [1, 2, 2, 4, 4, 4]
    assert [training(found[name]).seed for name in (names[2], names[4])] == [1, 3]
    assert found["refined-2-stacked"].config.model_dump()["method"] == "interleave"
    # What comes after names the last of them.
    assert found["tuned"].inputs["model"] == "refined"


@pytest.mark.parametrize(
    ("base", "shared", "own", "expected"),
    [
        (0, None, {}, [1, 2]),
        (42, 42, {}, [43, 44]),
        (0, 7, {}, [7, 8]),
        # What is written in a round stands, whatever it is.
        (0, None, {"seed": 0}, [1, 0]),
        (0, None, {"steps": 20}, [1, 2]),
    ],
)
def test_rounds_read_the_rows_in_orders_of_their_own(
    recipe: Path, base: int, shared: int | None, own: dict[str, Any], expected: list[int]
) -> None:
    training_keys = yaml_stage(recipe)["training"]
    second = {"refine": {"training": {**training_keys, **own}}} if own else {}
    rounds(recipe, rounds=[{}, second], control="scratch")
    written = (f"stages.refined.training.seed={shared}",) if shared is not None else ()
    found = stages(recipe, f"stages.base.training.seed={base}", *written)
    assert [training(found[name]).seed for name in ("refined-1-refined", "refined")] == expected
    assert training(found["refined-scratch"]).seed == base
    # A growth of what they made has another still.
    keys = yaml_stage(recipe)
    content = yaml.safe_load(recipe.read_text())
    content["stages"]["again"] = {**keys, "model": "refined", "rounds": [{}], "control": None}
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    found = stages(recipe, f"stages.base.training.seed={base}", *written)
    assert training(found["again"]).seed not in {base, *expected}


def test_the_control_of_rounds_counts_all_of_them(recipe: Path) -> None:
    found = stages(rounds(recipe, control={"flops": [1, 2]}))
    assert list(found)[9:13] == ["refined", "refined-scratch", "refined-scratch-2x", "refined-growth"]
    trained = [found[name] for name in ("base", "refined-1-refined", "refined")]
    control = found["refined-scratch"]
    assert abs(flops(control) - flops(*trained)) <= step_flops(control) / 2
    assert control.model == found["refined"].model
    # A round may have a control of its own.
    own = [{"refine": {"control": "scratch"}}, {}]
    found = stages(rewrite(recipe, {"refined": {**yaml_stage(recipe), "rounds": own}}), f"{CONTROL}=null")
    assert "refined-1-refined-scratch" in found
    assert "refined-scratch" not in found


def yaml_stage(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text())["stages"]["refined"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds=[]", r"stages\.refined\.rounds: list should have at least 1 item"),
        ("rounds=3", r"stages\.refined\.rounds: input should be a valid list"),
        ("rounds=null", r"stages\.refined\.rounds: input should be a valid list"),
        ("rounds=[3]", r"stages\.refined\.rounds\.0: "),
        ("rounds=[{stak: {}}]", r"stages\.refined\.rounds\.0\.stak: there is no such key; did you mean 'stack'\?"),
        ("rounds.1.stack.model=base", r"stages\.refined\.rounds\.1\.stack\.model: a round grows what came before it"),
        ("rounds.0.refine.stage=sft", r"stages\.refined\.rounds\.0\.refine\.stage: a round grows what came before it"),
        ("rounds.0.stack.factor=many", r"stages\.refined\.rounds\.0\.stack\.(config: )?factor"),
        ("rounds.1.stack.methud=zero", r"stages\.refined\.rounds\.1\.stack\.methud: there is no such key; did you"),
        ("rounds.1.refine.training.stepz=1", r"stages\.refined\.rounds\.1\.refine\.training\.stepz: there is no such"),
        ("training=3", r"stages\.refined\.training: input should be"),
        ("training.seed=[1]", r"stages\.refined\.training\.seed: input should be a valid integer"),
        ("training.stepz=1", r"stages\.refined\.training\.stepz: there is no such key; did you mean 'steps'\?"),
        ("tokens=tokenz", r"stages\.refined\.tokens: there is no stage 'tokenz' before 'refined'; did you mean"),
        ("tokens=null", r"stages\.refined\.tokens is missing"),
        ("model=bas", r"stages\.refined\.model: there is no stage 'bas' before 'refined'; did you mean 'base'\?"),
        ("model=null", r"stages\.refined\.model: input should be a valid string"),
        ("model=tokens", r"stages\.refined\.model: stage 'tokens' makes tokens, not model; use base"),
        ("retries=-1", r"stages\.refined\.retries: input should be greater than or equal to 0"),
        ("contrl=scratch", r"stages\.refined\.contrl: there is no such key; did you mean 'control'\?"),
        ("control={flop: 1}", r"stages\.refined\.control\.flop: there is no such key"),
        ("rounds.2.refine={}", r"there is no place 2 in a list of 2, counted from 0"),
        ("rounds.two.refine={}", r"'stages\.refined\.rounds' is a list, which has numbers from 0 and no keys"),
    ],
)
def test_what_is_wrong_with_rounds_is_named_where_it_is_written(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        stages(rounds(recipe), f"stages.refined.{override}")
    assert "\n" not in str(refused.value)


def test_rounds_do_not_take_names_that_are_there(recipe: Path) -> None:
    rewrite(rounds(recipe), {"refined-1-stacked": {"stage": "stack", "model": "base"}})
    with pytest.raises(UserError, match=r"stages\.refined makes a stage 'refined-1-stacked', which is there already"):
        stages(recipe)


def test_a_place_of_a_list_can_be_set(recipe: Path) -> None:
    rounds(recipe)
    found = stages(recipe, "stages.refined.rounds.1={stack: {factor: 3}}")
    assert found["refined"].model is not None
    assert found["refined"].model.num_hidden_layers == 6
    found = stages(recipe, "stages.refined.rounds.0.stack.factor=4")
    assert found["refined"].model is not None
    assert found["refined"].model.num_hidden_layers == 8


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], r"stages\.both\.models names no stage"),
        (["base", "base"], r"stages\.both\.models names a stage twice"),
        (["base", "tokens"], r"stages\.both\.models: stage 'tokens' makes tokens, not model"),
        ({"base": 1}, r"stages\.both\.models: there is no stage"),
        (None, r"stages\.both\.models is missing"),
    ],
)
def test_models_that_are_compared_are_a_list(recipe: Path, models: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        stages(rewrite(recipe, {"both": {"stage": "compare", "models": models}}))


def test_names_are_not_written_apart_from_the_models(recipe: Path) -> None:
    both = {"stage": "compare", "models": ["base"], "names": ["a"]}
    with pytest.raises(UserError, match=r"stages\.both\.names: the names are written where the artifacts are named"):
        stages(rewrite(recipe, {"both": both}))
    found = stages(rewrite(recipe, {"both": {"stage": "compare", "models": "base"}}))
    assert found["both"].config.model_dump()["names"] == ("base",)
