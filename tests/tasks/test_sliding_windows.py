import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.config import ModelConfig
from models.engine import InferenceEngine, inference_engine
from models.generation import NotFinite
from models.weights import whole_pieces
from tasks.sliding_windows import BATCHES_SORTED, negative_log_likelihoods, windows
from tests.tasks.test_publish import ARCHITECTURES, SHAPE, random_weights

VOCABULARY = 18
LONGEST = 16
RANDOM = np.random.default_rng(0)
DOCUMENTS = [RANDOM.integers(0, VOCABULARY, length).tolist() for length in (41, 1, 7, 2, 17, 16, 1, 23)]
"""Longer than any window, shorter, and with nothing behind what stands before a document."""


@functools.cache
def engine_of(architecture: str) -> InferenceEngine:
    config = ModelConfig.model_validate({"vocab_size": VOCABULARY, **SHAPE, **ARCHITECTURES[architecture]})
    return inference_engine("torch", config, "float32", whole_pieces(random_weights(config)))


def token_losses(engine: InferenceEngine, tokens: Sequence[int]) -> NDArray[np.float64]:
    """−ln p of all tokens but the first, from one forward pass over them all."""
    logits = engine.logits(np.array([tokens[:-1]], np.int32))[0].astype(np.float64)
    found: NDArray[np.float64] = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(tokens) - 1), tokens[1:]]
    return found


def one_pass_per_token(engine: InferenceEngine, tokens: Sequence[int], window: int, stride: int) -> NDArray[np.float64]:
    """Each token alone, behind what the definition says that it is scored behind."""
    found = np.zeros(len(tokens) - 1)
    for target in range(1, len(tokens)):
        end = window if target <= window else window + math.ceil((target - window) / stride) * stride
        begin = max(0, min(end, len(tokens) - 1) - window)
        found[target - 1] = token_losses(engine, tokens[begin : target + 1])[-1]
    return found


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 20))
def test_windows_score_every_token_once_with_its_context(length: int, window: int, stride: int) -> None:
    stride = min(stride, window)
    tokens = list(range(length))
    scored: list[int] = []
    for part in windows(tokens, window, stride):
        assert len(part.tokens) <= window + 1
        assert part.tokens == tokens[part.tokens[0] : part.tokens[-1] + 1]
        new = part.tokens[len(part.tokens) - part.scored :]
        for token in new:
            assert token - part.tokens[0] >= min(token, window - stride + 1)
        scored += new
    assert scored == tokens[1:]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_window_as_long_as_the_text_gives_the_plain_loss(architecture: str) -> None:
    engine = engine_of(architecture)
    short = [tokens for tokens in DOCUMENTS if 1 < len(tokens) <= LONGEST + 1]
    assert max(map(len, short)) == LONGEST + 1
    found = list(negative_log_likelihoods(engine, short, LONGEST, 1, batch_size=3))
    for tokens, losses in zip(short, found, strict=True):
        assert abs(losses.mean() - token_losses(engine, tokens).mean()) < 1e-6


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["gpt2", "llama"]), st.integers(1, LONGEST), st.integers(1, LONGEST), st.sampled_from([1, 2, 3, 64])
)
def test_documents_of_any_length_are_as_one_pass_per_token_says(
    architecture: str, window: int, stride: int, batch_size: int
) -> None:
    engine, stride = engine_of(architecture), min(stride, window)
    told: list[int] = []
    found = list(negative_log_likelihoods(engine, DOCUMENTS, window, stride, batch_size, told.append))
    assert sum(told) == sum(len(tokens) - 1 for tokens in DOCUMENTS)
    for tokens, losses in zip(DOCUMENTS, found, strict=True):
        np.testing.assert_allclose(losses, one_pass_per_token(engine, tokens, window, stride), rtol=0, atol=1e-4)


def test_the_size_of_batches_changes_nothing() -> None:
    engine = engine_of("llama")
    one, few, many = (
        np.concatenate(list(negative_log_likelihoods(engine, DOCUMENTS, 8, 3, size))) for size in (1, 5, 100)
    )
    np.testing.assert_allclose([few, many], [one] * 2, rtol=1e-5)


def test_documents_are_read_as_they_are_scored() -> None:
    engine, begun = engine_of("llama"), itertools.count()
    # They never end, so that whoever reads them all is lost.
    endless = (tokens for tokens in itertools.cycle(DOCUMENTS) if next(begun) >= 0)
    found = list(itertools.islice(negative_log_likelihoods(engine, endless, LONGEST, LONGEST, 2), 24))
    np.testing.assert_allclose(np.concatenate(found[:8]), np.concatenate(found[16:]), rtol=1e-5)
    assert next(begun) < 24 + 2 * 2 * BATCHES_SORTED


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_no_loss(value: float) -> None:
    config = engine_of("llama").config
    arrays = dict(random_weights(config))
    arrays["model.norm.weight"] = np.full_like(arrays["model.norm.weight"], value)
    engine = inference_engine("torch", config, "float32", whole_pieces(arrays))
    with pytest.raises(NotFinite, match="the model says of the next token is not finite: look at the losses of its"):
        list(negative_log_likelihoods(engine, DOCUMENTS, 8, 4, 2))
