import hashlib
import math
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.document_losses import BLOCK_CHARACTERS, ROWS_AT_ONCE, DocumentLosses, blocks_of, ratio
from tasks.reporting.significance import difference

TEXTS = ["Ein Haus, ein Baum.", "größer " * 50, " ", "x"]
LOSSES = [12.5, 301.25, 0.75, 2.0]


def measured(path: Path, texts: list[str], losses: list[float]) -> DocumentLosses:
    """Each character a token, and the losses even over them."""
    found = DocumentLosses(path)
    for text, loss in zip(texts, losses, strict=True):
        found.add(blocks_of(text, range(len(text))), np.full(len(text), loss / len(text)))
    found.close()
    return found


def test_a_document_that_is_not_long_has_a_row(tmp_path: Path) -> None:
    measured(tmp_path / "samples.parquet", TEXTS, LOSSES)
    rows = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    for text, loss, row in zip(TEXTS, LOSSES, rows, strict=True):
        assert row["id"] == hashlib.sha256(text.encode()).hexdigest()[:16] + "/1"
        assert row["prompt"] == text[:200]
        assert (row["tokens"], row["bytes"]) == (len(text), len(text.encode()))
        assert row["loss"] == pytest.approx(loss / len(text))
        assert row["bits_per_byte"] == pytest.approx(loss / math.log(2) / len(text.encode()))
    assert [row["words"] for row in rows] == [4, 50, 0, 1]
    # Between words there may be tokens alone.
    assert [row["word_loss"] for row in rows] == [pytest.approx(12.5 / 4), pytest.approx(301.25 / 50), None, 2.0]


@given(st.lists(st.sampled_from(["word", "größer", "\n", " ", "\u2003", "x" * 900]), max_size=60), st.integers(1, 9))
def test_blocks_are_places_in_the_text_whatever_the_tokens(parts: list[str], times: int) -> None:
    text = "".join(parts) * times
    every, fours = range(len(text)), range(0, len(text), 4)
    fine, coarse = blocks_of(text, every), blocks_of(text, fours)
    assert [block._replace(tokens=0) for block in fine] == [block._replace(tokens=0) for block in coarse]
    assert (sum(block.tokens for block in fine), sum(block.tokens for block in coarse)) == (len(every), len(fours))
    assert sum(block.words for block in fine) == len(text.split())
    assert sum(block.bytes for block in fine) == len(text.encode())
    place = 0
    for block in fine:
        assert text[place:].startswith(block.prompt)
        assert place == 0 or text[place].isspace()
        place += block.tokens
    longest = max((len(word) for word in re.split(r"\s", text)), default=0)
    assert all(block.tokens <= 1.5 * BLOCK_CHARACTERS + longest for block in fine)


def test_tokens_of_no_character_count_to_the_block_of_those_before_them() -> None:
    text = "word " * BLOCK_CHARACTERS
    starts = [*range(0, len(text), 5), 0, 0]
    assert sum(block.tokens for block in blocks_of(text, starts)) == len(starts)
    assert blocks_of(text, starts)[-1].tokens == blocks_of(text, starts[:-2])[-1].tokens + 2
    assert [block.tokens for block in blocks_of(text, [])] == [0] * 5


def test_a_long_document_has_an_error_and_is_compared_block_by_block(tmp_path: Path) -> None:
    text = "a word\n" * 20_000
    random = np.random.default_rng(3)
    # Some parts are harder than others, for both.
    hard_T = 2 + np.repeat(random.normal(0, 0.5, 100), len(text) // 100)
    found = []
    for name, starts, factor in (("a", range(len(text)), 1.1), ("b", range(0, len(text), 2), 1.0)):
        (tmp_path / name).mkdir()
        losses = DocumentLosses(tmp_path / name / "samples.parquet")
        width = len(text) // len(starts)
        noise_T = random.normal(1, 0.1, len(starts))
        losses.add(blocks_of(text, starts), factor * hard_T.reshape(-1, width).sum(axis=1) * noise_T)
        losses.close()
        found.append(losses)
    first, second = ({score.metric: score for score in losses.scores()} for losses in found)
    assert first["loss"].n == found[0].sizes["blocks"] == 35
    assert found[0].sizes["documents"] == 1
    assert first["loss"].value == pytest.approx(1.1 * hard_T.mean(), rel=0.01)
    assert all(score.standard_error for score in (*first.values(), *second.values()))
    # Their tokens are others, and their blocks the same.
    compared = difference(tmp_path / "a", tmp_path / "b", first["bits_per_byte"])
    assert compared is not None
    assert compared.n == 35
    assert compared.first / compared.second == pytest.approx(1.1, rel=0.01)
    assert compared.is_fall()
    assert first["bits_per_byte"].standard_error is not None
    assert compared.standard_error < first["bits_per_byte"].standard_error / 5


def test_documents_of_equal_text_are_compared_in_their_order(tmp_path: Path) -> None:
    losses = {"a": [1.0, 4.0, 2.0], "b": [1.5, 5.0, 2.25]}
    for name, given_losses in losses.items():
        (tmp_path / name).mkdir()
        scores = measured(tmp_path / name / "samples.parquet", ["same", "other", "same"], given_losses).scores()
    compared = difference(tmp_path / "a", tmp_path / "b", scores[0])
    assert compared is not None
    assert compared.n == 3
    assert compared.difference == pytest.approx(-(0.5 / 4 + 1 / 5 + 0.25 / 4) / 3)


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
        "blocks": 4,
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


def test_a_ratio_that_never_varies_has_no_error_and_that_of_one_block_is_unknown() -> None:
    sizes_N = np.array([1.0, 2.0, 3.0])
    assert ratio(2 * sizes_N, sizes_N) == (2.0, 0.0)
    assert ratio(sizes_N[:1], sizes_N[:1]) == (1.0, None)


def test_a_perplexity_too_large_to_be_a_number_is_none(tmp_path: Path) -> None:
    scores = {score.metric: score for score in measured(tmp_path / "s", ["a", "b"], [800.0, 900.0]).scores()}
    assert scores["word_perplexity"].value is None
    assert scores["word_perplexity"].standard_error is None
    assert scores["loss"].value == pytest.approx(850)
