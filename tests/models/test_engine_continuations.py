"""Continuations of a cache: each is held against a plain forward pass over its prefix and itself."""

from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from models.config import ModelConfig
from models.engine import Batch, EngineName, InferenceEngine, Precision, Scored, inference_engine
from tests.models.test_engines import engine_name
from tests.models.tiny import VOCABULARY, batch, pieces, random_weights, tiny

__all__ = ["engine_name"]  # the fixture

NAMES = ["gpt2", "llama", "mixtral", "custom", "llama-tied"]
LENGTHS = np.array([13, 3, 1, 5], np.int32)
"""Of the prefixes."""
DOCUMENTS = [[11, 9], [4, 1, 6, 1, 2], [14, 10, 5], [3]]
"""Lengths of their continuations. With its prefix the first is as long as the model; all of a row may be longer."""


class Problem(NamedTuple):
    """Prefixes, their continuations, and what a plain forward pass over each pair finds."""

    prompts_BT: NDArray[np.int32]
    rows: Batch
    expected: Scored


def reader(engine_name: EngineName, config: ModelConfig, precision: Precision = "float32") -> InferenceEngine:
    return inference_engine(engine_name, config, precision, pieces(random_weights(config, 1)))


def problem(engine: InferenceEngine, lengths: list[list[int]]) -> Problem:
    """Random prefixes and continuations, of which not every target counts; every third one is the likeliest token."""
    random, size = np.random.default_rng(0), (len(LENGTHS), max(map(sum, lengths)))
    prompts_BT = batch(len(LENGTHS), int(LENGTHS.max()), 1).tokens_BT
    tokens_BT, targets_BT = (random.integers(0, VOCABULARY, size, dtype=np.int32) for _ in range(2))
    mask_BT, documents_BT = random.random(size) < 0.7, np.full(size, 99, np.int32)
    places: list[tuple[int, slice]] = []
    for row, of_row in enumerate(lengths):
        ends = np.cumsum(of_row)
        mask_BT[row, ends - 1], mask_BT[row, ends[-1] :] = True, False
        targets_BT[row, ends[-1] :] = -100
        documents_BT[row, : ends[-1]] = 3 + np.repeat(np.arange(len(of_row)), of_row)
        places += [(row, slice(end - length, end)) for end, length in zip(ends, of_row, strict=True)]
    whole = np.zeros((len(places), engine.config.max_position_embeddings), np.int32)
    for number, (row, place) in enumerate(places):
        both = [*prompts_BT[row, : LENGTHS[row]], *tokens_BT[row, place]]
        whole[number, : len(both)] = both
    logits = engine.logits(whole).astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = Scored(np.zeros(size, np.float32), np.zeros(size, np.bool_))
    for number, (row, place) in enumerate(places):
        own = logs[number, LENGTHS[row] : LENGTHS[row] + place.stop - place.start]
        targets_BT[row, place][::3] = own.argmax(-1)[::3]
        targets = targets_BT[row, place]
        expected.log_probabilities_BT[row, place] = own[np.arange(len(own)), targets]
        expected.greedy_BT[row, place] = own.argmax(-1) == targets
    several = any(len(of_row) > 1 for of_row in lengths)
    return Problem(prompts_BT, Batch(tokens_BT, targets_BT, mask_BT, documents_BT if several else None), expected)


def assert_scored(found: Scored, problem: Problem, atol: float = 1e-4) -> None:
    counted_BT = problem.rows.loss_mask_BT
    assert found.log_probabilities_BT.dtype == np.float32
    expected = np.where(counted_BT, problem.expected.log_probabilities_BT, 0)
    np.testing.assert_allclose(found.log_probabilities_BT, expected, rtol=0, atol=atol)
    np.testing.assert_array_equal(found.greedy_BT, problem.expected.greedy_BT & counted_BT)
    assert found.greedy_BT.any()


def prefilled(engine: InferenceEngine, problem: Problem) -> Any:
    return engine.prefill(problem.prompts_BT, LENGTHS, 16)[0]


@pytest.mark.parametrize("name", NAMES)
def test_each_is_scored_as_by_a_plain_forward_pass(engine_name: EngineName, name: str) -> None:
    engine = reader(engine_name, tiny(name))
    several, one = problem(engine, DOCUMENTS), problem(engine, [[11], [7], [19], [1]])
    cache = prefilled(engine, several)
    assert_scored(engine.continuations(cache, several.rows), several)
    assert_scored(engine.continuations(cache, one.rows), one)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_cache_stays_as_it_was(engine_name: EngineName, name: str) -> None:
    engine = reader(engine_name, tiny(name))
    given = problem(engine, DOCUMENTS)
    cache, untouched = prefilled(engine, given), prefilled(engine, given)
    first, again = (engine.continuations(cache, given.rows) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    tokens_B = np.array([5, 3, 0, 1], np.int32)
    (cache, found_BV), (_, expected_BV) = (engine.decode(each, tokens_B) for each in (cache, untouched))
    np.testing.assert_array_equal(found_BV, expected_BV)


@pytest.mark.parametrize("name", ["custom", "llama"])
def test_a_cache_that_has_grown_and_shrunk_is_continued(engine_name: EngineName, name: str) -> None:
    """Of rows that were read but for their last token, then with it, and that stand in another order."""
    engine = reader(engine_name, tiny(name))
    given, order = problem(engine, DOCUMENTS), np.array([3, 0, 1])
    lengths = np.maximum(LENGTHS - 1, 1)
    cache, _ = engine.prefill(given.prompts_BT, lengths, 16)
    cache = engine.select(cache, order)
    cache, _ = engine.decode(cache, given.prompts_BT[order, lengths[order]])
    expected = Scored(*(array[order] for array in given.expected))
    assert_scored(
        engine.continuations(cache, given.rows.part(order)), Problem(given[0], given.rows.part(order), expected)
    )


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bf16_stays_near_fp32(engine_name: EngineName, name: str) -> None:
    given = problem(reader(engine_name, tiny(name)), DOCUMENTS)
    engine = reader(engine_name, tiny(name), "bfloat16")
    found = engine.continuations(prefilled(engine, given), given.rows)
    difference = abs(found.log_probabilities_BT - given.expected.log_probabilities_BT)[given.rows.loss_mask_BT]
    assert difference.max() < 0.15
    assert difference.mean() < 0.03


def test_nothing_that_counts_is_nothing(engine_name: EngineName) -> None:
    engine = reader(engine_name, tiny("llama"))
    given = problem(engine, DOCUMENTS)
    rows = given.rows._replace(loss_mask_BT=np.zeros_like(given.rows.loss_mask_BT))
    found = engine.continuations(prefilled(engine, given), rows)
    assert not found.log_probabilities_BT.any()
    assert not found.greedy_BT.any()


def test_odd_batches_are_refused(engine_name: EngineName) -> None:
    engine = reader(engine_name, tiny("gpt2"))
    given = problem(engine, DOCUMENTS)
    cache, rows = prefilled(engine, given), given.rows
    assert rows.documents_BT is not None
    with pytest.raises(ValueError, match="4 rows, as in the cache"):
        engine.continuations(cache, rows.part(slice(3)))
    with pytest.raises(ValueError, match="vocabulary of 23"):
        engine.continuations(cache, rows._replace(tokens_BT=rows.tokens_BT + VOCABULARY))
    with pytest.raises(ValueError, match=r"targets from .* vocabulary of 23"):
        engine.continuations(cache, rows._replace(targets_BT=rows.targets_BT + VOCABULARY))
    with pytest.raises(ValueError, match="numbers that rise"):
        engine.continuations(cache, rows._replace(documents_BT=-rows.documents_BT))
    with pytest.raises(ValueError, match="up to 25 tokens: at most 24"):
        engine.continuations(cache, batch(len(LENGTHS), 12, padded=False))
