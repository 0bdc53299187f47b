"""The history of a model: what is one line in it, what is new, and how times are told."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.reporting import wording
from tasks.reporting.markdown import to_markdown
from tasks.reporting.page import to_html
from tasks.reporting.report_data import Evaluation, Provenance, Report, Series, Snapshot
from tests.tasks.reporting.made import BAD, score, task_group


def evaluation(task: str, value: float, n: int = 100, **how: Any) -> Evaluation:
    scores = (score(task, value, n=n), score(task, value, n=n, group="a part"))
    return Evaluation(name=task, provenance=Provenance(template="long", **how), scores=scores)


def after(
    earlier: Report | None, *evaluations: Evaluation, at: str = "2026-11-22", digest: str | None = "m1"
) -> Report:
    report = Report(title="t", model="m", evaluations=evaluations)
    return report.with_history(earlier.history if earlier else (), at, digest)


def values(report: Report) -> dict[tuple[str, int], list[float | None]]:
    return {(key.task, key.n): [one.value for _, one in points] for key, points in report.lines().items()}


def test_what_was_asked_otherwise_is_another_line() -> None:
    data = {"super_glue": "ab" * 32}
    ways: list[dict[str, Any]] = [
        {"n": 20, "num_fewshot": 0, "data": data},
        {"n": 21, "num_fewshot": 0, "data": data},
        {"n": 20, "num_fewshot": 5, "data": data},
        {"n": 20, "num_fewshot": 0, "data": {"super_glue": "cd" * 32}},
        {"n": 20, "num_fewshot": 0, "data": data, "task_version": "2"},
    ]
    report = None
    for number, way in enumerate([*ways, *ways]):
        report = after(report, evaluation("copa", 0.5 + number / 100, **way), digest=f"m{number}")
    assert report is not None
    lines = report.lines()
    assert [[one.value for _, one in points] for points in lines.values()] == [
        [0.5 + number / 100, 0.5 + (number + 5) / 100] for number in range(5)
    ]
    told = [wording.series_text(series, lines) for series in lines]
    assert told == [
        "n 20, 0-shot, super_glue abababababab",
        "n 21, 0-shot, super_glue abababababab",
        "n 20, 5-shot, super_glue abababababab",
        "n 20, 0-shot, super_glue cdcdcdcdcdcd",
        "n 20, 0-shot, version 2, super_glue abababababab",
    ]
    text, page = to_markdown(report), to_html(report)
    for one in told:
        assert wording.markdown(one) in text
        assert one in page


def test_a_task_that_was_not_asked_again_is_no_new_point() -> None:
    first = after(None, evaluation("arc", 0.4), evaluation("copa", 0.5), at="2026-11-01")
    # The same model: copa is asked anew with more documents, and arc is what it was.
    second = after(first, evaluation("copa", 0.55, n=200), evaluation("arc", 0.4), at="2026-11-08")
    assert [[one.task for one in snapshot.scores] for snapshot in second.history] == [["arc", "copa"], ["copa"]]
    assert set(second.history[-1].provenance) == {"copa"}
    assert values(second) == {}
    # The same score of another model is one, and the first model's once more after that.
    third = after(second, evaluation("arc", 0.4), at="2026-11-15", digest="m2")
    fourth = after(third, evaluation("arc", 0.4), at="2026-11-22", digest="m1")
    assert values(fourth) == {("arc", 100): [0.4, 0.4, 0.4]}
    assert after(fourth, evaluation("arc", 0.4), evaluation("copa", 0.5)).history == fourth.history


def test_only_whole_tasks_are_kept_and_no_templates() -> None:
    (snapshot,) = after(None, evaluation("arc", 0.4, num_fewshot=5)).history
    assert [one.group for one in snapshot.scores] == [None]
    assert snapshot.provenance == {"arc": Provenance(num_fewshot=5)}


def test_a_line_of_which_no_point_is_among_the_newest_has_no_row() -> None:
    report = None
    for number in range(2):
        report = after(report, evaluation("old", number / 2), digest=f"m{number}")
    for number in range(7):
        report = after(report, evaluation("new", number / 10), digest=f"m{number}")
    assert report is not None
    table = to_markdown(report).partition("## Over time")[2]
    assert "| new |" in table
    assert "| old |" not in table


@pytest.mark.parametrize(
    "at", ["20261122T180000Z", "2026-11-22T18:00:00+01:00", "2026-11-22", "20261122", "2026-W47-7"]
)
def test_the_day_is_told_whichever_way_the_time_is_written(at: str) -> None:
    assert wording.moment(Snapshot(at=at, scores=()), 1) == "2026-11-22"
    report = after(after(None, evaluation("arc", 0.4), at=at), evaluation("arc", 0.5), at=at)
    assert "| task | metric | asked | 2026-11-22 | 2026-11-22 |" in to_markdown(report)
    assert "measured 2026-11-22:" in to_html(report)


@pytest.mark.parametrize("at", [BAD, "<b>2026-11-22</b>", "2026-11-22|"])
def test_what_is_no_time_stands_in_no_history(at: str) -> None:
    with pytest.raises(ValidationError, match="is no time as ISO 8601 writes it"):
        Snapshot(at=at, scores=())


def test_names_of_data_are_text() -> None:
    others = [Series("t", "acc", None, 1, None, None, ((name, "ab"),)) for name in (BAD, "other")]
    assert BAD.replace("\n", " ") not in wording.markdown(wording.series_text(others[0], others))
    report = None
    for number, name in enumerate((BAD, "other", BAD, "other")):
        report = after(report, evaluation("arc", number / 10, data={name: "ab"}))
    assert report is not None
    assert "<script" not in to_html(report)
    assert not re.search(r"(?<!\\)<script", to_markdown(report))


def test_a_group_has_a_line_of_its_own() -> None:
    report = None
    for value, version in ((0.2, "1"), (0.4, "1"), (0.6, "2")):
        how: dict[str, Any] = {"num_fewshot": 5, "task_version": version, "lm_eval": "0.4.13"}
        evaluations = (
            evaluation("arc", value, data={"arc": "ab"}, **how),
            evaluation("copa", value + 0.2, n=300, data={"copa": "cd"}, **how),
        )
        grouped = Report(title="t", model="m", evaluations=evaluations, groups=(task_group("all", "arc", "copa"),))
        report = grouped.with_history(report.history if report else (), "2026-11-22", f"m{value}")
    assert report is not None
    ((series, points),) = ((series, points) for series, points in report.lines().items() if series.task == "all")
    assert series == Series("all", "acc", None, 400, 5, "1", (("arc", "ab"), ("copa", "cd")))
    assert [one.value for _, one in points] == pytest.approx([0.35, 0.55])
    assert report.history[-1].provenance["all"].task_version == "2"
    # What was said of some of its tasks alone is said of none.
    mixed = Provenance.shared([Provenance(num_fewshot=5, lm_eval="0.4.13"), Provenance(lm_eval="0.4.13")])
    assert mixed == Provenance(lm_eval="0.4.13")
