"""Scores as `cairn evaluate` shows them, and the samples behind them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.report_table import report_table
from flows.score_tables import differences_table, sample_rows, score_table
from tasks.harness.results import told
from tasks.model_card import _results
from tasks.reporting.markdown import to_markdown
from tasks.reporting.page import to_html
from tasks.reporting.report_data import Evaluation, Report
from tests.flows.test_exact_match import record, shown
from tests.tasks.reporting.made import difference, report, score, task_group

ROWS = 3000


def written(path: Path, **columns: list[Any]) -> Path:
    pq.write_table(pa.table({"prompt": [str(number) for number in range(4)], **columns}), path)
    return path


def test_the_first_samples_or_the_first_wrong_ones(tmp_path: Path) -> None:
    path = written(tmp_path / "samples.parquet", correct=[True, False, None, False], other=[1, 2, 3, 4])
    assert sample_rows(path, wrong=False, count=2) == (
        [{"prompt": "0", "correct": True}, {"prompt": "1", "correct": False}],
        4,
    )
    wrong = [{"prompt": "1", "correct": False}, {"prompt": "3", "correct": False}]
    for count in (1, 2, 9):
        assert sample_rows(path, wrong=True, count=count) == (wrong[:count], 2)


def test_what_is_neither_right_nor_wrong(tmp_path: Path) -> None:
    for columns in ({}, {"correct": pa.array([None] * 4, pa.bool_())}, {"correct": [None] * 4}):
        path = written(tmp_path / "samples.parquet", **columns)
        assert sample_rows(path, wrong=True, count=2) == ([], 0)
        assert len(sample_rows(path, wrong=False, count=9)[0]) == 4


@pytest.mark.parametrize("rows_of_a_group", [ROWS // 10, ROWS])
def test_no_more_is_read_than_is_shown(tmp_path: Path, rows_of_a_group: int) -> None:
    path = tmp_path / "samples.parquet"
    prompts = [row.tobytes().hex() for row in np.random.default_rng(0).integers(0, 256, (ROWS, 1000), np.uint8)]
    table = pa.table({"prompt": prompts, "correct": [False, True] * (ROWS // 2)})
    pq.write_table(table, path, row_group_size=rows_of_a_group, use_dictionary=False)
    last = pq.ParquetFile(path).metadata.row_group(pq.ParquetFile(path).num_row_groups - 1).column(0)
    # Nobody can read the end of the last prompts any more.
    damaged = bytearray(path.read_bytes())
    end = last.data_page_offset + last.total_compressed_size
    damaged[end - 200_000 : end] = bytes(200_000)
    path.write_bytes(damaged)
    with pytest.raises((OSError, UnicodeDecodeError, pa.ArrowInvalid)):
        pq.read_table(path).to_pylist()
    rows, found = sample_rows(path, wrong=True, count=20)
    assert [row["prompt"] for row in rows] == prompts[:40:2]
    assert found == ROWS // 2


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
