"""What validation measures: on one source all its rows, on several each by its share, and samples of all in turn."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.optimizer import OptimizerConfig
from models.training.batches import Batches
from models.training.config import ValidationConfig
from models.training.shards import write_shard
from models.training.validation import Measured, Validator
from models.weights import Piece
from tests.models.training.bigrams import VOCABULARY, BigramEngine, write_chain
from tests.models.training.folders import batches, folder_source


def engine(seed: int = 0) -> BigramEngine:
    numbers = np.random.default_rng(seed)
    made = BigramEngine(OptimizerConfig(learning_rate=0.1))
    weights = {
        "bigram.weight": numbers.normal(size=(VOCABULARY, VOCABULARY)),
        "bigram.bias": numbers.normal(size=VOCABULARY),
    }
    made.restore("weights", (Piece(name, (), array) for name, array in weights.items()))
    return made


def measured(on: Batches, rows_at_once: int = 5, **config: Any) -> Measured:
    settings = ValidationConfig(every=1, **config)
    found = Validator(engine(), on, settings, rows_at_once, None).measure(lambda: False)
    assert found is not None
    return found


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Chains of 25 and of 3 times 25 documents of 8 tokens, of which the second half counts."""
    return [
        write_chain(tmp_path / "short", shards=1, tokens=200, masked=True),
        write_chain(tmp_path / "long", shards=3, tokens=200, seed=1, masked=True),
    ]


def blended(folders: list[Path], *weights: float, **options: Any) -> Batches:
    sources = [
        folder_source(folder, folder.name, weight=weight) for folder, weight in zip(folders, weights, strict=True)
    ]
    return batches(*sources, length=7, packing="documents", shuffled=False, **options)


@pytest.mark.parametrize("rows", [None, 7, 1000])
def test_the_loss_is_over_the_first_rows_of_each_source(folders: list[Path], rows: int | None) -> None:
    expected = []
    for folder, count in zip(folders, (25, 75), strict=True):
        batch = blended([folder], 1.0).rows(0, min(count, rows or count))
        total, counted = engine().loss(batch)
        expected.append(total / counted)
    for folder, loss in zip(folders, expected, strict=True):
        alone = measured(blended([folder], 1.0), rows=rows)
        assert alone.loss == pytest.approx(loss)
        assert alone.by_source == ()
    both = measured(blended(folders, 3.0, 1.0), rows=rows)
    assert both.by_source == pytest.approx(expected)
    assert both.loss == pytest.approx(0.75 * expected[0] + 0.25 * expected[1])
    # However many rows go through the model at once.
    assert measured(blended(folders, 3.0, 1.0), 1000, rows=rows).loss == pytest.approx(both.loss)


def test_exact_match_is_averaged_by_share_too(folders: list[Path]) -> None:
    each = [measured(blended([folder], 1.0), exact_match_rows=20).exact_match for folder in folders]
    both = measured(blended(folders, 3.0, 1.0), exact_match_rows=20).exact_match
    assert each[0] is not None
    assert each[1] is not None
    assert both == pytest.approx(0.75 * each[0] + 0.25 * each[1])
    assert measured(blended(folders, 3.0, 1.0)).exact_match is None


def test_a_source_in_which_nothing_is_written_has_no_part_in_exact_match(folders: list[Path], tmp_path: Path) -> None:
    write_shard(tmp_path / "mute" / "a.safetensors", np.ones(16, np.uint16), [8, 16], np.zeros(16))
    both = measured(blended([folders[0], tmp_path / "mute"], 1.0, 1.0), exact_match_rows=20)
    assert both.exact_match == measured(blended(folders[:1], 1.0), exact_match_rows=20).exact_match
    # A loss over nothing is no number, and is not passed off as one.
    assert math.isnan(both.loss)


def test_samples_are_of_the_sources_in_turn(folders: list[Path]) -> None:
    each = [measured(blended([folder], 1.0), samples=3).samples for folder in folders]
    both = measured(blended(folders, 3.0, 1.0), samples=5).samples
    assert both == (each[0][0], each[1][0], each[0][1], each[1][1], each[0][2])


def test_it_stops_where_it_is_told_to(folders: list[Path]) -> None:
    asked = 0

    def stopping() -> bool:
        nonlocal asked
        asked += 1
        return asked > 8

    config = ValidationConfig(every=1)
    assert Validator(engine(), blended(folders, 1.0, 1.0), config, 5, None).measure(stopping) is None
    assert asked == 9


def test_a_row_of_several_documents_is_shown_from_its_beginning(tmp_path: Path) -> None:
    # A row begins with the last token of a document, whose target is the first of the next and does not count.
    write_shard(tmp_path / "a.safetensors", np.arange(1, 14).astype(np.uint16), [1, 6, 13])
    for masking in (False, True):
        found = batches(folder_source(tmp_path), length=12, shuffled=False, document_masking=masking)
        (sample,) = measured(found, samples=1).samples
        assert sample.prompt == "1 2 3 4 5 6"
        assert sample.expected is None


CONVERSATIONS = ([10, 5, 6, 7, 1, 2], [8, 9, 3, 4, 5, 10, 11, 6, 7], [12, 1], [13, 14, 15, 2, 3, 4])
"""What is said to whom: where it is 1, 2, 3, 4, 6 or 7, by an assistant."""


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    tokens = np.concatenate(CONVERSATIONS).astype(np.uint16)
    ends = np.cumsum([len(one) for one in CONVERSATIONS])
    write_shard(tmp_path / "conversations" / "a.safetensors", tokens, ends, (tokens < 8) & (tokens != 5))
    return tmp_path / "conversations"


def test_each_conversation_of_a_row_is_answered(conversations: Path) -> None:
    packed, apart = (
        batches(folder_source(conversations), length=11, packing=packing, shuffled=False)
        for packing in ("whole", "documents")
    )
    assert [one.sources[0].rows for one in (packed, apart)] == [2, 4]
    for options in ({"exact_match_rows": 10}, {"rows": 10}):
        one, other = (measured(on, **options) for on in (packed, apart))
        assert one.exact_match == other.exact_match
        assert one.loss == pytest.approx(other.loss)
    # Each row holds two; the longest has a second turn, which is left out.
    samples = measured(packed, samples=3).samples
    assert [sample.prompt for sample in samples] == ["10 5", "13 14 15", "8 9"]
    assert [sample.expected for sample in samples] == ["6 7 1 2", "2 3 4", "3 4"]
    assert [len(sample.continuation.split()) for sample in samples] == [4, 3, 2]
    assert measured(packed, samples=9).samples[:3] == samples
    assert len(measured(packed, samples=9).samples) == 4


def test_an_exact_match_is_of_the_right_conversation(tmp_path: Path) -> None:
    # A chain that the model knows: each token is followed by the next.
    sure = engine()
    weights = {"bigram.weight": 50 * np.roll(np.eye(VOCABULARY), 1, axis=1), "bigram.bias": np.zeros(VOCABULARY)}
    sure.restore("weights", (Piece(name, (), array) for name, array in weights.items()))
    tokens = np.array([1, 2, 3, 4, 9, 8, 7, 5, 6, 7], np.uint16)
    write_shard(tmp_path / "a.safetensors", tokens, [4, 7, 10], tokens % 10 > 1)
    rows = batches(folder_source(tmp_path), length=9, packing="whole", shuffled=False)
    assert rows.sources[0].rows == 1
    found = Validator(sure, rows, ValidationConfig(every=1, exact_match_rows=1), 5, None).measure(lambda: False)
    assert found is not None
    assert found.exact_match == pytest.approx(2 / 3)


def test_a_model_whose_logits_are_not_finite_writes_nothing_and_its_loss_tells(folders: list[Path]) -> None:
    broken = engine()
    weights = {name: np.full(shape, np.nan) for name, shape in (("weight", (VOCABULARY,) * 2), ("bias", VOCABULARY))}
    broken.restore("weights", (Piece(f"bigram.{name}", (), array) for name, array in weights.items()))
    settings = ValidationConfig(every=1, exact_match_rows=20, samples=2)
    found = Validator(broken, blended(folders[:1], 1.0), settings, 5, None).measure(lambda: False)
    assert found is not None
    assert math.isnan(found.loss)
    assert found.exact_match == 0
    assert [sample.continuation for sample in found.samples] == ["", ""]
