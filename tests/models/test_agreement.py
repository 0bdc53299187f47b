"""Every engine against every other in one call: logits, log-probabilities, gradients, generated tokens.

The largest differences are printed: `pytest -rP` shows them.

B rows, T positions, V vocabulary.
"""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from models.engine import EngineName
from models.generation import generate
from models.sampling import SamplingConfig, next_tokens
from tests.models.agreement import (
    HERE,
    MODELS,
    VOCABULARY,
    by_engine,
    gradients,
    largest_share,
    pairs_of,
    reader,
    rows_of,
    several_engines,
    small,
    tell,
    trainer,
)
from tests.models.tiny import cut

pytestmark = [several_engines, pytest.mark.agreement]
NEW_TOKENS = 24
DRAWN = SamplingConfig(max_new_tokens=NEW_TOKENS, temperature=0.9, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=3)
CLOSE_CALL = 2e-3
"""Where the two best logits are this near, engines may choose either."""


@pytest.mark.parametrize("variant", MODELS)
def test_logits_agree(variant: str) -> None:
    tokens_BT = rows_of("long", 4).tokens_BT
    found = by_engine(lambda engine: reader(engine, small(variant)).logits(tokens_BT))
    for names, one, other in pairs_of(found):
        difference = float(abs(one - other).max())
        tell(names, difference)
        assert difference <= 1e-4, names
        assert one.std() > 0.5  # logits near zero would agree whatever is wrong


@pytest.mark.parametrize("variant", MODELS)
def test_log_probabilities_agree(variant: str) -> None:
    config = small(variant)
    for kind in ("short", "long"):
        rows = rows_of(kind, 4)
        found = by_engine(lambda engine, rows=rows: reader(engine, config).log_probabilities(rows))  # type: ignore[misc]  # rows are given
        for names, one, other in pairs_of(found):
            difference = float(abs(one - other).max())
            tell(kind, names, difference)
            assert difference <= 1e-4, f"{kind}: {names}"


@pytest.mark.parametrize("variant", MODELS)
def test_gradients_agree(variant: str) -> None:
    """Of several micro-batches of other sizes, with loss masks: plain rows, and long ones of several documents."""
    batches = [rows_of("short", 3), *cut(rows_of("long", 5), 2)]
    found = by_engine(lambda engine: gradients(trainer(engine, small(variant)), batches))
    for names, one, other in pairs_of(found):
        share, where = largest_share(one, other)
        tell(names, share)
        assert share <= 1, f"{names}: {where}"


def prompts(count: int = 24) -> list[list[int]]:
    random = np.random.default_rng(2)
    return [random.integers(0, VOCABULARY, random.integers(1, 17)).tolist() for _ in range(count)]


class Answers:
    """What every engine answers, and whether each token of it was a clear choice by the logits of one of them."""

    def __init__(self, variant: str, sampling: SamplingConfig) -> None:
        # Larger weights than elsewhere, whose logits are further apart and less often say one token again and again.
        engines = by_engine(lambda engine: reader(engine, small(variant, initializer_range=0.2)))
        self.prompts, self.sampling = prompts(), sampling
        self.found = {name: generate(engine, self.prompts, sampling, {7, 8}) for name, engine in engines.items()}
        self._first = HERE[0]
        self._reader = engines[self._first]

    def compare(self, clear: Callable[[NDArray[np.float32], int, list[int]], bool]) -> None:
        """Holds each row to the first engine's up to its first choice that is not clear.

        `clear` is given the logits (V,) that a token was chosen by, the row's number and its tokens up to there.
        Most rows have to be compared to their end.
        """
        ended = compared = 0
        for row, prompt in enumerate(self.prompts):
            answers = {name: answers[row] for name, answers in self.found.items()}
            tokens = prompt + answers[self._first]
            logits_TV = self._reader.logits(np.array([tokens + [0] * (40 - len(tokens))], np.int32))[0]
            places = range(len(prompt), len(tokens))
            end = next((at for at in places if not clear(logits_TV[at - 1], row, tokens[:at])), None)
            ended += end is None
            compared += (end or len(tokens)) - len(prompt)
            for name, answer in answers.items():
                length = None if end is None else end - len(prompt)
                assert answer[:length] == answers[self._first][:length], f"row {row} of {name}"
        tell("rows compared to their end:", ended, "of", len(self.prompts), "tokens:", compared)
        assert ended >= 0.75 * len(self.prompts)


@pytest.mark.parametrize("variant", MODELS)
def test_generated_tokens_agree(variant: str) -> None:
    answers = Answers(variant, SamplingConfig(max_new_tokens=NEW_TOKENS))

    def clear(logits_V: NDArray[np.float32], row: int, tokens: list[int]) -> bool:
        second, first = np.partition(logits_V, -2)[-2:]
        return bool(first - second > CLOSE_CALL)

    answers.compare(clear)
    assert len({tuple(answer[-6:]) for answer in answers.found[HERE[0]]}) > 12  # the rows say different things
    # Here, where what it needs is compiled: the sampler is one for all engines, so what it draws is the same wherever
    # no rounding can decide it. A choice is clear where logits moved at random by up to 1e-4 give the same token.
    answers, random = Answers(variant, DRAWN), np.random.default_rng(0)

    def settled(logits_V: NDArray[np.float32], row: int, tokens: list[int]) -> bool:
        moved_BV = logits_V + random.uniform(-1e-4, 1e-4, (16, VOCABULARY)).astype(np.float32)
        seen_BV = np.zeros((16, VOCABULARY), np.bool_)
        seen_BV[:, tokens] = True
        numbers_B, places_B = (np.full(16, number, np.int64) for number in (row, len(tokens)))
        return len(set(next_tokens(moved_BV, DRAWN, seen_BV, numbers_B, places_B).tolist())) == 1

    answers.compare(settled)


def test_another_seed_draws_other_tokens() -> None:
    """Or else the agreement above would show nothing."""
    names: list[EngineName] = HERE[:1]
    engine = reader(names[0], small("gpt2"))
    drawn = [
        generate(engine, prompts(), SamplingConfig(max_new_tokens=4, temperature=0.9, seed=seed), {7})
        for seed in (3, 4)
    ]
    assert sum(one != other for one, other in zip(*drawn, strict=True)) > 20
