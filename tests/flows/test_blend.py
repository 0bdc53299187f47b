"""A whole run on a blend: other weights make no token again, and the run ends with what came out."""

import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from artifacts.store import Store
from common.errors import UserError
from flows.console import blend_table
from flows.plan import plan
from flows.recipe import known_recipes, load_recipe
from models.training.config import Portion
from tests.flows.conftest import RECIPE, Cairn

DATA = ("expressions", "large_documents", "questions", "tokenizer", "tokens", "large")


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """The tiny recipe on tokens of small and of large numbers."""
    content: Any = yaml.safe_load(known_recipes()[RECIPE].read_text())
    stages = content["stages"]
    source = {**stages["expressions"]["source"], "maximum": 999}
    data = {
        "expressions": stages.pop("expressions"),
        "large_documents": {"stage": "documents", "source": source},
        "questions": stages.pop("questions"),
        "tokenizer": stages.pop("tokenizer"),
        "tokens": stages.pop("tokens"),
    }
    data["large"] = {**data["tokens"], "documents": "large_documents"}
    stages["base"]["tokens"] = {"tokens": 0.75, "large": 0.25}
    stages["refined"]["tokens"] = {"tokens": {"weight": 1, "epochs": 2}, "large": {"weight": 1}}
    path = tmp_path / "blended.yaml"
    path.write_text(yaml.safe_dump({"description": "A blend.", "stages": data | stages}, sort_keys=False))
    return str(path)


def test_portions_are_written_where_the_tokens_are_named(recipe: str) -> None:
    stages = {entry.name: entry for entry in load_recipe(recipe).stages}
    assert stages["base"].inputs == {"tokens.0": "tokens", "tokens.1": "large"}
    assert stages["base"].config.blend == (Portion(weight=0.75), Portion(weight=0.25))  # type: ignore[attr-defined]
    assert stages["refined"].config.blend == (Portion(epochs=2), Portion())  # type: ignore[attr-defined]
    alike = {entry.name: entry for entry in load_recipe(recipe, ["stages.base.tokens=[large, tokens]"]).stages}
    assert alike["base"].config.blend == (Portion(), Portion())  # type: ignore[attr-defined]
    assert alike["base"].inputs == {"tokens.0": "large", "tokens.1": "tokens"}
    changed = {entry.name: entry for entry in load_recipe(recipe, ["stages.base.tokens.large=2"]).stages}
    assert changed["base"].config.blend[1] == Portion(weight=2)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.base.tokens.large=0", r"stages\.base\.tokens\.large\.weight: input should be greater than 0"),
        ("stages.base.tokens.large={wieght: 1}", r"there is no such key; did you mean 'weight'"),
        ("stages.base.tokens.small=1", "there is no stage 'small' before 'base'"),
        ("stages.base.tokens.expressions=1", "stage 'expressions' makes documents, not tokens; use tokens or large"),
        ("stages.base.tokens=[]", r"stages\.base\.tokens names no stage"),
        ("stages.base.tokens=[large, large]", "names a stage twice"),
        ("stages.base.blend=[{weight: 2}, {weight: 1}]", "the shares are written where the artifacts are named"),
    ],
)
def test_a_wrong_portion_is_named(recipe: str, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(recipe, [override])


def lines(output: str, stages: tuple[str, ...]) -> list[str]:
    """How a run says that stages are done: = for those that were reused."""
    marks = {line.split()[1]: line[0] for line in output.splitlines() if line[:2] in ("= ", "✓ ")}
    return [marks[stage] for stage in stages]


def test_other_weights_make_no_token_again(recipe: str, cairn: Cairn) -> None:
    code, output = cairn("run", recipe)
    assert code == 0, output
    assert lines(output, (*DATA, "base")) == ["✓"] * 7
    change = "stages.base.tokens.large=0.5"
    verdicts = {step.entry.name: step.verdict for step in plan(load_recipe(recipe, [change]), Store.open())}
    assert [verdicts[stage] for stage in (*DATA, "base")] == [*["reused"] * 6, "to run"]
    code, output = cairn("run", recipe, "--set", change)
    assert code == 0, output
    assert lines(output, (*DATA, "base", "refined")) == [*"======", "✓", "✓"]
    # What came out is in the record and in the table at the end.
    records = {stage: Store.open().resolve(f"models/blended@{stage}") for stage in ("base", "refined")}
    base: Any = records["base"].metrics["blend"]
    assert [row["source"] for row in base] == ["tokens", "large"]
    assert [row["share_asked"] for row in base] == [0.6, 0.4]
    refined: Any = records["refined"].metrics["blend"]
    assert refined[0]["epochs"] == 2
    table = output[output.index("What was trained on") :].splitlines()
    (row,) = (line.split() for line in table if line.split()[:1] == ["base"])
    validations: Any = records["base"].metrics["validation"]
    assert row == ["base", "tokens", "60.0%", f"{base[0]['share']:.1%}", f"{base[0]['tokens']:,}",
                   f"{base[0]['epochs']:,.2f}", f"{validations[-1]['by_source']['tokens']:.4f}"]  # fmt: skip
    # Losses on both are told while it trains.
    assert "validation loss" in output
    assert "(tokens " in output
    # As large as it gets, it is still a table at 100 columns.
    size = {"tokens": 14_000_000_000, "cut_documents": 12_345_678, "dropped_tokens": 123_456_789}
    last = {"epochs": 12.345, "used_up_at_step": 1234, "source": "a-source-of-a-very-long-name"}
    shown = io.StringIO()
    many = {
        "refined": records["base"].model_copy(update={"metrics": {"blend": [base[0] | size, base[1] | size | last]}})
    }
    Console(file=shown, width=100).print(blend_table(many))
    for part in ("refined", "14,000,000,000", "12.35", "12,345,678", "123,456,789", "60.0%", "28,000,000,000"):
        assert part in shown.getvalue()
    assert "refined: the budget of a-source-of-a-very-long-name was used up at step 1,234" in shown.getvalue()
    # A loss that is not finite is a string in the record.
    unlucky = {"validation": [{"loss": "NaN", "by_source": {"tokens": "Infinity"}}], "blend": base}
    Console(file=shown, width=100).print(blend_table({"base": records["base"].model_copy(update={"metrics": unlucky})}))
    assert "nan" in shown.getvalue()
    assert "inf" in shown.getvalue()
    assert blend_table({"tokens": Store.open().resolve("models/blended@tokens")}) is None
