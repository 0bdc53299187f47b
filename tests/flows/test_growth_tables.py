"""What growth did, as it is shown at the end of a run."""

import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from artifacts.identity import FileEntry, content_digest
from artifacts.record import Record
from artifacts.store import Store
from flows.growth_tables import comparison_table, growth_table
from flows.plan import plan
from flows.recipe import load_recipe
from tasks.comparison import compare
from tasks.growth_record import growths
from tasks.history import Grown, History, Loss, Trained
from tests.flows.conftest import Cairn


def trained(flops: float, *losses: float, first: int = 1) -> Trained:
    validation = tuple(Loss(step=500 * number, loss=loss) for number, loss in enumerate(losses, first))
    return Trained(
        parameters=98_916_096 if first else 173_255_424,
        steps=500 * (len(losses) - 1 + first),
        tokens=3_500_015_616,
        flops=flops,
        measured_on="rows",
        validation=validation,
    )


def history(operator: str = "interleave", state: str = "copy-momentum") -> History:
    grown = Grown(operator=operator, parameters_before=98_916_096, parameters=173_255_424, optimizer_state=state)
    return (trained(2.1e18, 9.1, 3.1234), grown, trained(4.1e18, 4.5, 3.12, 2.9876, first=0))


def record(name: str, **metrics: Any) -> Record:
    files = {"report.json": FileEntry(size=1, sha256="0" * 64)}
    values = {
        "key": "0" * 64,
        "stage": "refine",
        "version": 1,
        "name": name,
        "config": {},
        "inputs": {},
        "output": content_digest(files),
        "files": files,
        "started": datetime.now(UTC),
        "ended": datetime.now(UTC),
        "metrics": {"summary": "", **metrics},
        "hardware": {},
        "packages": {},
    }
    return Record.model_validate(values)


def shown(table: Any) -> str:
    text = io.StringIO()
    Console(file=text, width=80).print(table)
    lines = text.getvalue().splitlines()
    assert max(len(line) for line in lines) <= 80
    return "\n".join(line.rstrip() for line in lines)


def growth_record(found: History, **changes: Any) -> Record:
    growth = growths(found)[-1].model_copy(update=changes)
    return record("refined", growth=json.loads(growth.model_dump_json()))


def test_a_growth_has_a_line_that_is_cut_nowhere() -> None:
    text = shown(growth_table({"base": record("base"), "refined": growth_record(history())}))
    for part in ("What growth did", "refined", "interleave", "98.9M→173M", "600M→1.17G", "3.123", "4.500", "2.988"):
        assert part in text
    assert " 500" in text
    assert "…" not in text
    assert "validated every 500" in text


def test_a_growth_of_which_little_is_known_says_so() -> None:
    unknown = {"loss_before": None, "loss_right_after": None, "steps_until_back": None, "note": "on other rows"}
    text = shown(growth_table({"refined": growth_record(history(), **unknown)}))
    assert text.count("—") == 3
    assert "refined: on other rows" in text
    never = growth_record(history(), steps_until_back=None)
    assert "never" in shown(growth_table({"refined": never}))


def test_what_rounds_to_a_thousand_has_the_next_unit() -> None:
    sizes = {"parameters_before": 999_600, "parameters_after": 999_950_000, "flops_per_token_before": 999_400}
    text = shown(growth_table({"refined": growth_record(history(), **sizes)}))
    assert "1M→1G" in text
    assert "999k→" in text


def test_runs_without_growth_have_no_table() -> None:
    assert growth_table({"base": record("base")}) is None


def comparison(*histories: tuple[str, History]) -> str:
    rows = [json.loads(model.model_dump_json(exclude={"phases"})) for model in compare(histories)]
    return shown(comparison_table(record("refined-growth", models=rows)))


def control(*losses: float, flops: float = 9.3e18) -> History:
    return (trained(flops, *losses).model_copy(update={"parameters": 173_255_424}),)


def test_models_stand_side_by_side() -> None:
    equal, longer = ("refined-scratch", control(3.5, 3.2, flops=6.2e18)), ("longer", control(3.5, 3.2, 2.9))
    text = comparison(("interleave-momentum", history()), equal, longer)
    for part in ("interleave-momentum", "refined-scratch", "momentum", "6.20e18", "9.30e18", "3.123", "4.500", "2.988"):
        assert part in text
    assert "74%" in text
    assert "-0.212" in text
    assert "…" not in text
    assert "growth took 73.9% of them" in " ".join(text.split())


def test_what_is_no_control_has_no_verdict() -> None:
    text = comparison(("grown", history()), ("other", history("stack", "copy")))
    assert "scratch" not in text
    reached = comparison(("grown", history()), ("scratch", control(3.5, 3.2, 3.0)))
    assert "<67%" in reached
    bound = comparison(("grown", history()), ("scratch", control(2.9)))
    assert "%" not in bound
    assert "at most 9.30e18" in " ".join(bound.split())


@pytest.mark.slow
def test_a_recipe_with_rounds_and_a_control_runs_and_is_reused(cairn: Cairn, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "flows" / "recipes" / "arithmetic-tiny.yaml").read_text()
    before, _, after = text.partition("  stacked:")
    refined = after.partition("  refined:")[2].partition("  tuned:")
    rounds = "  refined:\n    stage: grow\n    model: base\n    control: {flops: [1, 1.5]}\n    rounds: [{}, {}]\n"
    shared = refined[0].replace("    stage: refine\n    model: stacked\n", "").lstrip("\n")
    path = tmp_path / "rounds.yaml"
    path.write_text(f"{before}{rounds}{shared}  tuned:{refined[2]}")
    places = {"CAIRN_STORE": str(tmp_path / "store"), "CAIRN_CACHE": str(tmp_path / "cache"), "COLUMNS": "80"}
    code, output = cairn("run", str(path), **places)
    assert code == 0, output
    assert "What growth did" in output
    assert output.count("comparison.png") == 1
    tables = output.partition("What growth did")[2].partition("published  ")[0]
    assert max(len(line) for line in tables.splitlines()) <= 80
    store = Store.open(str(tmp_path / "store"))
    steps = plan(load_recipe(str(path)), store)
    assert {step.verdict for step in steps} == {"reused"}
    report = next(step.record for step in steps if step.entry.stage == "compare")
    assert report is not None
    rows: Any = report.metrics["models"]
    assert [row["name"] for row in rows] == ["refined", "refined-scratch", "refined-scratch-1-5x"]
    assert len(rows[0]["growths"]) == 2
    assert rows[0]["against"]["control"] in ("refined-scratch", "refined-scratch-1-5x")
    # As much as was asked for, to within half a step.
    half = rows[1]["flops"] / (rows[1]["tokens"] / 144) / 2
    assert abs(rows[1]["flops"] - rows[0]["flops"]) <= half
    assert abs(rows[2]["flops"] - 1.5 * rows[0]["flops"]) <= half
    code, output = cairn("show", "models/rounds@refined-growth", **places)
    assert code == 0
    assert "report.json" in output
    assert "comparison.png" in output
