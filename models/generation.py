"""Continuing prompts with any engine: batches of similar length, a key-value cache, finished rows dropped.

B rows of a batch, T positions, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from models.engine import InferenceEngine
from models.sampling import SamplingConfig, next_tokens


class NotFinite(UserError):
    """What a model says of the next token is NaN or infinite, which no text and no score can be made of."""

    def __init__(self, model: str = "the model") -> None:
        super().__init__(f"what {model} says of the next token is not finite: look at the losses of its training")


def generate(
    engine: InferenceEngine,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    stop_ids: Collection[int],
    batch_size: int = 1024,
    ended: Callable[[Sequence[int]], bool] | None = None,
    watch: Callable[[int], None] = lambda answered: None,
) -> list[list[int]]:
    """The new tokens of each prompt, in the order of the prompts, with the stop token that ended them, if one did.

    A row ends at a stop token, where `ended` says so of its new tokens, after `max_new_tokens`, or when prompt and
    continuation fill the model's `max_position_embeddings`. `watch` is told after each batch how many prompts have been
    answered, and may raise what stops it. Neither `batch_size` nor the other prompts change what a
    row gets, beyond what an engine's rounding of other shapes may.

    Raises ValueError for a prompt that is empty or too long, and NotFinite where the model's logits are not finite.
    """
    longest = engine.config.max_position_embeddings
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= longest:
            raise ValueError(f"prompt {number} has {len(prompt)} tokens; 1 to {longest} were expected")
    # Neighbours of equal length waste no padding; long ones first, so that too large a batch fails at once.
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        numbers = np.array(order[start : start + batch_size], np.int64)
        _continue_rows(engine, prompts, numbers, sampling, frozenset(stop_ids), answers, ended)
        watch(start + len(numbers))
    return answers


def _continue_rows(
    engine: InferenceEngine,
    prompts: Sequence[Sequence[int]],
    numbers_B: NDArray[np.int64],
    sampling: SamplingConfig,
    stop_ids: frozenset[int],
    answers: list[list[int]],
    ended: Callable[[Sequence[int]], bool] | None,
) -> None:
    """Appends to the answers of the prompts `numbers_B`, which are one batch."""
    limit = engine.config.max_position_embeddings
    lengths_B = np.array([len(prompts[number]) for number in numbers_B], np.int64)
    tokens_BT = np.zeros((len(numbers_B), int(lengths_B.max())), np.int32)
    for row, number in enumerate(numbers_B):
        tokens_BT[row, : lengths_B[row]] = prompts[number]
    capacity = min(limit, int(lengths_B.max()) + sampling.max_new_tokens)
    cache, logits_BV = engine.prefill(tokens_BT, lengths_B.astype(np.int32), capacity)
    seen_BV = _seen(tokens_BT, lengths_B, logits_BV.shape[1]) if sampling.repetition_penalty != 1 else None
    stops = np.array(sorted(stop_ids), np.int32)
    open_B = lengths_B < limit
    numbers_B, lengths_B, logits_BV = numbers_B[open_B], lengths_B[open_B], logits_BV[open_B]
    if not open_B.all():
        cache = engine.select(cache, np.flatnonzero(open_B))
        seen_BV = None if seen_BV is None else seen_BV[open_B]
    for left in range(sampling.max_new_tokens - 1, -1, -1):
        # NaN is a row's maximum wherever it stands; a token that is impossible does no harm.
        if not np.isfinite(logits_BV.max(axis=1)).all():
            raise NotFinite
        tokens_B = next_tokens(logits_BV, sampling, seen_BV, numbers_B, lengths_B)
        new_B = ~np.isin(tokens_B, stops)
        for number, token in zip(numbers_B.tolist(), tokens_B.tolist(), strict=True):
            answers[number].append(token)
        if ended is not None:
            new_B &= [not ended(answers[number]) for number in numbers_B.tolist()]
        lengths_B = lengths_B + 1
        going = np.flatnonzero(new_B & (lengths_B < limit))
        if not left or not going.size:
            return
        if going.size < new_B.size:
            cache = engine.select(cache, going)
            numbers_B, lengths_B, tokens_B = numbers_B[going], lengths_B[going], tokens_B[going]
            seen_BV = None if seen_BV is None else seen_BV[going]
        if seen_BV is not None:
            seen_BV[np.arange(len(tokens_B)), tokens_B] = True
        cache, logits_BV = engine.decode(cache, tokens_B)


def _seen(tokens_BT: NDArray[np.int32], lengths_B: NDArray[np.int64], vocabulary: int) -> NDArray[np.bool_]:
    """Which tokens each prompt has, (B, V)."""
    seen_BV = np.zeros((len(tokens_BT), vocabulary), np.bool_)
    for row, length in enumerate(lengths_B):
        seen_BV[row, tokens_BT[row, :length]] = True
    return seen_BV
