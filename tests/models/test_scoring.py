import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.errors import UserError
from models.engine import EngineName, InferenceEngine, inference_engine
from models.generation import NotFinite
from models.scoring import ROW_TOKENS, Answer, Request, fits, score, score_texts
from models.weights import whole_pieces
from tests.models.tiny import VOCABULARY, random_weights, tiny

CONFIG = tiny("llama")
POSITIONS = CONFIG.max_position_embeddings
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=POSITIONS)


def reader(engine: EngineName) -> InferenceEngine:
    return inference_engine(engine, CONFIG, "float32", whole_pieces(random_weights(CONFIG, 3)))


TORCH = reader("torch")


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def slowly(engine: InferenceEngine, request: Request) -> Answer:
    """One whole pass over one request, as lm-eval's own model makes it."""
    text = [*request.context, *request.continuation][-(POSITIONS + 1) :]
    found_TV = log_softmax(engine.logits(np.array([text[:-1]], np.int32))[0])[-len(request.continuation) :]
    wanted = np.array(request.continuation)
    total = found_TV[np.arange(len(wanted)), wanted].sum()
    return Answer(float(total), bool((found_TV.argmax(axis=1) == wanted).all()))


def same(found: list[Answer], expected: list[Answer], within: float = 1e-4) -> None:
    assert [answer.greedy for answer in found] == [answer.greedy for answer in expected]
    np.testing.assert_allclose(
        [answer.log_probability for answer in found], [answer.log_probability for answer in expected], atol=within
    )


@settings(max_examples=30, deadline=None)
@given(
    contexts=st.lists(TOKENS, min_size=1, max_size=4),
    asked=st.lists(st.tuples(st.integers(0, 3), TOKENS), min_size=1, max_size=10),
    batch_tokens=st.integers(1, 200),
)
def test_answers_are_those_of_a_whole_pass_over_each_request(
    contexts: list[list[int]], asked: list[tuple[int, list[int]]], batch_tokens: int
) -> None:
    requests = [Request(contexts[number % len(contexts)], continuation) for number, continuation in asked]
    same(score(TORCH, requests, batch_tokens), [slowly(TORCH, request) for request in requests])


@pytest.mark.parametrize("engine", ["jax", "mlx"])
def test_engines_answer_the_same(engine: EngineName) -> None:
    contexts = [[1, 2, 3, 4, 5], [6], [number % VOCABULARY for number in range(POSITIONS)]]
    requests = [Request(context, ending) for context in contexts for ending in ([7], [8, 9, 10], [11, 12])]
    same(score(reader(engine), requests, 4096), score(TORCH, requests, 4096))


class Counting:
    """An engine that counts what it is asked."""

    def __init__(self, engine: InferenceEngine) -> None:
        self._engine, self.calls = engine, list[tuple[str, tuple[int, ...]]]()

    def __getattr__(self, name: str) -> object:
        found = getattr(self._engine, name)
        if name not in ("prefill", "continuations", "select"):
            return found

        def counted(*arguments: object) -> object:
            tokens = arguments[0] if name == "prefill" else getattr(arguments[1], "tokens_BT", None)
            self.calls.append((name, () if tokens is None else np.shape(tokens)))  # type: ignore[arg-type]
            return found(*arguments)

        return counted


def test_a_context_is_read_once_for_all_that_follows_it_and_alone_where_that_is_one_token() -> None:
    context = [1, 2, 3, 4, 5, 6]
    engine = Counting(TORCH)
    score(engine, [Request(context, [token]) for token in range(5)], 4096)  # type: ignore[arg-type]
    assert engine.calls == [("prefill", (1, 6))]
    engine.calls.clear()
    score(engine, [Request(context, [token, 7, 8]) for token in range(5)], 4096)  # type: ignore[arg-type]
    assert engine.calls == [("prefill", (1, 6)), ("continuations", (1, 10))]


def test_very_many_continuations_of_one_context_are_spread_over_rows() -> None:
    random = np.random.default_rng(0)
    endings = [random.integers(0, VOCABULARY, 4).tolist() for _ in range(3 * ROW_TOKENS // 4)]
    engine = Counting(TORCH)
    requests = [Request([5], ending) for ending in endings]
    found = score(engine, requests, 4096)  # type: ignore[arg-type]
    assert engine.calls[0] == ("prefill", (3, 1))
    same(found[:5], [slowly(TORCH, request) for request in requests[:5]])


@settings(max_examples=30, deadline=None)
@given(
    contexts=st.lists(st.integers(1, POSITIONS), min_size=1, max_size=6),
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(1, POSITIONS)), min_size=1, max_size=24),
    batch_tokens=st.integers(1, 200),
)
def test_neither_contexts_nor_what_follows_them_are_more_at_once_than_was_asked(
    contexts: list[int], lengths: list[tuple[int, int]], batch_tokens: int
) -> None:
    requests = [Request([1] * contexts[number % len(contexts)], [2] * length) for number, length in lengths]
    engine = Counting(TORCH)
    score(engine, requests, batch_tokens)  # type: ignore[arg-type]
    shapes = [shape for name, shape in engine.calls if name != "select"]
    assert all(rows == 1 or rows * width <= batch_tokens for rows, width in shapes)
    read = [shape[1] for name, shape in engine.calls if name == "prefill"]
    assert read == sorted(read, reverse=True)


def test_long_texts_behind_one_token_are_spread_over_batches() -> None:
    requests = [Request([0], [number % VOCABULARY, *[1] * (POSITIONS - 1)]) for number in range(60)]
    engine = Counting(TORCH)
    found = score(engine, requests, 2 * ROW_TOKENS)  # type: ignore[arg-type]
    assert [shape[0] for name, shape in engine.calls if name == "continuations"] == [2, 2, 2]
    same(found, [slowly(TORCH, request) for request in requests])


def test_whole_texts_behind_a_token() -> None:
    requests = [Request([1], [2, 3, 4]), Request([1, 9], list(range(POSITIONS - 2))), Request([0], [0])]
    told: list[int] = []
    found = score_texts(TORCH, requests, 8, told.append)
    np.testing.assert_allclose(found, [slowly(TORCH, one).log_probability for one in requests], atol=1e-4)
    assert told[-1] == 3


def test_it_is_told_how_far_it_is() -> None:
    told: list[int] = []
    score(TORCH, [Request([token], [1, 2]) for token in range(5)], 2, told.append)
    assert told == [2, 4, 5]


def test_bad_requests() -> None:
    with pytest.raises(ValueError, match="a token each at least"):
        score(TORCH, [Request([], [1])], 64)
    with pytest.raises(ValueError, match="a token each at least"):
        score(TORCH, [Request([1], [])], 64)
    with pytest.raises(UserError, match=rf"{POSITIONS + 1} tokens is to be scored, and the model has {POSITIONS}"):
        score(TORCH, [Request([1], [1] * (POSITIONS + 1))], 64)
    assert fits(Request([1], [1] * POSITIONS), POSITIONS)
    assert not fits(Request([1, 1], [1] * POSITIONS), POSITIONS)


@pytest.mark.parametrize("ending", [[1], [1, 2, 3]])
def test_weights_that_are_no_numbers_are_an_error_that_says_so(ending: list[int]) -> None:
    weights = random_weights(CONFIG, 3)
    weights["model.norm.weight"][:] = np.nan
    broken = inference_engine("torch", CONFIG, "float32", whole_pieces(weights))
    with pytest.raises(NotFinite, match="not finite"):
        score(broken, [Request([1, 2], ending)], 64)
    with pytest.raises(NotFinite, match="not finite"):
        score_texts(broken, [Request([1, 2], ending)], 64)
