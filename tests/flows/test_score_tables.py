"""How samples are looked at."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.score_tables import sample_rows

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
