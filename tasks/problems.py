"""Problems of arithmetic as numbers: which are drawn, what they come to, and the split that each belongs to."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from common.errors import UserError
from tasks.corpus.sources import SPLITS, FileStart, Opened, Reading, Rows, SourceConfig, Split, check_column

if TYPE_CHECKING:
    import pyarrow as pa

Operator = Literal["+", "-", "*", "/"]

# N problems, K operands.
ENUMERATED_AT_MOST = 1 << 22
CANDIDATES_PER_DRAW = 1 << 18
PROBLEMS_AT_ONCE = 1 << 16
FRUITLESS_DRAWS = 50


class ProblemSource(SourceConfig):
    """What every source of problems has.

    Operators apply from left to right to a running total, which every divisor divides. All problems with the same
    operands, in any order, belong to one split, whatever the source: train 80%, validation 10%, test 10%.
    """

    kind: str
    """The generator."""
    minimum: int = 0
    """Smallest operand."""
    maximum: int = 999
    """Largest operand."""
    operators: tuple[Operator, ...] = Field(default=("+",), min_length=1)
    """Operators, each as likely as the others at every place."""
    train: int = Field(ge=1)
    """Training problems."""
    validation: int = Field(ge=1)
    """Validation problems: unique, uniform over the operands."""
    test: int = Field(ge=1)
    """Test problems: unique, uniform over the operands."""
    length_weights: tuple[float, ...] | None = None
    """How often training operands have the fewest digits that occur, one more, and so on, relative to each other;
    problems may then repeat. Null draws unique problems uniformly over the operands."""
    ripple_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the training problems with length_weights in which an inner column of digits is made to add up to nine,
    so that a carry ripples through it; these are what a model gets wrong last. For two operands and + alone."""
    seed: int = Field(default=0, ge=0)
    """Keys which problems are drawn and the order of training problems."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.minimum > self.maximum:
            raise ValueError(f"minimum {self.minimum} exceeds maximum {self.maximum}")
        if len(set(self.operators)) < len(self.operators):
            raise ValueError(f"operators {''.join(self.operators)} name one twice")
        largest = max(abs(self.minimum), abs(self.maximum), 1)
        reach = (2 * largest) ** self.operand_count if "*" in self.operators else largest * self.operand_count
        if reach >= 1 << 62:
            raise ValueError("answers would exceed 64-bit integers; take fewer or smaller operands")
        lengths = len(_operands_by_length(self))
        weights = self.length_weights
        if weights is not None and (len(weights) != lengths or min(weights) < 0 or sum(weights) <= 0):
            raise ValueError(f"length_weights has to have {lengths} numbers, none negative and not all zero")
        if self.ripple_share and (
            weights is None or self.operand_count != 2 or self.operators != ("+",) or self.minimum < 0
        ):
            raise ValueError("ripple_share needs length_weights, two operands of 0 or more, and + alone")
        return self

    @property
    def operand_count(self) -> int:
        """Operands of a problem."""
        return 2

    @property
    def span(self) -> int:
        """Number of different operands."""
        return self.maximum - self.minimum + 1

    @property
    def expressions(self) -> int:
        """Number of expressions, impossible divisions included."""
        return int(self.span**self.operand_count * len(self.operators) ** (self.operand_count - 1))

    @abstractmethod
    def table(self, problems: "Problems", split: Split, random: np.random.Generator) -> "pa.Table":
        """Problems of a split as rows of text and the source's own columns; `random` keys how they are put."""

    def possible(self, problems: "Problems") -> NDArray[np.bool_]:
        """Which problems the source can put, (N,)."""
        return np.ones(len(problems.answers_N), bool)

    def open(self, reading: Reading) -> Opened:
        """Begins to make problems. Raises UserError where more unique ones are asked for than there are."""
        for column in reading.others:
            check_column(column, self.own_columns, f"source {self.kind}")
        return Opened({"name": self.kind, "kind": self.kind}, self._parts(reading.first_file))

    def _parts(self, first_split: int) -> Iterator[Rows | FileStart]:
        for number, split in enumerate(SPLITS[first_split:], first_split):
            yield FileStart(number)
            problems = generate(self, split)
            random = np.random.default_rng([self.seed, number, 1])
            for first in range(0, len(problems.answers_N), PROBLEMS_AT_ONCE):
                part = problems.take(np.s_[first : first + PROBLEMS_AT_ONCE])
                yield Rows(self.table(part, split, random), split)


class Problems(NamedTuple):
    """Problems as arrays."""

    operands_NK: NDArray[np.int64]
    operators_NK: NDArray[np.int64]
    """Indices into the source's operators; one column fewer than operands."""
    answers_N: NDArray[np.int64]

    def take(self, rows: NDArray[np.generic] | slice) -> "Problems":
        """The problems at some rows, or under a mask."""
        return Problems(self.operands_NK[rows], self.operators_NK[rows], self.answers_N[rows])

    @staticmethod
    def concatenate(parts: list["Problems"]) -> "Problems":
        """Problems of several parts, in order."""
        return Problems(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def split_of(operands_NK: NDArray[np.int64]) -> NDArray[np.int64]:
    """The split (an index into SPLITS) of each problem: a hash of its sorted operands alone, so that it never moves.

    SplitMix64 (Steele et al., 2014), chained over the operands.
    """
    hash_N = np.zeros(len(operands_NK), np.uint64)
    for operand_N in np.sort(operands_NK, axis=1).T:
        hash_N = hash_N + operand_N.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        hash_N = (hash_N ^ (hash_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        hash_N = (hash_N ^ (hash_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        hash_N = hash_N ^ (hash_N >> np.uint64(31))
    return np.digitize((hash_N % np.uint64(10)).astype(np.int64), (8, 9))


def generate(source: ProblemSource, split: Split) -> Problems:
    """The problems of one split. Raises UserError where more unique ones are asked for than there are."""
    random = np.random.default_rng([source.seed, SPLITS.index(split)])
    if split != "train":
        return _draw_unique(source, split, getattr(source, split), random)
    if source.length_weights is None:
        return _draw_unique(source, split, source.train, random)
    return _draw_by_length(source, source.length_weights, random)


def _evaluate(
    source: ProblemSource, operands_NK: NDArray[np.int64], operators_NK: NDArray[np.int64], split: Split
) -> Problems:
    """The problems of `split` among candidates: those whose every divisor divides the running total."""
    keep_N = split_of(operands_NK) == SPLITS.index(split)
    operands_NK, operators_NK = operands_NK[keep_N], operators_NK[keep_N]
    total_N = operands_NK[:, 0].copy()
    exact_N = np.ones(len(total_N), bool)
    for place in range(source.operand_count - 1):
        operand_N = operands_NK[:, place + 1]
        for index, operator in enumerate(source.operators):
            here_N = operators_NK[:, place] == index
            left_N, right_N = total_N[here_N], operand_N[here_N]
            if operator == "+":
                total_N[here_N] = left_N + right_N
            elif operator == "-":
                total_N[here_N] = left_N - right_N
            elif operator == "*":
                total_N[here_N] = left_N * right_N
            else:
                divisor_N = np.where(right_N == 0, 1, right_N)
                exact_N[here_N] &= (right_N != 0) & (left_N % divisor_N == 0)
                total_N[here_N] = left_N // divisor_N
    problems = Problems(operands_NK, operators_NK, total_N).take(exact_N)
    return problems.take(source.possible(problems))


def _expressions(source: ProblemSource, numbers_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Operands and operators of expressions by their number, 0 to source.expressions − 1."""
    operands, operators = [], []
    for _ in range(source.operand_count):
        numbers_N, digit_N = np.divmod(numbers_N, source.span)
        operands.append(digit_N + source.minimum)
    for _ in range(source.operand_count - 1):
        numbers_N, digit_N = np.divmod(numbers_N, len(source.operators))
        operators.append(digit_N)
    return np.stack(operands, axis=1), np.stack(operators, axis=1)


def _draw_unique(source: ProblemSource, split: Split, count: int, random: np.random.Generator) -> Problems:
    if source.expressions <= ENUMERATED_AT_MOST:
        problems = _evaluate(source, *_expressions(source, np.arange(source.expressions)), split)
        found = len(problems.answers_N)
        if count > found:
            raise UserError(_too_many(split, count, f"there are only {found}"))
        return problems.take(random.permutation(found)[:count])
    return _draw_by_rejection(source, split, count, random)


def _draw_by_rejection(source: ProblemSource, split: Split, count: int, random: np.random.Generator) -> Problems:
    found: dict[bytes, None] = {}
    parts: list[Problems] = []
    fruitless = 0
    while len(found) < count:
        operands_NK = random.integers(
            source.minimum, source.maximum, (CANDIDATES_PER_DRAW, source.operand_count), endpoint=True
        )
        operators_NK = random.integers(0, len(source.operators), (CANDIDATES_PER_DRAW, source.operand_count - 1))
        problems = _evaluate(source, operands_NK, operators_NK, split)
        expressions_NK = np.concatenate([problems.operands_NK, problems.operators_NK], axis=1)
        new = []
        for row, expression in enumerate(expressions_NK):
            key = expression.tobytes()
            if key not in found and len(found) < count:
                found[key] = None
                new.append(row)
        parts.append(problems.take(np.array(new, np.int64)))
        fruitless = 0 if new else fruitless + 1
        if fruitless == FRUITLESS_DRAWS:
            tried = FRUITLESS_DRAWS * CANDIDATES_PER_DRAW
            raise UserError(_too_many(split, count, f"{tried:,} more draws found none beyond {len(found)}"))
    return Problems.concatenate(parts)


def _too_many(split: Split, count: int, found: str) -> str:
    return f"source.{split}: {count} unique problems wanted, but {found}; ask for fewer or widen minimum to maximum"


def _draw_by_length(source: ProblemSource, weights: tuple[float, ...], random: np.random.Generator) -> Problems:
    """Training problems in which each operand's number of digits is drawn by weight, then the operand itself."""
    parts: list[Problems] = []
    missing, fruitless = source.train, 0
    while missing > 0:
        operands_NK = _operands_of_drawn_length(source, weights, random)
        if source.ripple_share:
            operands_NK = _with_ripples(source, operands_NK, random)
        operators_NK = random.integers(0, len(source.operators), (len(operands_NK), source.operand_count - 1))
        problems = _evaluate(source, operands_NK, operators_NK, "train")
        parts.append(problems.take(np.arange(min(missing, len(problems.answers_N)))))
        missing -= len(parts[-1].answers_N)
        fruitless = 0 if len(problems.answers_N) else fruitless + 1
        if fruitless == FRUITLESS_DRAWS:
            raise UserError("source.train: no possible problem was found; widen minimum to maximum")
    return Problems.concatenate(parts)


def _operands_of_drawn_length(
    source: ProblemSource, weights: tuple[float, ...], random: np.random.Generator
) -> NDArray[np.int64]:
    shape = (CANDIDATES_PER_DRAW, source.operand_count)
    length_NK = random.choice(len(weights), shape, p=np.array(weights) / sum(weights))
    place_NK = random.random(shape)
    operands_NK = np.empty(shape, np.int64)
    for index, intervals in enumerate(_operands_by_length(source)):
        here_NK = length_NK == index
        offset_N = (place_NK[here_NK] * sum(len(interval) for interval in intervals)).astype(np.int64)
        first, last = intervals[0], intervals[-1]
        operands_NK[here_NK] = np.where(
            offset_N < len(first), first.start + offset_N, last.start + offset_N - len(first)
        )
    return operands_NK


def _with_ripples(
    source: ProblemSource, operands_NK: NDArray[np.int64], random: np.random.Generator
) -> NDArray[np.int64]:
    """Changes one digit of a share of the second operands, so that an inner column adds up to nine."""
    first_N, second_N = operands_NK[:, 0], operands_NK[:, 1]
    columns = len(str(source.maximum))
    place_N = 10 ** random.integers(1, max(columns - 1, 2), len(first_N))
    # 9 − a − b is how much that digit of b lacks.
    lacking_N = 9 - first_N // place_N % 10 - second_N // place_N % 10
    changed_N = second_N + lacking_N * place_N
    chosen_N = (random.random(len(first_N)) < source.ripple_share) & (second_N >= place_N)
    chosen_N &= (changed_N >= source.minimum) & (changed_N <= source.maximum)
    return np.stack([first_N, np.where(chosen_N, changed_N, second_N)], axis=1)


def _operands_by_length(source: ProblemSource) -> list[list[range]]:
    """For each number of digits that occurs, the intervals of operands that have it: negative, positive, or both."""
    longest = len(str(max(abs(source.minimum), abs(source.maximum))))
    found = []
    for digits in range(1, longest + 1):
        low, high = (0 if digits == 1 else 10 ** (digits - 1)), 10**digits - 1
        negative = range(max(-high, source.minimum), min(-max(low, 1), source.maximum) + 1)
        positive = range(max(low, source.minimum), min(high, source.maximum) + 1)
        intervals = [interval for interval in (negative, positive) if len(interval)]
        if intervals:
            found.append(intervals)
    return found
