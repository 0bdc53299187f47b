"""Word problems as a source of conversations: questions about two numbers, in many phrasings, with worked answers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

import numpy as np
from pydantic import model_validator

from common.files import canonical_json
from tasks.corpus.sources import TEXT, Split
from tasks.problems import Operator, Problems, ProblemSource

if TYPE_CHECKING:
    import pyarrow as pa

# N problems.
# What the placeholders of a phrasing stand for: {a} and {b} are the operands in their order, {a_things} is an operand
# with the things that it counts ("1 apple", "554 apples"), {a_boxes} with boxes, {name} and {other} are two people.
PHRASINGS: Mapping[Operator, Mapping[Split, tuple[str, ...]]] = {
    "+": {
        "train": (
            "What is {a} + {b}?",
            "What is {a} plus {b}?",
            "What's {a} + {b}?",
            "What is the sum of {a} and {b}?",
            "What do you get when you add {a} and {b}?",
            "How much is {a} + {b}?",
            "How much do {a} and {b} make together?",
            "{a} + {b} = ?",
            "Add {a} and {b}.",
            "Calculate {a} + {b}.",
            "Compute {a} plus {b}.",
            "Please work out {a} + {b}.",
            "Find the sum of {a} and {b}.",
            "Tell me what {a} and {b} add up to.",
            "Can you add the numbers {a} and {b} for me?",
            "{name} has {a_things} and gets {b} more. How many {things} does {name} have now?",
            "{name} has {a_things} and {other} has {b}. How many {things} do they have together?",
            "{name} finds {a_things} in the morning and {b} in the afternoon. How many {things} is that?",
            "{name} counted {a_things} on Monday and {b} on Tuesday. How many {things} did {name} count in all?",
            "{name} buys {a_things} and then {b_things}. How many {things} does {name} buy in total?",
            "{name} had {a_things}. Then {other} gave {name} {b} more. How many {things} does {name} have?",
            "One box holds {a_things} and another one holds {b}. How many {things} do both boxes hold?",
            "A shop sold {a_things} yesterday and {b_things} today. How many {things} did it sell?",
            "If {name} puts {a_things} and {b_things} into a bag, how many {things} does it hold?",
        ),
        "validation": (
            "Work out {a} plus {b}.",
            "What number is the sum {a} + {b}?",
            "{name} brings {a_things}, and {other} brings {b}. How many {things} have they brought?",
            "A cart carries {a_things} and a truck {b}. How many {things} do they carry?",
        ),
        "test": (
            "How much is {a} plus {b}?",
            "What does {a} + {b} come to?",
            "Give me the total of {a} and {b}.",
            "Please add up {a} and {b}.",
            "{name} collects {a_things} and later {b} more. How many {things} has {name} collected?",
            "A farmer packs {a_things} before noon and {b} after it. How many {things} does the farmer pack?",
            "{name} needs {a_things} for a party and {b} for a picnic. How many {things} does {name} need?",
            "There is a shelf with {a_things} and one with {b_things}. How many {things} are on the two shelves?",
        ),
    },
    "-": {
        "train": (
            "What is {a} - {b}?",
            "What is {a} minus {b}?",
            "What is the difference between {a} and {b}?",
            "How much is {a} - {b}?",
            "{a} - {b} = ?",
            "Subtract {b} from {a}.",
            "Take {b} away from {a}.",
            "Calculate {a} - {b}.",
            "Please work out {a} minus {b}.",
            "{name} has {a_things} and gives away {b}. How many {things} are left?",
            "{name} had {a_things} and lost {b}. How many {things} does {name} still have?",
            "{name} has {a_things} and {other} has {b}. How many more {things} does {name} have?",
            "A shop had {a_things} and sold {b}. How many {things} are left?",
        ),
        "validation": (
            "Find the difference between {a} and {b}.",
            "{name} gives {b} of {a_things} to {other}. How many {things} does {name} keep?",
        ),
        "test": (
            "How much is {a} minus {b}?",
            "What is left when {b} is taken from {a}?",
            "Compute the difference {a} - {b}.",
            "{name} carried {a_things} and dropped {b}. How many {things} did not fall?",
            "A box held {a_things}, and {name} took out {b}. How many {things} does it hold now?",
        ),
    },
    "*": {
        "train": (
            "What is {a} * {b}?",
            "What is {a} times {b}?",
            "What is the product of {a} and {b}?",
            "How much is {a} * {b}?",
            "{a} * {b} = ?",
            "Multiply {a} by {b}.",
            "Calculate {a} * {b}.",
            "Please work out {a} times {b}.",
            "{name} fills {a_boxes} with {b_things} each. How many {things} is that?",
            "How many {things} are in {a_boxes} of {b_things} each?",
            "A shop gets {a_boxes}, each with {b_things}. How many {things} does it get?",
        ),
        "validation": (
            "Find the product of {a} and {b}.",
            "{name} buys {a_boxes} that hold {b_things} each. How many {things} does {name} buy?",
        ),
        "test": (
            "How much is {a} times {b}?",
            "What is {a} multiplied by {b}?",
            "{name} packs {a_boxes} with {b_things} in each. How many {things} does {name} pack?",
            "If {other} sends {a_boxes} and puts {b_things} into every one, how many {things} are sent?",
        ),
    },
    "/": {
        "train": (
            "What is {a} / {b}?",
            "What is {a} divided by {b}?",
            "How much is {a} / {b}?",
            "{a} / {b} = ?",
            "Divide {a} by {b}.",
            "Calculate {a} / {b}.",
            "How many times does {b} go into {a}?",
            "{name} shares {a_things} equally among {b_boxes}. How many {things} does each box get?",
            "{name} has {a_things} for {b_boxes}, as many for each. How many {things} does a box hold?",
        ),
        "validation": (
            "Please work out {a} divided by {b}.",
            "A shop divides {a_things} among {b_boxes} evenly. How many {things} are in a box?",
        ),
        "test": (
            "How much is {a} divided by {b}?",
            "Compute {a} / {b}.",
            "{name} puts {a_things} into {b_boxes}, the same number into each. How many {things} is that per box?",
        ),
    },
}
PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Lena", "Max")
THINGS = (
    *(("apple", "apples"), ("pear", "pears"), ("coin", "coins"), ("stamp", "stamps"), ("shell", "shells")),
    *(("marble", "marbles"), ("book", "books"), ("pencil", "pencils"), ("card", "cards"), ("stone", "stones")),
)
"""What is counted: one of it, and several."""


class WordProblemSource(ProblemSource):
    """Questions such as `What is 554 + 456?` or `Anna has 554 apples and gets 456 more. How many …?` with answers such
    as `554 + 456 = <<554+456=1010>>1010`, in the calculator marks of GSM8K (Cobbe et al., arXiv 2110.14168).

    Numbers and phrasings of the test split are not in training, nor are those of the validation split, which are not
    those of the test. Nothing comes to less than zero.
    """

    kind: Literal["word_problems"]
    """The generator."""

    @model_validator(mode="after")
    def _check_things(self) -> Self:
        if self.minimum < 0:
            raise ValueError(f"minimum {self.minimum}: word problems count things, of which there are 0 or more")
        return self

    @property
    def own_columns(self) -> tuple[str, ...]:
        """The question, its answer, and both as a conversation."""
        return ("prompt", "target", "messages")

    def possible(self, problems: Problems) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
        """Which problems come to 0 or more, (N,)."""
        return problems.answers_N >= 0

    def table(self, problems: Problems, split: Split, random: np.random.Generator) -> "pa.Table":
        """Each problem as a question and its answer, in a phrasing, with people and things that are drawn."""
        # Imported here because it takes a third of a second, and planning needs only the configs.
        import pyarrow as pa

        names = (TEXT, *self.own_columns)
        columns: dict[str, list[str]] = {name: [] for name in names}
        drawn_N = random.integers(0, 1 << 32, (len(problems.answers_N), 4)).tolist()
        for (a, b), (operator,), answer, draws in zip(*(part.tolist() for part in problems), drawn_N, strict=True):
            symbol = self.operators[operator]
            prompt = _question(PHRASINGS[symbol][split], a, b, _Draws(*draws))
            target = f"{a} {symbol} {b} = <<{a}{symbol}{b}={answer}>>{answer}"
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": target}]
            values = (f"{prompt}\n{target}", prompt, target, canonical_json(messages).decode())
            for name, value in zip(names, values, strict=True):
                columns[name].append(value)
        return pa.table({name: pa.array(column, pa.string()) for name, column in columns.items()})


class _Draws(NamedTuple):
    """Large random numbers, each of which chooses something."""

    phrasing: int
    thing: int
    name: int
    other: int


def _question(phrasings: tuple[str, ...], a: int, b: int, draws: _Draws) -> str:
    thing, things = THINGS[draws.thing % len(THINGS)]
    name = draws.name % len(PEOPLE)
    # Not the same person twice.
    other = (name + 1 + draws.other % (len(PEOPLE) - 1)) % len(PEOPLE)
    return phrasings[draws.phrasing % len(phrasings)].format(
        a=a,
        b=b,
        things=things,
        a_things=f"{a} {thing if a == 1 else things}",
        b_things=f"{b} {thing if b == 1 else things}",
        a_boxes=f"{a} {'box' if a == 1 else 'boxes'}",
        b_boxes=f"{b} {'box' if b == 1 else 'boxes'}",
        name=PEOPLE[name],
        other=PEOPLE[other],
    )
