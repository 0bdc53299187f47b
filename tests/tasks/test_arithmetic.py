import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from tasks.arithmetic import ArithmeticSource
from tasks.corpus.sources import SPLITS
from tasks.problems import Problems, generate, split_of


def source(**keys: object) -> ArithmeticSource:
    return ArithmeticSource.model_validate({"kind": "arithmetic", "train": 50, "validation": 5, "test": 5, **keys})


def evaluated(prompt: str) -> int:
    """The answer of a prompt by an evaluator of its own: from left to right, exact divisions only."""
    numbers, operators, number = [], [], ""
    for character in prompt.removesuffix("="):
        if character in "+-*/" and number not in ("", "-"):
            numbers.append(int(number))
            operators.append(character)
            number = ""
        else:
            number += character
    total = numbers[0] if numbers else int(number)
    for operator, operand in zip(operators, [*numbers[1:], int(number)], strict=True):
        if operator == "/":
            quotient, rest = divmod(total, operand)
            assert rest == 0
            total = quotient
        else:
            total = {"+": total + operand, "-": total - operand, "*": total * operand}[operator]
    return total


@settings(max_examples=40, deadline=None)
@given(
    operands=st.integers(2, 4),
    minimum=st.integers(-20, 5),
    width=st.integers(6, 60),
    operators=st.lists(st.sampled_from("+-*/"), min_size=1, max_size=4, unique=True),
    weighted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_every_answer_is_right_and_every_problem_in_its_split(
    operands: int, minimum: int, width: int, operators: list[str], weighted: bool, seed: int
) -> None:
    maximum = minimum + width
    digits = len({len(str(abs(operand))) for operand in range(minimum, maximum + 1)})
    made = source(
        operands=operands,
        minimum=minimum,
        maximum=maximum,
        operators=tuple(operators),
        length_weights=(1,) * digits if weighted else None,
        train=20,
        validation=1,
        test=1,
        seed=seed,
    )
    for index, split in enumerate(SPLITS):
        try:
            problems = generate(made, split)
        except UserError:
            # Quotients that leave no rest may be rare: of 4 to 14, none divides by two others.
            assert width < 10 or split != "train" or operators == ["/"]
            continue
        assert (split_of(problems.operands_NK) == index).all()
        assert problems.operands_NK.min() >= minimum
        assert problems.operands_NK.max() <= minimum + width
        for row in made.table(problems, split, np.random.default_rng(0)).to_pylist():
            assert int(row["target"]) == evaluated(row["prompt"])
            assert row["text"] == row["prompt"] + row["target"]


def test_the_split_ignores_the_order_and_is_pinned() -> None:
    operands_NK = np.array([[554, 456], [456, 554], [0, 0], [999, 998], [-3, 7], [7, -3]])
    splits_N = split_of(operands_NK).tolist()
    assert splits_N[0] == splits_N[1]
    assert splits_N[4] == splits_N[5]
    # A problem that moved to another split would be tested on after it was trained on.
    everything_NK = np.stack(np.divmod(np.arange(10_000), 100), axis=1)
    assert np.bincount(split_of(everything_NK)).tolist() == [7996, 989, 1015]


def test_splits_are_80_10_10() -> None:
    everything_NK = np.stack(np.divmod(np.arange(250_000), 500), axis=1)
    shares_N = np.bincount(split_of(everything_NK)) / 250_000
    np.testing.assert_allclose(shares_N, [0.8, 0.1, 0.1], atol=0.005)


def test_test_problems_are_unique_and_uniform_over_operands() -> None:
    made = source(test=60_000)
    problems = generate(made, "test")
    assert len(np.unique(problems.operands_NK, axis=0)) == 60_000
    # Each tenth of the range has its tenth of the operands: 5 standard deviations of 12,000 draws.
    counts_N = np.bincount(problems.operands_NK[:, 0] // 100)
    assert (np.abs(counts_N - 6000) < 5 * np.sqrt(6000)).all()


@pytest.mark.parametrize("weights", [(1, 1, 1), (8, 32, 60), (0, 1, 0)])
def test_lengths_are_drawn_by_weight(weights: tuple[int, ...]) -> None:
    problems = generate(source(train=30_000, length_weights=weights), "train")
    for operands_N in problems.operands_NK.T:
        lengths_N = np.char.str_len(operands_N.astype(str))
        shares_N = np.bincount(lengths_N, minlength=4)[1:] / 30_000
        np.testing.assert_allclose(shares_N, np.array(weights) / sum(weights), atol=0.02)


def test_ripples_are_in_their_share_and_stay_in_the_training_split() -> None:
    plain, rippled = (
        generate(source(train=30_000, length_weights=(0, 0, 1), ripple_share=share), "train") for share in (0.0, 0.25)
    )
    shares = [np.mean(made.operands_NK // 10 % 10 @ np.array([1, 1]) == 9) for made in (plain, rippled)]
    np.testing.assert_allclose(shares, [0.1, 0.1 * 0.75 + 0.25], atol=0.02)
    assert (split_of(rippled.operands_NK) == 0).all()
    assert (rippled.operands_NK.sum(axis=1) == rippled.answers_N).all()


def test_training_problems_are_unique_where_lengths_have_no_weights() -> None:
    problems = generate(source(train=70_000), "train")
    assert len(np.unique(problems.operands_NK, axis=0)) == 70_000


def test_the_same_seed_gives_the_same_problems_and_another_does_not() -> None:
    first, again, other = (generate(source(seed=seed), "train") for seed in (0, 0, 1))
    assert (first.operands_NK == again.operands_NK).all()
    assert (first.operands_NK != other.operands_NK).any()


def test_reversed_answers_are_written_from_the_last_digit() -> None:
    problems = Problems(np.array([[554, 456], [1, 13]]), np.array([[0], [1]]), np.array([1010, -12]))
    made = source(operators=("+", "-"), reversed_answers=True)
    assert made.table(problems, "train", np.random.default_rng(0))["target"].to_pylist() == ["0101", "21-"]


def test_more_unique_problems_than_exist_are_refused() -> None:
    with pytest.raises(UserError, match=r"source.test: 100 unique problems wanted, but there are only \d+"):
        generate(source(maximum=9, test=100), "test")


def test_more_than_exist_in_a_space_too_large_to_enumerate_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.problems.ENUMERATED_AT_MOST", 1)
    monkeypatch.setattr("tasks.problems.CANDIDATES_PER_DRAW", 1000)
    with pytest.raises(UserError, match="more draws found none"):
        generate(source(maximum=9, test=100), "test")


def test_a_large_space_gives_unique_problems_without_being_enumerated() -> None:
    made = source(operands=4, operators=("+", "-"), test=2000)
    problems = generate(made, "test")
    together_NK = np.concatenate([problems.operands_NK, problems.operators_NK], axis=1)
    assert len(np.unique(together_NK, axis=0)) == 2000


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"minimum": 5, "maximum": 4}, "minimum 5 exceeds maximum 4"),
        ({"operators": ("+", "+")}, "name one twice"),
        ({"operands": 8, "operators": ("*",)}, "64-bit"),
        ({"length_weights": (1, 1)}, "length_weights has to have 3 numbers"),
        ({"length_weights": (0, 0, 0)}, "not all zero"),
        ({"ripple_share": 0.5}, "ripple_share needs length_weights"),
    ],
)
def test_impossible_sources_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(**keys)
