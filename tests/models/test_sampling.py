import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from models.sampling import SamplingConfig, most_probable, next_tokens, nucleus, penalised, probabilities, uniform

torch = pytest.importorskip("torch")
processors = pytest.importorskip("transformers.generation.logits_process")

ROWS = 4


def random_logits(seed: int, vocabulary: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 3, (ROWS, vocabulary)).astype(np.float32)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), vocabulary=st.integers(2, 60), count=st.integers(1, 70))
def test_top_k_keeps_what_transformers_keeps(seed: int, vocabulary: int, count: int) -> None:
    logits = random_logits(seed, vocabulary)
    theirs = processors.TopKLogitsWarper(count)(None, torch.from_numpy(logits.copy()))
    np.testing.assert_array_equal(most_probable(logits, count), torch.isfinite(theirs).numpy())


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), vocabulary=st.integers(2, 60), share=st.floats(0.05, 0.95))
def test_top_p_keeps_what_transformers_keeps(seed: int, vocabulary: int, share: float) -> None:
    logits = random_logits(seed, vocabulary)
    sums = np.cumsum(np.sort(probabilities(logits), axis=1), axis=1)
    # Where a sum is the threshold itself, fp32 and fp64 may differ.
    safe = (abs(sums - (1 - share)) > 1e-5).all(axis=1)
    theirs = torch.isfinite(processors.TopPLogitsWarper(share)(None, torch.from_numpy(logits.copy()))).numpy()
    np.testing.assert_array_equal(nucleus(logits, share)[safe], theirs[safe])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32), penalty=st.floats(0.5, 3))
def test_the_repetition_penalty_is_that_of_transformers(seed: int, penalty: float) -> None:
    logits = random_logits(seed, 12)
    tokens = np.random.default_rng(seed).integers(0, 12, (ROWS, 5))
    seen = np.zeros(logits.shape, np.bool_)
    np.put_along_axis(seen, tokens, True, axis=1)
    processor = processors.RepetitionPenaltyLogitsProcessor(penalty)
    theirs = processor(torch.from_numpy(tokens), torch.from_numpy(logits.copy())).numpy()
    np.testing.assert_allclose(penalised(logits, seen, penalty), theirs, rtol=1e-6)


def test_numbers_are_uniform_and_keyed_by_seed_row_and_position() -> None:
    rows, positions = np.meshgrid(np.arange(300), np.arange(100))
    numbers = uniform(7, rows.ravel(), positions.ravel())
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert len(np.unique(numbers)) == numbers.size
    assert abs(np.histogram(numbers, 10, (0, 1))[0] / numbers.size - 0.1).max() < 0.01
    one = np.array([1], np.int64)
    keyed = [uniform(seed, row * one, place * one)[0] for seed in (0, 1 << 40) for row in (0, 1) for place in (0, 1)]
    assert len(set(keyed)) == 8


def test_the_random_numbers_are_philox() -> None:
    # NumPy's Philox is the 64-bit variant; these are the known answers of Philox-4x32-10 for a counter and key of 0.
    words = (0x6627E8D5, 0xE169C58D)
    assert uniform(0, np.array([0]), np.array([0]))[0] == ((words[0] << 21) ^ (words[1] >> 11)) * 2.0**-53


def test_tokens_are_drawn_with_their_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    count = 20_000
    rows = np.arange(count)
    everywhere = np.broadcast_to(logits, (count, 4))

    def shares(**changes: float) -> NDArray[np.float64]:
        sampling = SamplingConfig.model_validate({"temperature": 1, **changes})
        drawn = next_tokens(everywhere, sampling, None, rows, np.zeros(count, np.int64))
        return np.bincount(drawn, minlength=4) / count

    np.testing.assert_allclose(shares(), [0.5, 0.3, 0.15, 0.05], atol=0.015)
    np.testing.assert_allclose(shares(top_k=2), [0.625, 0.375, 0, 0], atol=0.015)
    np.testing.assert_allclose(shares(top_p=0.6), [0.625, 0.375, 0, 0], atol=0.015)
    np.testing.assert_allclose(shares(temperature=0.01), [1, 0, 0, 0])
    np.testing.assert_allclose(shares(temperature=0), [1, 0, 0, 0])


def test_a_row_draws_the_same_among_any_others() -> None:
    sampling = SamplingConfig(temperature=1.3, top_p=0.9, seed=4)
    logits = random_logits(1, 30)
    rows, positions = np.array([9, 3, 7, 5]), np.array([2, 2, 8, 1])
    together = next_tokens(logits, sampling, None, rows, positions)
    for row in range(ROWS):
        one = slice(row, row + 1)
        assert next_tokens(logits[one], sampling, None, rows[one], positions[one])[0] == together[row]


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0}, {"top_k": 0}, {"seed": -1}, {"topk": 3}])
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        SamplingConfig.model_validate(wrong)
