"""Word problems as a source of conversations: questions about two numbers, in many phrasings, with worked answers."""

import functools
import itertools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

import numpy as np
from pydantic import model_validator

from common.files import canonical_json, sha256_bytes
from tasks.corpus.sources import SPLITS, TEXT, Split
from tasks.problems import Operator, Problems, ProblemSource

if TYPE_CHECKING:
    import pyarrow as pa

# N problems.
# Phrasings: [one|another] is a choice, and every combination of choices is a phrasing of its own. {a} and {b} are the
# operands, {a_things} is one with the things that it counts ("1 apple", "554 apples"), {a_boxes} one with boxes, and
# {name} and {other} are two people.
_SUM = "[{a} + {b}|{a} plus {b}|the sum of {a} and {b}]"
_DIFFERENCE = "[{a} - {b}|{a} minus {b}|the difference between {a} and {b}]"
_PRODUCT = "[{a} * {b}|{a} times {b}|the product of {a} and {b}]"
_QUOTIENT = "[{a} / {b}|{a} divided by {b}|the quotient of {a} and {b}]"
_ASKED = (
    "[what is|what's|how much is|what do you get for] %s?",
    "[tell me|say|I want to know] [what|how much] %s is.",
    "[do you know|can you tell me|could you say] [what|how much] %s is?",
    "[|please ][calculate|compute|work out|find] %s[.| for me.]",
)
_IN_ALL = "[in all|altogether|in total|together]"
FRAMES: Mapping[Operator, tuple[str, ...]] = {
    "+": (
        *(frame % _SUM for frame in _ASKED),
        "[|please ][add|add up|sum up] {a} and {b}[.| for me.]",
        "[what do you get|what comes out|what is the result] [when|if] [you add|one adds] {a} and {b}?",
        "[what|how much] [do|would] {a} and {b} [make|give|come to|add up to][| together]?",
        "{a} [+|plus] {b} [= ?|is what?|equals what?|makes what?]",
        "{name} [has|owns|keeps|holds] {a_things} and [gets|finds|buys|receives] {b} more. How many {things} "
        f"[does {{name}} have|is that|are there] [now|{_IN_ALL[1:]}?",
        "{name} [has|owns|brings|holds] {a_things} and {other} [has|owns|brings|holds] {b}. How many {things} "
        f"[do they have|is that|are there] {_IN_ALL}?",
        "{name} [finds|counts|sells|picks|packs] {a_things} [in the morning|on Monday|first|before noon] and {b} "
        f"[in the afternoon|on Tuesday|later|after lunch]. How many {{things}} [is that|are there] {_IN_ALL}?",
        "[one|the first] [box|shelf|bag|cart] [holds|carries|has] {a_things} and [another|the second] [one |]"
        "[holds|carries|has] {b}. How many {things} [do both have|are in both|is that in all]?",
        "a [shop|farmer|school|library] [got|sold|ordered|gave away] {a_things} [yesterday|last week|in May] and "
        f"{{b_things}} [today|this week|in June]. How many {{things}} was that {_IN_ALL}?",
        "[if|when] {name} puts {a_things} and {b_things} into a [box|bag|cart], how many {things} "
        "[does it hold|are in it]?",
    ),
    "-": (
        *(frame % _DIFFERENCE for frame in _ASKED),
        "[|please ]subtract {b} from {a}[.| for me.]",
        "[|please ]take {b} [away from|from] {a}[.| for me.]",
        "what [is left|remains|do you get] [when|if] [you take|one takes] {b} [away from|from] {a}?",
        "{a} [-|minus] {b} [= ?|is what?|equals what?|makes what?]",
        "{name} [has|owns|keeps|holds] {a_things} and [gives away|loses|sells|uses] {b}. How many {things} "
        "[are left|does {name} still have|remain|does {name} keep]?",
        "{name} [has|owns|brings|holds] {a_things} and {other} [has|owns|brings|holds] {b}. How many more {things} "
        "[does {name} have|are those of {name}]?",
        "a [shop|farmer|school|library] [had|owned|kept] {a_things} and [sold|lost|gave away] {b}. How many {things} "
        "[were left|remained|did it keep]?",
    ),
    "*": (
        *(frame % _PRODUCT for frame in _ASKED),
        "[|please ]multiply {a} [by|with] {b}[.| for me.]",
        "[what do you get|what comes out|what is the result] [when|if] [you multiply|one multiplies] {a} by {b}?",
        "{a} [*|times] {b} [= ?|is what?|equals what?|makes what?]",
        "{name} [fills|packs|buys|gets] {a_boxes} [with|of] {b_things} each. How many {things} "
        f"[is that|are there] {_IN_ALL}?",
        "how many {things} [are in|are there in|do you find in] {a_boxes} [with|of] {b_things} each?",
        "a [shop|farmer|school|library] [got|sold|ordered|gave away] {a_boxes}, each [with|of] {b_things}. How many "
        f"{{things}} was that {_IN_ALL}?",
    ),
    "/": (
        *(frame % _QUOTIENT for frame in _ASKED),
        "[|please ]divide {a} by {b}[.| for me.]",
        "how [often|many times] does {b} [go into|fit into] {a}?",
        "{a} [/|divided by] {b} [= ?|is what?|equals what?|makes what?]",
        "{name} [shares|divides|spreads] {a_things} [evenly|equally|fairly] [among|over] {b_boxes}. How many {things} "
        "[does each box get|are in a box|is that per box]?",
        "{name} [has|owns|brings] {a_things} for {b_boxes}, [as many|the same number] for each. How many {things} "
        "[does each box get|are in a box|is that per box]?",
    ),
}
"""The phrasings of a question, those together that differ in their choices."""
PEOPLE = (
    *("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Lena", "Max"),
    *("Nora", "Oscar", "Paula", "Quinn", "Rosa", "Sam", "Tina", "Uwe", "Vera", "Will", "Yara", "Zoe"),
)
THINGS = (
    *(("apple", "apples"), ("pear", "pears"), ("coin", "coins"), ("stamp", "stamps"), ("shell", "shells")),
    *(("marble", "marbles"), ("book", "books"), ("pencil", "pencils"), ("card", "cards"), ("stone", "stones")),
    *(("plum", "plums"), ("nut", "nuts"), ("ticket", "tickets"), ("button", "buttons"), ("flower", "flowers")),
    *(("egg", "eggs"), ("cup", "cups"), ("toy", "toys"), ("ball", "balls"), ("candle", "candles")),
)
"""What is counted: one of it, and several."""


class Frame(NamedTuple):
    """Phrasings that differ in their choices."""

    name: str
    """The phrasing with the first of every choice, be it of this split or of another."""
    phrasings: tuple[str, ...]
    """Those of a split."""


@functools.cache
def frames(operator: Operator, split: Split) -> tuple[Frame, ...]:
    """The phrasings of a split, frame by frame: a hash of each decides, so that it never moves. Frames that have none
    there are left out."""
    everything = (_combinations(frame) for frame in FRAMES[operator])
    found = (
        Frame(every[0], tuple(one for one in every if SPLITS[_split_of_phrasing(one)] == split)) for every in everything
    )
    return tuple(frame for frame in found if frame.phrasings)


def _combinations(frame: str) -> list[str]:
    """A frame with every combination of its choices, each with a capital at its start."""
    parts = [part.split("|") for part in re.split(r"[\[\]]", frame)]
    return [text[:1].upper() + text[1:] for text in map("".join, itertools.product(*parts))]


def _split_of_phrasing(phrasing: str) -> int:
    """Training 80%, validation 10%, test 10%, as of numbers."""
    place = int(sha256_bytes(phrasing.encode())[:8], 16) % 10
    return max(0, place - 7)


class WordProblemSource(ProblemSource):
    """Questions such as `What is 554 + 456?` or `Anna has 554 apples and gets 456 more. How many …?` with answers such
    as `554 + 456 = <<554+456=1010>>1010`, in the calculator marks of GSM8K (Cobbe et al., arXiv 2110.14168).

    No two splits have the same numbers, in whatever order, or the same phrasing: those of the test are put together
    from the parts of the others as none of them is. Nothing comes to less than zero.
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
        """The question, its answer, both as a conversation, and the name of the frame that the question is put in."""
        return ("prompt", "target", "messages", "phrasing")

    def possible(self, problems: Problems) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
        """Which problems come to 0 or more, (N,)."""
        return problems.answers_N >= 0

    def table(self, problems: Problems, split: Split, random: np.random.Generator) -> "pa.Table":
        """Each problem as a question and its answer, in a phrasing, with people and things that are drawn."""
        # Imported here because it takes a third of a second, and planning needs only the configs.
        import pyarrow as pa

        names = (TEXT, *self.own_columns)
        columns: dict[str, list[str]] = {name: [] for name in names}
        drawn_N = random.integers(0, 1 << 32, (len(problems.answers_N), 5)).tolist()
        for (a, b), (operator,), answer, draws in zip(*(part.tolist() for part in problems), drawn_N, strict=True):
            symbol = self.operators[operator]
            choices = _Draws(*draws)
            of_split = frames(symbol, split)
            frame = of_split[choices.frame % len(of_split)]
            prompt = _question(frame, a, b, choices)
            target = f"{a} {symbol} {b} = <<{a}{symbol}{b}={answer}>>{answer}"
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": target}]
            values = (f"{prompt}\n{target}", prompt, target, canonical_json(messages).decode(), frame.name)
            for name, value in zip(names, values, strict=True):
                columns[name].append(value)
        return pa.table({name: pa.array(column, pa.string()) for name, column in columns.items()})


class _Draws(NamedTuple):
    """Large random numbers, each of which chooses something."""

    frame: int
    phrasing: int
    thing: int
    name: int
    other: int


def _question(frame: Frame, a: int, b: int, draws: _Draws) -> str:
    thing, things = THINGS[draws.thing % len(THINGS)]
    name = draws.name % len(PEOPLE)
    # Not the same person twice.
    other = (name + 1 + draws.other % (len(PEOPLE) - 1)) % len(PEOPLE)
    return frame.phrasings[draws.phrasing % len(frame.phrasings)].format(
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
