"""Reports over evaluations in recipes, and as they are shown."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.schemas.filters import ArtifactFilter
from rich.console import Console

from artifacts.store import Store
from common.errors import UserError
from flows.plan import plan
from flows.recipe import known_recipes, load_recipe
from flows.report_table import report_table
from tasks.report import REPORT_DATA, read_report
from tasks.reporting.report_data import Report
from tests.flows.conftest import Cairn
from tests.flows.test_pipeline import client_of
from tests.tasks.reporting.made import BAD, report

REPORT = {"stage": "report", "title": "Tiny", "model": "tuned", "at": "2026-11-22"}


def with_reports(folder: Path, **reports: dict[str, Any]) -> Path:
    """arithmetic-tiny with further stages at its end."""
    content = yaml.safe_load(known_recipes()["arithmetic-tiny"].read_text())
    content["stages"] |= {name: {**REPORT, **keys} for name, keys in reports.items()}
    path = folder / "reported.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False).replace("'2026-11-22'", "2026-11-22"))
    return path


def test_optional_inputs_may_be_several(tmp_path: Path) -> None:
    after, before = ([f"{what}-{when}" for what in ("expressions", "questions")] for when in ("after", "before"))
    path = with_reports(
        tmp_path,
        first={"evaluations": "questions-before"},
        second={"evaluations": after, "others": before, "other": "refined", "previous": "first"},
    )
    first, second = load_recipe(str(path)).stages[-2:]
    assert first.inputs == {"evaluations": "questions-before"}
    assert (first.config.names, first.config.other_names) == (("questions-before",), ())  # type: ignore[attr-defined]
    assert second.inputs == {
        "evaluations.0": "expressions-after",
        "evaluations.1": "questions-after",
        "others.0": "expressions-before",
        "others.1": "questions-before",
        "previous": "first",
    }
    config: Any = second.config
    assert (config.names, config.other_names) == (tuple(after), tuple(before))
    assert config.at == "2026-11-22"
    assert config.references is not None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, r"stages\.report\.evaluations is missing: name the stage before it that makes the evaluation"),
        ({"others": ["tuned"]}, r"stages\.report\.others: stage 'tuned' makes model, not evaluation"),
        ({"others": ["questions-after"] * 2}, r"stages\.report\.others names a stage twice"),
        ({"others": []}, r"stages\.report\.others names no stage"),
        ({"previous": "published"}, r"stages\.report\.previous: stage 'published' makes published, not report"),
        ({"other_names": ["a"], "others": "questions-after"}, r"stages\.report\.other_names: the names are written"),
        ({"at": "soon"}, r"stages\.report\.at: is no time as ISO 8601 writes it"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    own = {} if not keys else {"evaluations": "questions-after"}
    with pytest.raises(UserError, match=message):
        load_recipe(str(with_reports(tmp_path, report={**own, **keys})))


def shown(made: Report) -> str:
    console = Console(width=80, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(report_table(made))
    return capture.get()


def test_the_table_fits_a_terminal() -> None:
    text = shown(report())
    assert max(map(len, text.splitlines())) <= 80
    for told in ("40.0% ± 1.0", "near chance", "below chance", "∞", "−10.0 < 0.001", "2 within two standard errors"):
        assert told in text, told
    assert "against" not in shown(report(differences=()))
    assert "[x]" in shown(report(BAD))


@pytest.mark.slow
def test_a_report_is_made_shown_and_reused(cairn: Cairn, own_store: Path, prefect_url: str, tmp_path: Path) -> None:
    after, before = ([f"{what}-{when}" for what in ("expressions", "questions")] for when in ("after", "before"))
    path = with_reports(tmp_path, report={"evaluations": after, "others": before, "other": "refined"})
    code, output = cairn("run", str(path), COLUMNS="80")
    assert code == 0, output
    assert "Tiny" in output
    page = output.partition("report  report: ")[2].split("report.html")[0].replace("\n", "") + "report.html"
    assert Path(page).read_text().startswith("<!doctype html>")
    store = Store.open(str(own_store))
    steps = plan(load_recipe(str(path)), store)
    assert {step.verdict for step in steps} == {"reused"}
    record = steps[-1].record
    assert record is not None
    made = read_report(store.fetch(record) / REPORT_DATA)
    assert [one.name for one in made.evaluations] == after
    assert made.summary == record.summary
    with client_of(prefect_url) as client:
        key = ArtifactFilter.model_validate({"key": {"any_": ["reported-report-report"]}})
        found = client.read_artifacts(artifact_filter=key)
    # A server that is slow to answer is asked again, and has made it twice.
    assert {(one.type, str(one.data)[:6]) for one in found} == {("markdown", "# Tiny")}
