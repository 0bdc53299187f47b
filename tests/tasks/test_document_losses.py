import hashlib
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tasks.document_losses import ROWS_AT_ONCE, Document, DocumentLosses, ratio

TEXTS = ["Ein Haus, ein Baum.", "größer " * 50, " ", "x"]
LOSSES = [12.5, 301.25, 0.75, 2.0]


def measured(path: Path, texts: list[str], losses: list[float]) -> DocumentLosses:
    found = DocumentLosses(path)
    for text, loss in zip(texts, losses, strict=True):
        found.add(Document.of(text, len(text)), loss)
    found.close()
    return found


def test_each_document_has_a_row(tmp_path: Path) -> None:
    measured(tmp_path / "samples.parquet", TEXTS, LOSSES)
    rows = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    for text, loss, row in zip(TEXTS, LOSSES, rows, strict=True):
        assert row["id"] == hashlib.sha256(text.encode()).hexdigest()[:16]
        assert row["prompt"] == text[:200]
        assert (row["tokens"], row["bytes"]) == (len(text), len(text.encode()))
        assert row["loss"] == loss / len(text)
        assert row["bits_per_byte"] == pytest.approx(loss / math.log(2) / len(text.encode()))
    assert [row["words"] for row in rows] == [4, 50, 0, 1]
    # Between words there may be tokens alone.
    assert [row["word_loss"] for row in rows] == [12.5 / 4, 301.25 / 50, None, 2.0]


def test_many_documents_are_written_in_parts(tmp_path: Path) -> None:
    count = 2 * ROWS_AT_ONCE + 1
    found = measured(tmp_path / "samples.parquet", [f"text {number}" for number in range(count)], [1.0] * count)
    file = pq.ParquetFile(tmp_path / "samples.parquet")
    assert file.metadata.num_row_groups == 3
    assert [row["prompt"] for row in file.read().to_pylist()][-1] == f"text {count - 1}"
    assert found.sizes["documents"] == count


def test_the_scores_are_those_of_all_text_together(tmp_path: Path) -> None:
    found = measured(tmp_path / "samples.parquet", TEXTS, LOSSES)
    scores = {score.metric: score for score in found.scores()}
    total = sum(LOSSES)
    assert found.sizes == {
        "documents": 4,
        "tokens": sum(map(len, TEXTS)),
        "words": 55,
        "bytes": sum(len(text.encode()) for text in TEXTS),
    }
    assert scores["loss"].value == pytest.approx(total / found.sizes["tokens"])
    assert scores["token_perplexity"].value == pytest.approx(math.exp(total / found.sizes["tokens"]))
    assert scores["word_perplexity"].value == pytest.approx(math.exp(total / 55))
    assert scores["bits_per_byte"].value == pytest.approx(total / found.sizes["bytes"] / math.log(2))
    for score in scores.values():
        assert (score.task, score.n, score.higher_is_better, score.group) == ("perplexity", 4, False, None)
        assert score.standard_error is not None
        assert score.standard_error > 0


def test_the_error_of_a_ratio_is_how_it_varies_between_samples() -> None:
    random = np.random.default_rng(1)

    def sample(documents: int) -> tuple[np.ndarray, np.ndarray]:
        sizes_N = random.integers(1, 200, documents).astype(np.float64)
        return sizes_N * random.normal(3, 0.5, documents) + random.normal(0, 5, documents), sizes_N

    found = [ratio(*sample(400)) for _ in range(1000)]
    errors = [error for _, error in found if error is not None]
    assert len(errors) == 1000
    assert np.mean(errors) == pytest.approx(np.std([value for value, _ in found]), rel=0.1)


def test_a_ratio_that_never_varies_has_no_error_and_that_of_one_document_is_unknown() -> None:
    sizes_N = np.array([1.0, 2.0, 3.0])
    assert ratio(2 * sizes_N, sizes_N) == (2.0, 0.0)
    assert ratio(sizes_N[:1], sizes_N[:1]) == (1.0, None)


def test_a_perplexity_too_large_to_be_a_number_is_none(tmp_path: Path) -> None:
    scores = {score.metric: score for score in measured(tmp_path / "s", ["a", "b"], [800.0, 900.0]).scores()}
    assert scores["word_perplexity"].value is None
    assert scores["word_perplexity"].standard_error is None
    assert scores["loss"].value == 850
