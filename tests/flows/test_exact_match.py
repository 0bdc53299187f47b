"""Scores as they are shown at the end of a run: side by side, and the last one on each of the documents whole."""

import io
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from artifacts.identity import FileEntry, content_digest
from artifacts.record import Record
from flows.evaluation_tables import Scored, evaluation_tables, exact_match_table, last_of_each


def record(stage: str, **metrics: Any) -> Record:
    files = {"results.json": FileEntry(size=1, sha256="0" * 64)}
    now = datetime.now(UTC)
    return Record(
        key="0" * 64,
        stage=stage,
        version=1,
        name=stage,
        config={},
        inputs={},
        output=content_digest(files),
        files=files,
        metrics=metrics,
        hardware={},
        packages={},
        started=now,
        ended=now,
    )


def score(model: str, documents: str, exact_match: float = 0.5, **metrics: Any) -> Scored:
    whole = {"n": 10_000, "exact_match": exact_match, "standard_error": 0.005, "interval": [0.25, 0.75]}
    metrics = {
        "split": "test",
        **whole,
        "by_answer_length": [{"length": 3, **whole}],
        "groups": {},
        "samples": [],
        **metrics,
    }
    return Scored(model, documents, record("evaluate", **metrics))


def shown(table: Any, width: int = 80) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return text.getvalue().splitlines()


BEFORE = [score("refined", "expressions", 0.9996), score("refined", "questions", 0.0)]
AFTER = [score("tuned", "expressions", 0.9977), score("tuned", "questions", 0.975)]


def test_models_stand_side_by_side_on_the_same_documents() -> None:
    lines = shown(exact_match_table([*BEFORE, *AFTER]))
    assert lines[0].strip() == "Exact match, model by model"
    rows = [line.split() for line in lines if "%" in line]
    assert rows == [
        ["expressions", "refined", "10,000", "99.96%", "±", "0.50%"],
        ["tuned", "10,000", "99.77%", "±", "0.50%"],
        ["questions", "refined", "10,000", "0.00%", "±", "0.50%"],
        ["tuned", "10,000", "97.50%", "±", "0.50%"],
    ]


def test_long_names_are_folded_and_not_cut() -> None:
    long = "a-stage-with-a-name-that-is-rather-longer-than-most-others-are"
    lines = shown(exact_match_table([score(long, long), score("tuned", long)]))
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)


@pytest.mark.parametrize(
    "evaluations",
    [
        [],
        BEFORE,
        [score("tuned", "questions"), score("tuned", "questions", split="validation")],
    ],
)
def test_there_is_nothing_to_compare(evaluations: list[Scored]) -> None:
    assert exact_match_table(evaluations) is None
    assert last_of_each(evaluations) == evaluations


def test_only_the_last_score_on_the_same_documents_is_shown_whole() -> None:
    other = score("tuned", "questions", split="validation")
    perplexity = [Scored(model, "expressions", record("perplexity", split="test")) for model in ("refined", "tuned")]
    assert last_of_each([*BEFORE, perplexity[0], *AFTER, other, perplexity[1]]) == [*AFTER, other, perplexity[1]]
    # Perplexities are no exact matches.
    assert exact_match_table(perplexity) is None


def test_marks_and_long_prompts_are_told() -> None:
    marks = {"n": 1319, "well_formed": 0.8125, "right": 0.75, "final_number": 0.0625}
    alone = {"n": 1, "exact_match": 0.125, "standard_error": None, "interval": [0.0, 0.5]}
    many = [{"length": length, **alone} for length in range(30)]
    one = score("tuned", "gsm8k", marks=marks, too_long=1234, by_answer_length=many, template="plain")
    assert "had not ended" not in "\n".join(shown(evaluation_tables(one.record), 200))
    cut = score("tuned", "gsm8k", cut_off=1234, max_new_tokens=16)
    text = "\n".join(shown(evaluation_tables(cut.record), 200))
    assert "1,234 answers had not ended at 16 tokens or the model's last position, and count as wrong" in text
    lines = shown(evaluation_tables(one.record))
    assert max(map(len, lines)) <= 80
    (row,) = (line for line in lines if "1,319" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["1,319", "81.25%", "75.00%", "6.25%"]
    text = "\n".join(lines)
    assert "1,234 prompts are longer than the model's positions" in text
    # Answers of thirty lengths are shown as a whole alone.
    assert "12.50%" not in text


def test_groups_are_shown_with_their_errors_and_the_worst_of_many() -> None:
    part = {"n": 7, "standard_error": None, "interval": [0.0, 0.3543]}
    digits = [{"group": str(number), **part, "exact_match": 0.0} for number in (2, 3)]
    alone = [{"group": "only one", **part, "exact_match": 0.0}]
    many = [{"group": f"put so {number}", **part, "exact_match": 1 - number / 64} for number in range(32)]
    groups = {"digits": digits, "operator": alone, "phrasing": many}
    lines = shown(evaluation_tables(score("tuned", "questions", groups=groups).record))
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    row = [line for line in lines if "35.43%" in line and "put" not in line][1]
    assert "only one" not in text
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["3", "7", "0.00%", "0.00% to 35.43%"]
    assert "Exact match by phrasing: the 20 worst of 32" in text
    assert [f"put so {number} " in text for number in (11, 12, 31)] == [False, True, True]


def test_a_perplexity_is_shown_with_its_errors() -> None:
    scores = [{"metric": "bits_per_byte", "standard_error": 0.25}, {"metric": "loss", "standard_error": None}]
    found = {"token_perplexity": 2.0, "word_perplexity": None, "bits_per_byte": 1.5, "loss": 0.7, "scores": scores}
    sizes = {
        "split": "test",
        "data": {"owner/texts": None},
        "tokens": 9,
        "words": 3,
        "window": 8,
        "stride": 4,
        "samples": [],
    }
    text = "\n".join(shown(evaluation_tables(record("perplexity", **found, **sizes)), 120))
    assert "Perplexity on the test split of owner/texts" in text
    assert "1.5000 ± 0.2500" in text
    assert "0.7000 │" in text
    assert "∞" in text
