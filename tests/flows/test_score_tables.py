"""Scores as `cairn evaluate` shows them."""

from typing import Any

from flows.report_table import report_table
from flows.score_tables import differences_table, score_table
from tasks.harness.results import told
from tasks.model_card import _results
from tasks.reporting.markdown import to_markdown
from tasks.reporting.page import to_html
from tasks.reporting.report_data import Evaluation, Report
from tests.flows.test_exact_match import record, shown
from tests.tasks.reporting.made import difference, score


def text_of(table: Any) -> str:
    return "\n".join(shown(table, 120))


def test_a_score_is_written_alike_in_every_view() -> None:
    one = score("copa", 0.5312, error=0.0499, chance=0.5)
    report = Report(title="t", model="m", evaluations=(Evaluation(name="e", scores=(one,)),))
    results = {"measure": "benchmark", "scores": [one.dumped()]}
    views = (
        *(text_of(score_table([record("benchmark", **results)])), text_of(report_table(report))),
        *(to_markdown(report), to_html(report), _results(results)),
    )
    for view in views:
        assert "53.1% ± 5.0" in view
        assert "50.0%" in view
    assert "53.1% ± 5.0" in next(told([one]))


def test_a_difference_is_written_as_the_scores_are() -> None:
    fallen = record("report", differences=[difference().model_dump(mode="json")])
    assert "│ arc_easy │ acc    │  50.0% │ 40.0% │ < 0.001 │" in text_of(differences_table(fallen))
