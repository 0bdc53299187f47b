"""The stage `report`: on evaluations as stages leave them, earlier reports, and what is neither."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from common.errors import UserError
from common.files import sha256_file
from tasks.report import REPORT_DATA, REPORT_MARKDOWN, REPORT_PAGE, STAGE, Config, read_report, resolved
from tasks.reporting.markdown import to_markdown
from tasks.reporting.page import to_html
from tasks.reporting.references import REFERENCES, reference_scores
from tests.tasks.conftest import RunStage
from tests.tasks.reporting.made import evaluation, score, task_group

CONFIG = {"title": "Elite-112M", "model": "elite-112m"}


def answers(share: float, seed: int = 0, n: int = 400) -> list[bool]:
    """Right and wrong: documents that are hard for one model are hard for another."""
    hard = np.random.default_rng(9).random(n) + np.random.default_rng(seed).normal(0, 0.05, n)
    return [bool(one) for one in hard < share]


def test_it_writes_the_same_in_three_forms(run_stage: RunStage, tmp_path: Path) -> None:
    first = evaluation(tmp_path / "a", answers(0.4), chance=0.25, num_fewshot=0, lm_eval="0.4.13", task_version=1.0)
    second = evaluation(tmp_path / "b", answers(0.26), "copa", chance=0.25, data={"super_glue": "cd" * 32, "x": None})
    other = evaluation(tmp_path / "c", answers(0.6, seed=1))
    inputs = {"evaluations.0": first, "evaluations.1": second, "others": other}
    config = {**CONFIG, "names": ["arc", "copa"], "other_names": ["better"], "at": "2026-11-22T18:00:00Z"}
    output, metrics = run_stage("report", config, **inputs)
    report = read_report(output / REPORT_DATA)
    assert (output / REPORT_PAGE).read_text() == to_html(report)
    assert (output / REPORT_MARKDOWN).read_text() == to_markdown(report)
    logs = output.parent / "logs"
    assert {path.name for path in logs.iterdir()} == {REPORT_PAGE, REPORT_MARKDOWN}
    assert metrics["summary"] == ("2 tasks, 1 within two standard errors of chance, 1 significantly below other")
    assert [one["task"] for one in metrics["differences"]] == ["arc_easy"]
    assert (metrics["compared"], metrics["snapshots"]) == (1, 1)
    (arc, copa) = report.evaluations
    assert (arc.name, arc.provenance.num_fewshot, arc.provenance.task_version) == ("arc", 0, "1.0")
    assert copa.provenance.data == {"super_glue": "cd" * 32}
    assert {one.model for one in report.references if one.task == "arc_easy"} == {
        model for model, _, _ in reference_scores("arc_easy", "acc")
    }
    assert report.references
    (compared,) = report.differences
    assert compared.first == pytest.approx(np.mean(answers(0.4)))
    assert compared.second == pytest.approx(np.mean(answers(0.6, seed=1)))
    again, _ = run_stage("report", config, **inputs)
    assert [(again / name).read_bytes() for name in (REPORT_DATA, REPORT_PAGE, REPORT_MARKDOWN)] == [
        (output / name).read_bytes() for name in (REPORT_DATA, REPORT_PAGE, REPORT_MARKDOWN)
    ]


def test_groups_are_shown_of_which_every_task_is_there(run_stage: RunStage, tmp_path: Path) -> None:
    inputs = {
        "evaluations.0": evaluation(tmp_path / "a", answers(0.4)),
        "evaluations.1": evaluation(tmp_path / "b", answers(0.6, n=200), "copa"),
    }

    def config(*tasks: str) -> dict[str, Any]:
        group = task_group("sums", *tasks, weight_by_size=False)
        return {**CONFIG, "groups": [group.model_dump(mode="json")]}

    output, _ = run_stage("report", config("arc_easy", "copa"), **inputs)
    ((_, found),) = read_report(output / REPORT_DATA).grouped
    assert found.score.value == pytest.approx((np.mean(answers(0.4)) + np.mean(answers(0.6, n=200))) / 2)
    assert "| sums | acc | **" in (output / REPORT_MARKDOWN).read_text().partition("## Scores")[0]
    for tasks, named in ((("copa", "boolq"), "boolq"), (("perplexity",), "perplexity")):
        with pytest.raises(UserError, match=f"the group 'sums' has the task '{named}', which must be in one"):
            run_stage("report", config(*tasks), **inputs)


def test_history_is_carried_on(run_stage: RunStage, tmp_path: Path) -> None:
    worse, better = (evaluation(tmp_path / name, answers(share)) for name, share in (("a", 0.4), ("b", 0.5)))
    first, _ = run_stage("report", {**CONFIG, "at": "2026-11-01"}, evaluations=worse)
    unchanged, metrics = run_stage("report", {**CONFIG, "at": "2026-11-08"}, evaluations=worse, previous=first)
    assert metrics["snapshots"] == 1
    assert read_report(unchanged / REPORT_DATA).history == read_report(first / REPORT_DATA).history
    second, _ = run_stage("report", {**CONFIG, "at": "2026-11-15"}, evaluations=better, previous=unchanged)
    # The same scores of another model are news.
    config = {**CONFIG, "at": "2026-11-22", "digest": "ab" * 32}
    third, metrics = run_stage("report", config, evaluations=better, previous=second)
    assert metrics["snapshots"] == 3
    history = read_report(third / REPORT_DATA).history
    assert [one.at for one in history] == ["2026-11-01", "2026-11-15", "2026-11-22"]
    values = [one.scores[0].value for one in history]
    assert values[0] == pytest.approx(np.mean(answers(0.4)))
    assert values[1] == values[2] == pytest.approx(np.mean(answers(0.5)))


def test_the_history_may_be_given_as_data(run_stage: RunStage, tmp_path: Path) -> None:
    worse, better = (evaluation(tmp_path / name, answers(share)) for name, share in (("a", 0.4), ("b", 0.5)))
    first, _ = run_stage("report", {**CONFIG, "at": "2026-11-01"}, evaluations=worse)
    history = [one.model_dump(mode="json") for one in read_report(first / REPORT_DATA).history]
    config = {**CONFIG, "at": "2026-11-08"}
    as_data, metrics = run_stage("report", {**config, "history": history}, evaluations=better)
    as_input, _ = run_stage("report", config, evaluations=better, previous=first)
    assert (as_data / REPORT_DATA).read_bytes() == (as_input / REPORT_DATA).read_bytes()
    assert metrics["snapshots"] == 2
    with pytest.raises(UserError, match="the history is given, and a previous report that has one"):
        run_stage("report", {**config, "history": history}, evaluations=better, previous=first)


def test_a_history_of_something_else_is_refused(run_stage: RunStage, tmp_path: Path) -> None:
    one = evaluation(tmp_path / "a", answers(0.4))
    other, _ = run_stage("report", {**CONFIG, "model": "mtlm2-40m"}, evaluations=one)
    with pytest.raises(UserError, match="the previous report is of 'mtlm2-40m', not of 'elite-112m'"):
        run_stage("report", CONFIG, evaluations=one, previous=other)
    compared = tmp_path / "compared"
    compared.mkdir()
    (compared / REPORT_DATA).write_text('[{"name":"grown","loss":3.0}]')  # as the stage `compare` has it
    with pytest.raises(UserError, match=r"report\.json is no report over evaluations"):
        run_stage("report", CONFIG, evaluations=one, previous=compared)


def test_tasks_of_several_evaluations_are_told_apart(run_stage: RunStage, tmp_path: Path) -> None:
    def both(name: str, *shares: float) -> list[Path]:
        return [
            evaluation(tmp_path / f"{name}{number}", answers(share), "exact_match", "exact_match")
            for number, share in enumerate(shares)
        ]

    own, others = both("own", 0.4, 0.8), both("other", 0.6, 0.7)
    inputs = {f"evaluations.{number}": folder for number, folder in enumerate(own)}
    inputs |= {f"others.{number}": folder for number, folder in enumerate(others)}
    config = {**CONFIG, "names": ["sums", "questions"], "other_names": ["their-sums", "their-questions"]}
    output, metrics = run_stage("report", config, **inputs)
    report = read_report(output / REPORT_DATA)
    assert [one.task for one in report.scores] == ["exact_match (sums)", "exact_match (questions)"]
    assert [(one.task, one.difference > 0) for one in report.differences] == [
        ("exact_match (sums)", False),
        ("exact_match (questions)", True),
    ]
    assert metrics["summary"] == "2 tasks, 1 significantly below other, 1 significantly above it"


def test_tasks_that_only_one_side_has_are_not_compared(run_stage: RunStage, tmp_path: Path) -> None:
    one, other = (evaluation(tmp_path / task, answers(0.4), task) for task in ("arc_easy", "copa"))
    output, metrics = run_stage("report", CONFIG, evaluations=one, others=other)
    assert read_report(output / REPORT_DATA).differences == ()
    assert (metrics["summary"], metrics["compared"]) == ("1 task", 0)


def write(folder: Path, results: Any) -> Path:
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_evaluations_from_before_there_were_scores_are_read(run_stage: RunStage, tmp_path: Path) -> None:
    matched = write(tmp_path / "a", {"exact_match": 0.75, "standard_error": 0.1, "n": 20, "template": "plain"})
    perplexity = {"measure": "perplexity", "token_perplexity": 9.5, "word_perplexity": None, "bits_per_byte": 1.1}
    read = write(tmp_path / "b", perplexity)
    output, _ = run_stage("report", CONFIG, **{"evaluations.0": matched, "evaluations.1": read})
    report = read_report(output / REPORT_DATA)
    assert report.scores[0] == score("exact_match", 0.75, error=0.1, metric="exact_match", n=20)
    assert report.evaluations[0].provenance.template == "plain"
    found = {(one.metric, one.value, one.higher_is_better) for one in report.scores[1:]}
    assert found == {("token_perplexity", 9.5, False), ("word_perplexity", None, False), ("bits_per_byte", 1.1, False)}


def test_kinds_and_intervals_of_parts_are_read(run_stage: RunStage, tmp_path: Path) -> None:
    scores = [score(metric="correct", group=group).dumped() for group in ("poetry", "operator: +")]
    categories = [{"category": "poetry", "kind": "creation", "interval": [0.1, 0.5]}]
    groups = {"operator": [{"group": "+", "n": 5, "interval": [0.2, 0.6]}]}
    made = write(tmp_path / "a", {"scores": scores, "categories": categories, "groups": groups})
    output, _ = run_stage("report", CONFIG, evaluations=made)
    (parts,) = read_report(output / REPORT_DATA).evaluations[0].divided().values()
    assert {kind: [(part.name, part.interval) for part in found] for kind, found in parts.items()} == {
        "creation": [("poetry", (0.1, 0.5))],
        "operator": [("+", (0.2, 0.6))],
    }


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({}, "has no scores that can be read"),
        ([], "has no scores that can be read"),
        ({"scores": []}, "has no scores"),
        ({"scores": [{"task": "arc_easy"}]}, r"has no scores that can be read \(Field required\)"),
        ({"scores": [{**score().dumped(), "n": -1}]}, "greater than or equal to 0"),
        ({"scores": [score().dumped()], "data": ["x"]}, "has no scores that can be read"),
        ({"scores": [score().dumped()], "categories": [{"kind": "creation"}]}, "has no scores that can be read"),
        ({"scores": [score().dumped()], "num_fewshot": "five"}, "has no scores that can be read"),
    ],
)
def test_what_is_no_evaluation_is_named(run_stage: RunStage, tmp_path: Path, results: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"the evaluation 'mine' {message}" if message.startswith("has") else message):
        run_stage("report", {**CONFIG, "names": ["mine"]}, evaluations=write(tmp_path / "a", results))


def test_the_published_values_are_part_of_the_key(run_stage: RunStage, tmp_path: Path) -> None:
    whole = resolved(Config(title="t", model="m"))
    assert whole.references == sha256_file(REFERENCES)
    one = evaluation(tmp_path / "a", answers(0.4))
    run_stage("report", whole.model_dump(), evaluations=one)
    with pytest.raises(UserError, match="the published values here are other ones"):
        run_stage("report", {**CONFIG, "references": "ab" * 32}, evaluations=one)


def test_a_time_is_one() -> None:
    assert STAGE.config.model_validate({**CONFIG, "at": "2026-11-22T18:00:00+01:00"})
    with pytest.raises(ValidationError, match="is no time as ISO 8601 writes it"):
        STAGE.config.model_validate({**CONFIG, "at": "yesterday"})
    with pytest.raises(ValidationError, match="level"):
        STAGE.config.model_validate({**CONFIG, "level": 1.0})
