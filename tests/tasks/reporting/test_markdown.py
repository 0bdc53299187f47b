"""The Markdown of a report: tables that hold together whatever they are told."""

import re

import pytest

from tasks.reporting import wording
from tasks.reporting.markdown import SHOWN_REFERENCES, to_markdown
from tasks.reporting.report_data import Evaluation, Report
from tasks.reporting.wording import markdown
from tests.tasks.reporting.made import BAD, published, report, score, task_group


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table, row by row."""
    found: list[list[list[str]]] = []
    for block in text.split("\n\n"):
        if block.startswith("| "):
            rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.split("\n")]
            found.append([[cell.strip() for cell in row] for row in rows])
    return found


@pytest.mark.parametrize("name", ["elite-112m", BAD])
def test_every_row_has_the_cells_of_its_head(name: str) -> None:
    found = tables(to_markdown(report(name)))
    assert len(found) == 4
    for head, rule, *rows in found:
        assert rows
        assert {len(row) for row in rows} == {len(head)} == {len(rule)}
        assert all(re.fullmatch(r"-+:?", cell) for cell in rule)


def test_names_are_text() -> None:
    text = to_markdown(report(BAD))
    assert "\\<script\\>alert(1)\\</script\\>" in text
    assert not re.search(r"(?<!\\)<(?!https://| 0)", text)
    assert not re.search(r"(?<!\\)\]\(", text)
    assert not re.search(r"(?<!\\)`", text)


def test_scores_stand_beside_chance_and_what_was_published() -> None:
    head, _, first, second, *_ = tables(to_markdown(report()))[0]
    assert head == ["task", "metric", "score", "n", "few-shot", "chance", "majority", "", "elite-112m", "OPT-125M"]
    assert first == [
        "elite-112m",
        "acc",
        "**40.0% ± 1.0**",
        "2,376",
        "5",
        "25.0%",
        "27.0%",
        "",
        "43.8% (0-shot)",
        "41.0%?",
    ]
    assert second[7] == "near chance"


def test_differences_history_parts_and_sources_follow() -> None:
    text = to_markdown(report())
    _, differences, history, parts = tables(text)
    assert differences[0][2:4] == ["elite-112m", "elite-112m"]
    assert differences[2][2:] == ["40.0%", "50.0%", "−10.0", "−13.9 to −6.1", "< 0.001", "2,376", "**worse**"]
    assert [row[-1] for row in differences[2:]] == ["**worse**", "**better**", "", "**worse**", "**worse**"]
    assert history[0] == ["task", "metric", "asked", "2026-10-01", "#2"]
    assert history[2] == ["elite-112m", "acc", "n 2,376", "36.0% ± 1.0", "40.0% ± 1.0"]
    assert parts[2][:3] == ["elite-112m", "elite-112m", "25.0% ± 1.0"]
    assert parts[3][:3] == ["digits", "3", "100.0% (86–100)"]
    assert "- elite-112m: elite-112m, <https://example.org/card>" in text
    assert "few-shot 5; template elite-112m; task version 1.0; lm-eval 0.4.13; data elite-112m abababababab" in text


def test_only_so_many_models_have_a_column() -> None:
    models = [f"model {number}" for number in range(SHOWN_REFERENCES + 2)]
    text = to_markdown(report(references=tuple(published(model, task="elite-112m") for model in models)))
    assert tables(text)[0][0][8:] == models[:SHOWN_REFERENCES]
    assert "Not in the table: what was published of model 6, model 7." in text


def test_the_models_with_a_column_are_those_that_most_was_published_of() -> None:
    few = [published(f"model {number}", task="elite-112m") for number in range(SHOWN_REFERENCES)]
    much = [published("last", task=task) for task in ("elite-112m", "copa")]
    text = to_markdown(report(references=(*few, *much)))
    assert tables(text)[0][0][-1] == "last"
    assert "Not in the table: what was published of model 5." in text


def test_two_values_of_one_model_are_both_shown() -> None:
    both = (published(task="elite-112m", value=0.4), published(task="elite-112m", value=0.41, source="another"))
    assert tables(to_markdown(report(references=both)))[0][2][-1] == "40.0% (0-shot), 41.0% (0-shot)"


def test_a_report_of_one_score_is_short() -> None:
    bare = Report(title="t", model="m", evaluations=(Evaluation(name="e", scores=(score(),)),))
    text = to_markdown(bare)
    assert text.startswith("# t\n\n**m**: 1 task.\n\n## Scores\n\n| task")
    assert len(tables(text)) == 1
    assert text.count("## ") == 1


@pytest.mark.parametrize("name", ["sums", BAD])
def test_groups_come_first_with_the_number_of_their_tasks(name: str) -> None:
    grouped = report(groups=(task_group(name, "copa", "boolq"),))
    text = to_markdown(grouped)
    assert text.index("## Groups of tasks") < text.index("## Scores")
    head, rule, row = tables(text)[0]
    assert head[:9] == ["group", "metric", "score", "tasks", "n", "few-shot", "chance", "majority", ""]
    # Models of which nothing was published for groups have no column.
    assert {len(head), len(rule), len(row)} == {9}
    assert row[0] == markdown(name)
    # Both are of 2,376 documents: 52% ± 5 and 60% ± 1.
    assert row[1:9] == ["acc", "**56.0% ± 2.5**", "2", "4,752", "5", "50.0%", "58.5%", "near majority"]
    assert wording.GROUPED in text
    assert grouped.summary.startswith(f"6 tasks with 7 scores, {name} acc 56.0% ± 2.5, ")


def test_the_summary_names_outer_groups_alone() -> None:
    groups = (task_group("all", "copa", "boolq", "aqua"), task_group("some", "copa", "boolq"))
    assert "all acc 40.7% ± 1.7, " in report(groups=groups).summary
    assert "some acc" not in report(groups=groups).summary
