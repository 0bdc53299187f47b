"""Scoring texts with any engine: the log-probability of continuations behind their contexts, each context encoded once.

B rows of a batch, T positions, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from models.engine import Batch, InferenceEngine
from models.generation import NotFinite

ROW_TOKENS = 256
"""Tokens of continuations that share a row: each attends to the row's context and to itself, but products are taken of
all, so that a row of very many costs more than it saves."""
_LOGITS_AT_ONCE = 1 << 24
"""Logits that come to the host at once: the rows of a batch times the vocabulary."""


class Request(NamedTuple):
    """A continuation to be scored behind a context."""

    context: Sequence[int]
    """One token at least."""
    continuation: Sequence[int]
    """One token at least."""


class Answer(NamedTuple):
    """What a model makes of a continuation."""

    log_probability: float
    """Of all its tokens together, each behind those before it."""
    greedy: bool
    """Whether it is what the model itself would write, taking the likeliest token each time."""


class _Row(NamedTuple):
    """A context, and some of the continuations behind it."""

    context: tuple[int, ...]
    numbers: list[int]
    """Of the requests."""
    width: int
    """Tokens of its continuations but the first of each, which the context's own pass predicts."""


def fits(request: Request, positions: int) -> bool:
    """Whether a model of so many positions reads all of it: the last token is only predicted."""
    return len(request.context) + len(request.continuation) <= positions + 1


def check_fits(continuation: Sequence[int], positions: int) -> None:
    """Raises UserError for a continuation that is longer than a model of so many positions."""
    if len(continuation) > positions:
        raise UserError(
            f"a continuation of {len(continuation):,} tokens is to be scored, and the model has {positions:,} positions"
        )


def score(
    engine: InferenceEngine,
    requests: Sequence[Request],
    batch_tokens: int,
    watch: Callable[[int], None] = lambda answered: None,
) -> list[Answer]:
    """An answer to each request, in their order.

    Contexts are encoded once for all continuations behind them; for one that is a single token, that pass is all. What
    is longer than the model's positions loses tokens at its beginning, as in lm-eval. Rows of similar length go
    together, long ones first; neither their contexts nor what follows have more than `batch_tokens` positions at once,
    unless one row alone has. `watch` is told after each batch how many requests have been answered. Neither the other
    requests nor `batch_tokens` change an answer beyond what an engine's rounding of other shapes may.

    Raises ValueError for an empty context or continuation, UserError for a continuation that is longer than the model's
    positions, and NotFinite where what the model says is not.
    """
    positions = engine.config.max_position_embeddings
    cut = [_cut(request, positions) for request in requests]
    answers: list[Answer | None] = [None] * len(cut)
    answered = 0
    for rows in _batches(_rows(cut), batch_tokens, engine.config.vocab_size):
        for number, answer in _answered(engine, rows, cut):
            answers[number] = answer
            answered += 1
        watch(answered)
    return [answer for answer in answers if answer is not None]


def score_texts(
    engine: InferenceEngine,
    requests: Sequence[Request],
    batch_tokens: int,
    watch: Callable[[int], None] = lambda answered: None,
) -> list[float]:
    """The log-probability of each continuation alone, in the order of the requests: for long ones behind short
    contexts, which share none. All have to fit into the model's positions.

    `watch` is told after each batch how many have been answered. Raises NotFinite where what the model says is not.
    """
    order = sorted(range(len(requests)), key=lambda number: -_length(requests[number]))
    found = [0.0] * len(requests)
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // _length(requests[order[start]]))
        numbers = order[start : start + count]
        for number, total in zip(numbers, _read(engine, [requests[number] for number in numbers]), strict=True):
            found[number] = total
        start += count
        watch(min(start, len(order)))
    return found


def _length(request: Request) -> int:
    return len(request.context) + len(request.continuation) - 1


def _read(engine: InferenceEngine, requests: Sequence[Request]) -> NDArray[np.float64]:
    shape = len(requests), max(map(_length, requests))
    tokens_BT, targets_BT = (np.zeros(shape, np.int32) for _ in range(2))
    counted_BT = np.zeros(shape, np.bool_)
    for row, request in enumerate(requests):
        text, length = [*request.context, *request.continuation], _length(request)
        tokens_BT[row, :length], targets_BT[row, :length] = text[:-1], text[1:]
        counted_BT[row, len(request.context) - 1 : length] = True
    found_BT = engine.log_probabilities(Batch(tokens_BT, targets_BT, counted_BT))
    totals_B: NDArray[np.float64] = found_BT.sum(axis=1, dtype=np.float64, where=counted_BT)
    _check_finite(totals_B)
    return totals_B


def _check_finite(found: NDArray[np.float32] | NDArray[np.float64]) -> None:
    if not np.isfinite(found).all():
        raise NotFinite


def _cut(request: Request, positions: int) -> Request:
    context, continuation = tuple(request.context), tuple(request.continuation)
    if not context or not continuation:
        raise ValueError("a context and its continuation have a token each at least")
    check_fits(continuation, positions)
    left = positions + 1 - len(continuation)
    return Request(context[-left:], continuation)


def _rows(requests: Sequence[Request]) -> list[_Row]:
    """Continuations under their contexts, the longest rows first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(tuple(request.context), []).append(number)
    rows = []
    for context, numbers in groups.items():
        part: list[int] = []
        size = 0
        for number in numbers:
            length = len(requests[number].continuation)
            if part and size + length > ROW_TOKENS:
                rows.append(_Row(context, part, size - len(part)))
                part, size = [], 0
            part.append(number)
            size += length
        rows.append(_Row(context, part, size - len(part)))
    return sorted(rows, key=lambda row: (-len(row.context), -row.width))


def _batches(rows: Sequence[_Row], batch_tokens: int, vocab_size: int) -> Iterator[list[_Row]]:
    at_most = max(1, _LOGITS_AT_ONCE // vocab_size)
    start = 0
    while start < len(rows):
        end = start
        length = len(rows[start].context)  # the longest
        while end < len(rows) and end - start < at_most:
            length = max(length, rows[end].width)
            if end > start and (end - start + 1) * length > batch_tokens:
                break
            end += 1
        yield list(rows[start:end])
        start = end


def _answered(
    engine: InferenceEngine, rows: Sequence[_Row], requests: Sequence[Request]
) -> Iterator[tuple[int, Answer]]:
    """The answers to the requests of a batch, by their numbers."""
    lengths_B = np.array([len(row.context) for row in rows], np.int32)
    tokens_BT = np.zeros((len(rows), int(lengths_B.max())), np.int32)
    for place, row in enumerate(rows):
        tokens_BT[place, : lengths_B[place]] = row.context
    cache, logits_BV = engine.prefill(tokens_BT, lengths_B, tokens_BT.shape[1])
    normalizer_B = _log_sum_exp(logits_BV)
    _check_finite(normalizer_B)
    likeliest_B = logits_BV.argmax(axis=1)
    # Behind the first token, the rows alone in which one continuation goes on at least.
    longer = [place for place, row in enumerate(rows) if any(len(requests[n].continuation) > 1 for n in row.numbers)]
    rest: dict[int, Answer] = {}
    if longer:
        kept = cache if len(longer) == len(rows) else engine.select(cache, np.array(longer, np.int64))
        rest = _behind(engine, kept, [rows[place] for place in longer], requests)
    for place, row in enumerate(rows):
        for number in row.numbers:
            token = requests[number].continuation[0]
            first = float(logits_BV[place, token] - normalizer_B[place])
            more = rest.get(number, Answer(0.0, True))
            yield number, Answer(first + more.log_probability, bool(likeliest_B[place] == token) and more.greedy)


def _behind(
    engine: InferenceEngine, cache: object, rows: Sequence[_Row], requests: Sequence[Request]
) -> dict[int, Answer]:
    """What all tokens but the first of each continuation are given, by the requests' numbers."""
    parts = [[(number, requests[number].continuation) for number in row.numbers] for row in rows]
    width = max(row.width for row in rows)
    tokens_BT, targets_BT, documents_BT = (np.zeros((len(rows), width), np.int32) for _ in range(3))
    counted_BT = np.zeros((len(rows), width), np.bool_)
    places: dict[int, tuple[int, slice]] = {}
    for row, part in enumerate(parts):
        end = 0
        for document, (number, continuation) in enumerate(part):
            begin, end = end, end + len(continuation) - 1
            place = slice(begin, end)
            tokens_BT[row, place], targets_BT[row, place] = continuation[:-1], continuation[1:]
            documents_BT[row, place], counted_BT[row, place] = document, True
            if end > begin:
                places[number] = (row, place)
        documents_BT[row, end:] = len(part)
    scored = engine.continuations(cache, Batch(tokens_BT, targets_BT, counted_BT, documents_BT))
    _check_finite(scored.log_probabilities_BT[counted_BT])
    return {
        number: Answer(
            float(scored.log_probabilities_BT[place].sum(dtype=np.float64)), bool(scored.greedy_BT[place].all())
        )
        for number, place in places.items()
    }


def _log_sum_exp(logits_BV: NDArray[np.float32]) -> NDArray[np.float64]:
    highest_B = logits_BV.max(axis=1).astype(np.float64)
    shifted_BV = logits_BV - highest_B[:, None]  # float64
    normalizer_B: NDArray[np.float64] = highest_B + np.log(np.exp(shifted_BV).sum(axis=1))
    return normalizer_B
