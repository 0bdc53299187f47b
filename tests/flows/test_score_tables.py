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
from tests.tasks.reporting.made import difference, report, score, task_group


def text_of(table: Any) -> str:
    return "\n".join(shown(table, 120))


def test_a_score_is_written_alike_in_every_view() -> None:
    one = score("copa", 0.5312, error=0.0499, chance=0.5)
    made = Report(title="t", model="m", evaluations=(Evaluation(name="e", scores=(one,)),))
    results = {"measure": "benchmark", "scores": [one.dumped()]}
    views = (
        *(text_of(score_table([record("benchmark", **results)])), text_of(report_table(made))),
        *(to_markdown(made), to_html(made), _results(results)),
    )
    for view in views:
        assert "53.1% ± 5.0" in view
        assert "50.0%" in view
    assert "53.1% ± 5.0" in next(told([one]))


def test_a_difference_is_written_as_the_scores_are() -> None:
    fallen = record("report", differences=[difference().model_dump(mode="json")])
    assert "│ arc_easy │ acc    │  50.0% │ 40.0% │ < 0.001 │" in text_of(differences_table(fallen))


def test_groups_stand_below_their_tasks() -> None:
    scores = (score("arc", 0.4, n=300, chance=0.25), score("copa", 0.6, n=100, chance=0.5), score("boolq", 0.5))
    records = [
        record("benchmark", scores=[one.dumped()], num_fewshot=shots)
        for one, shots in zip(scores, (0, 0, 5), strict=True)
    ]
    groups = (task_group("sums", "arc", "copa"), task_group("all", "arc", "copa", "boolq"))
    *_, first, second, _ = text_of(score_table(records, groups)).splitlines()[:-1]
    assert first.split() == ["sums:", "2", "tasks", "acc", "45.0%", "±", "0.8", "31.2%", "—", "400", "0"]
    assert second.split()[:4] == ["all:", "3", "tasks", "acc"]
    assert second.split()[-2:] == ["—", "2,776"]
    assert "sums, 2 tasks acc" in text_of(report_table(report(groups=(task_group("sums", "copa", "boolq"),))))
