"""Attention that stays inside a document: a packed row is held against its documents, each in a row of its own."""

import itertools
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.engine import Batch, EngineName, TrainingEngine
from models.training.shards import write_shard
from tests.models.test_engines import ENGINES, assert_same, engine_name, exported, gradients, trainer
from tests.models.tiny import COMPOSITIONS, VOCABULARY, Arrays, cut, tiny
from tests.models.training.folders import batches, folder_source

__all__ = ["engine_name"]  # the fixture

NAMES = list(COMPOSITIONS)
# Attention on a CPU has one way for short rows and another for long ones.
LENGTHS: dict[str, list[list[int]]] = {
    "short": [[1, 7, 1, 1, 10], [20], [1] * 20, [4, 4, 4, 8]],
    "long": [[1, 60, 1, 50, 8], [120], [2, 1] * 40, [49, 48, 23]],
}


def packed(lengths: list[list[int]], seed: int = 0, start: int = 0) -> Batch:
    """Random rows of documents; what a document begins with is no target, and some others are none either."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCABULARY, (len(lengths), sum(lengths[0]) + 1), dtype=np.int32)
    documents = np.array([np.repeat(np.arange(len(row)), row) for row in lengths], np.int32) + start
    last = np.append(documents[:, 1:] != documents[:, :-1], np.zeros((len(lengths), 1), np.bool_), axis=1)
    return Batch(tokens[:, :-1], tokens[:, 1:], ~last & (random.random(last.shape) < 0.8), documents)


def apart(batch: Batch, size: tuple[int, int] = (0, 0)) -> Batch:
    """Every document in a row of its own, padded on the right, to `size` rows and positions at least."""
    assert batch.documents_BT is not None
    pieces = []
    for row, numbers in enumerate(batch.documents_BT):
        ends = [*np.flatnonzero(np.diff(numbers)) + 1, len(numbers)]
        pieces += [(row, slice(start, end)) for start, end in itertools.pairwise([0, *ends])]
    longest = max(size[1], *(part.stop - part.start for _, part in pieces))

    def padded(array: np.ndarray) -> np.ndarray:
        found = np.stack([np.pad(array[row, part], (0, longest - part.stop + part.start)) for row, part in pieces])
        return np.pad(found, ((0, max(0, size[0] - len(found))), (0, 0)))

    return Batch(padded(batch.tokens_BT), padded(batch.targets_BT), padded(batch.loss_mask_BT))


def assert_near(found: Arrays, expected: Arrays) -> None:
    """Equal to 1e-5 of each array's largest element, or to 1e-6 of the largest of all: what is nothing but rounding, as
    the gradients of queries that have one key each, need not be the same rounding."""
    assert found.keys() == expected.keys()
    largest = max(abs(array).max() for array in expected.values())
    for name, array in expected.items():
        atol = max(1e-5 * abs(array).max(), 1e-6 * largest)
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=atol, err_msg=name)


@cache
def untrained(engine_name: EngineName, name: str) -> TrainingEngine:
    """An engine that no test trains, so that what it has compiled serves all of them."""
    return trainer(engine_name, tiny(name, max_position_embeddings=120))


@pytest.mark.parametrize("size", list(LENGTHS))
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_those_of_documents_apart(engine_name: EngineName, name: str, size: str) -> None:
    engine = untrained(engine_name, name)
    rows = packed(LENGTHS[size])
    assert engine.loss(rows) == pytest.approx(engine.loss(apart(rows)), rel=1e-5)
    assert engine.loss(rows)[0] != pytest.approx(engine.loss(rows._replace(documents_BT=None))[0], rel=1e-3)
    assert_near(gradients(engine, [rows]), gradients(engine, [apart(rows)]))


@pytest.mark.parametrize("engine_name", ENGINES)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_documents_may_begin_and_end_anywhere(engine_name: EngineName, name: str, data: st.DataObject) -> None:
    # An engine that compiles for each shape sees few of them.
    compiles = engine_name == "jax"
    length = data.draw(st.sampled_from((2, 31, 120)) if compiles else st.integers(2, 120))
    count = 3 if compiles else data.draw(st.integers(1, 3))
    most = 9 if compiles else 40
    cuts = [data.draw(st.sets(st.integers(1, length - 1), max_size=most)) for _ in range(count)]
    lengths = [[end - start for start, end in itertools.pairwise([0, *sorted(row), length])] for row in cuts]
    rows = packed(lengths, seed=data.draw(st.integers(0, 9)), start=data.draw(st.integers(-5, 5)))
    engine = untrained(engine_name, name)
    alone = apart(rows, (count * (most + 1), 120) if compiles else (0, 0))
    assert engine.loss(rows) == pytest.approx(engine.loss(alone), rel=1e-5)
    if rows.loss_mask_BT.any():
        assert_near(gradients(engine, [rows]), gradients(engine, [alone]))


@pytest.mark.parametrize("name", NAMES)
def test_log_probabilities_are_those_of_documents_apart(engine_name: EngineName, name: str) -> None:
    engine = untrained(engine_name, name)
    for lengths in LENGTHS.values():
        rows = packed(lengths)
        alone = apart(rows._replace(loss_mask_BT=np.ones_like(rows.loss_mask_BT)))
        reader = engine.inference()
        expected = reader.log_probabilities(alone)[alone.loss_mask_BT]
        found = reader.log_probabilities(rows)
        np.testing.assert_allclose(found.reshape(-1), expected, rtol=1e-5, atol=1e-5)
        assert -found[rows.loss_mask_BT].sum() == pytest.approx(engine.loss(rows)[0], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_documents_apart_in_any_micro_batches(engine_name: EngineName, name: str) -> None:
    rows = packed(LENGTHS["short"])
    engine = trainer(engine_name, tiny(name))
    assert_near(gradients(engine, cut(rows, 3)), gradients(engine, [apart(rows)]))
    # One row's documents may all be single tokens, from which nothing is learned.
    assert_near(gradients(engine, cut(rows, 4)), gradients(engine, [apart(rows)]))
    found, expected = engine.step(cut(rows, 2), 1.0, 0), trainer(engine_name, tiny(name)).step([apart(rows)], 1.0, 0)
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-5)
    assert float(found.gradient_norm) == pytest.approx(float(expected.gradient_norm), rel=1e-5)


def test_documents_that_count_nothing_give_no_loss(engine_name: EngineName) -> None:
    engine, rows = trainer(engine_name, tiny("gpt2")), packed([[1] * 20])
    rows.loss_mask_BT[:] = False
    assert engine.loss(rows) == (0.0, 0)
    assert np.isfinite(engine.inference().log_probabilities(rows)).all()


def test_only_where_the_numbers_change_matters(engine_name: EngineName) -> None:
    engine, lengths = trainer(engine_name, tiny("llama")), LENGTHS["short"]
    rows, later = packed(lengths), packed(lengths, start=7)
    assert later.documents_BT is not None
    assert_same(gradients(engine, [rows]), gradients(engine, [later._replace(documents_BT=later.documents_BT * 3)]))
    engine.step([rows], 1.0, 0)
    before = exported(engine)
    falling = np.ascontiguousarray(later.documents_BT[:, ::-1])
    for wrong in (falling, later.documents_BT[:, :-1], later.documents_BT[:1]):
        with pytest.raises(ValueError, match="numbers that rise"):
            engine.step([later._replace(documents_BT=wrong)], 1.0, 1)
    assert_same(exported(engine), before)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_packed_conversations_lose_what_each_loses_alone(engine_name: EngineName, name: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(2, 30, 24)
    tokens = random.integers(1, VOCABULARY, lengths.sum()).astype(np.uint16)
    write_shard(tmp_path / "a.safetensors", tokens, lengths.cumsum(), random.random(tokens.size) < 0.5)
    engine = trainer(engine_name, tiny(name, max_position_embeddings=40))
    together, alone = (
        rows.rows(0, rows.sources[0].rows)
        for rows in (batches(folder_source(tmp_path), length=40, packing=packing) for packing in ("whole", "documents"))
    )
    assert 2 * len(together.tokens_BT) < len(alone.tokens_BT) == 24
    assert engine.loss(together) == pytest.approx(engine.loss(alone), rel=1e-5)
    assert_near(gradients(engine, [together]), gradients(engine, [alone]))
