"""What `plan` says of each stage, on a store that a real run made."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from artifacts.record import Record
from artifacts.store import Store
from flows.entry import StageEntry
from flows.plan import Step, plan, stage_ref, work_for
from flows.recipe import load_recipe
from tasks.produce import produce
from tasks.registry import STAGES
from tests.flows.conftest import RECIPE, after
from tests.flows.conftest import STAGES as STAGE_NAMES

Verdicts = dict[str, tuple[str, str]]


def planned(store: Path, *overrides: str) -> dict[str, Step]:
    return {step.entry.name: step for step in plan(load_recipe(RECIPE, overrides), Store.open(str(store)))}


def verdicts(steps: dict[str, Step]) -> dict[str, str]:
    return {name: step.verdict for name, step in steps.items()}


def expected(to_run: Sequence[str], waiting: Sequence[str]) -> dict[str, str]:
    return {name: "to run" if name in to_run else "waits" if name in waiting else "reused" for name in STAGE_NAMES}


def make(store: Path, entry: StageEntry, name: str, **inputs: Record) -> Record:
    """Makes a stage as a run would, under the name that a run would give it."""
    opened = Store.open(str(store))
    record = produce(opened, work_for(entry, inputs, opened), lambda event: None).record
    opened.set_name(stage_ref(RECIPE, name), record.key)
    return record


def found(steps: dict[str, Step], name: str) -> Record:
    record = steps[name].record
    assert record is not None
    return record


def test_nothing_was_ever_made(tmp_path: Path) -> None:
    steps = planned(tmp_path / "empty")
    assert verdicts(steps) == expected(["expressions", "questions"], STAGE_NAMES[2:])
    assert steps["expressions"].reason == steps["questions"].reason == "never made"
    assert steps["tokens"].reason == "its input 'expressions' will be made first"
    assert steps["expressions-before"].reason == "its input 'refined' will be made first"
    assert not (tmp_path / "empty").exists()


def test_all_is_reused(own_store: Path) -> None:
    steps = planned(own_store)
    assert verdicts(steps) == expected([], [])
    for step in steps.values():
        assert step.record is not None
        assert step.reason == f"made {step.record.ended:%Y-%m-%d %H:%M} UTC"


@pytest.mark.parametrize(
    "override",
    [
        "stages.base.checkpoints.every_seconds=1",
        "stages.base.checkpoints.keep_last=5",
        "stages.refined.retries=7",
        "stages.expressions.retry_delay_seconds=0",
        "description=Another.",
        # What a stage has by default anyway.
        "stages.base.training.seed=0",
        "stages.base.engine=torch",
    ],
)
def test_what_is_no_part_of_the_output_changes_nothing(override: str, own_store: Path) -> None:
    assert verdicts(planned(own_store, override)) == expected([], [])


@pytest.mark.parametrize(
    ("override", "stage", "reason", "waiting"),
    [
        ("stages.base.training.seed=1", "base", "training.seed: 0 → 1", after("base")),
        ("stages.base.model.dropout=0.5", "base", "model.dropout: 0.0 → 0.5", after("base")),
        ("stages.refined.precision=bfloat16", "refined", "precision: 'float32' → 'bfloat16'", after("refined")),
        (
            "stages.refined.training.optimizer.clip=null",
            "refined",
            "training.optimizer.clip: 1.0 → None",
            after("refined"),
        ),
        ("stages.questions-after.split=train", "questions-after", "split: 'test' → 'train'", ["published"]),
        ("stages.published.title=x", "published", "title: 'Cairn arithmetic, tiny' → 'x'", []),
    ],
)
def test_the_key_that_changed_is_named(
    override: str, stage: str, reason: str, waiting: list[str], own_store: Path
) -> None:
    steps = planned(own_store, override)
    assert verdicts(steps) == expected([stage], waiting)
    assert steps[stage].reason == reason


def test_several_changes_are_all_named(own_store: Path) -> None:
    steps = planned(own_store, "stages.base.training.seed=1", "stages.base.training.steps=50")
    assert steps["base"].reason == "training.seed: 0 → 1; training.steps: 40 → 50"


def test_a_changed_input_is_named(own_store: Path) -> None:
    change = "stages.expressions.source.seed=1"
    steps = planned(own_store, change)
    assert verdicts(steps) == expected(["expressions"], after("expressions"))
    assert steps["expressions"].reason == "source.seed: 0 → 1"
    make(own_store, steps["expressions"].entry, "expressions")
    steps = planned(own_store, change)
    assert verdicts(steps) == expected(["tokenizer"], after("expressions"))
    assert steps["tokenizer"].reason == "input 'documents.0' changed"


def test_the_same_output_made_otherwise_changes_nothing_downstream(own_store: Path) -> None:
    change = "stages.tokens.shard_tokens=5000"
    steps = planned(own_store, change)
    assert verdicts(steps) == expected(["tokens"], after("tokens"))
    assert steps["tokens"].reason == f"shard_tokens: {1 << 25} → 5000"
    sources = {name: found(steps, name) for name in ("expressions", "tokenizer")}
    before = found(planned(own_store), "tokens")
    again = make(own_store, steps["tokens"].entry, "tokens", **sources)
    assert again.key != before.key
    assert again.output == before.output
    assert verdicts(planned(own_store, change)) == expected([], [])


def test_a_raised_version_is_named(own_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = STAGES["stack"].version + 1
    monkeypatch.setitem(STAGES, "stack", dataclasses.replace(STAGES["stack"], version=version))
    steps = planned(own_store)
    assert verdicts(steps) == expected(["stacked"], after("stacked"))
    assert steps["stacked"].reason == f"the stage is now stack version {version}"


@pytest.mark.parametrize("harm", ["missing", "cut off", "the record is damaged", "the record is gone"])
def test_what_is_damaged_is_made_again(harm: str, own_store: Path) -> None:
    record = found(planned(own_store), "base")
    file = own_store / "objects" / record.output / "model.safetensors"
    text = own_store / "records" / f"{record.key}.json"
    if harm == "missing":
        file.unlink()
    elif harm == "cut off":
        file.chmod(0o644)
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "the record is damaged":
        text.write_text(text.read_text().replace('"pretrain"', '"pretain"'))
    else:
        text.unlink()
    steps = planned(own_store)
    assert verdicts(steps) == expected(["base"], after("base"))
    assert steps["base"].reason == "its record or files are damaged or gone"


def test_nothing_to_compare_with(own_store: Path) -> None:
    (own_store / "records" / f"{found(planned(own_store), 'base').key}.json").unlink()
    steps = planned(own_store, "stages.base.training.seed=1")
    assert steps["base"].reason == "never made so, and the record of what was made last is damaged or gone"


def test_planning_writes_nothing(own_store: Path) -> None:
    def states() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in own_store.rglob("*")}

    before = states()
    planned(own_store, "stages.base.training.seed=1")
    assert states() == before


def test_every_kind_of_difference_is_in_json_values(own_store: Path) -> None:
    # A recipe's lists are tuples in a config and lists in a record, and those are the same.
    change = "stages.expressions.source.operators=['+']"
    assert verdicts(planned(own_store, change)) == expected([], [])
    assert json.loads(found(planned(own_store), "expressions").to_json())["config"]["source"]["operators"] == ["+"]
