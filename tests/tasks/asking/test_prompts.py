"""The suite itself: what its questions take for right, and what for wrong."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from common.strict_yaml import StrictLoader
from tasks.asking.answers import Exact, Form, Numeric, Program, Python, Regex, Set
from tasks.asking.programs import code_in, works
from tasks.asking.questions import KINDS, Category, Question, known_categories, read_category
from tasks.asking.sandbox import run, same
from tasks.asking.scorers import is_right
from tasks.asking.words import names, normalised
from tests.tasks.asking import solutions

CATEGORIES = {
    "knowledge": "geography literature history science astronomy",
    "mathematics": "addition multiplication word-problems-easy word-problems-medium algebra",
    "instruction": "count format sequence binary fill-blank",
    "reasoning": "comparison logic common-sense pattern temporal",
    "code": "code-basic code-concept code-function",
    "language": "antonym grammar translation correction",
    "explanation": "explain-science explain-biology explain-physics",
    "creation": "poetry naming",
    "classification": "classify-grammar classify-sentiment classify-knowledge",
}
SUITE = [read_category(path) for path in known_categories().values()]
NAMES = [category.category for category in SUITE]
ANSWERS = yaml.load((Path(__file__).parent / "answers.yaml").read_text(encoding="utf-8"), StrictLoader)
# Worked out from the questions, in their order.
SOLVED: dict[str, list[float]] = {
    "word-problems-easy": [
        *(3 + 2, 9 - 4, 6 * 4, 12 / 4, 8 + 5, 2 * 7, 14 + 11, 20 - 8, 30 / 5, 18 + 7, 90 - 35, 4 * 9, 24 / 3),
        *(5 * 6, 17 - 9, 45 + 38, 8 * 7, 21 - 6, 50 / 10, 12 * 3, 150 - 120, 16 / 2, 7 * 3, 125 + 75),
    ],
    "word-problems-medium": [
        *(50 - 3 * 8, 5 + 5 * 2, (24 - 4) / 5, 12 + 5 - 3, 4 * 2 + 3 * 5, 9 * 6 * 5, 2 * (20 + 15), 15 + 25 * 3),
        *(40 - 40 / 4 + 6, 5 * 2 + 4, 12 * 7 + 5 - 30, 18 * 2 + 10, 15 * 8 - 95, 6 * 20 / 30, 2 * 40 * 0.75),
        *(200 / 2 - 5 * 6, (10 + 14 + 18) / 3, 12 * 15 - 35, 3 * 16 / 2, 4 + 2 * 11, 5 * 4 + 8 * 2),
        *((60 - 12) * 2 / 3, (30 + 45) * 4, 240 / 60 + 1),
    ],
    "algebra": [
        *(12 - 5, 13 + 4, 24 / 3, 6 * 4, (21 - 1) / 2, (22 + 3) / 5, 2 * 6 + 3, 10 - 4 * 3, 3 + 2 * 8, 9**2),
        *(3 * (4 + 2) - 5, 6 + 2 * 7, 4 - 10, (51 - 7) / 4, 24 / 2 - 3, 7 - 3, 9 / (5 - 2), (8 - 2) * 3),
        *((19 + 5) / (6 - 4), 36**0.5, 3 * 20 / 4, 2 * 5 - 1, (34 - 6) / 2, (9**2 + 3) / 4),
    ],
}
MOST_BY_ONE = 0.6
"""The largest share of a category's questions that one answer to all may get right."""


class Asked(NamedTuple):
    category: Category
    question: Question


ASKED = [Asked(category, question) for category in SUITE for question in category.questions]
CODE = [one for one in ASKED if isinstance(one.question.answer, Python)]


def right(question: Question, said: str) -> bool:
    """As the stage has it, for what holds no code."""
    answer = question.answer
    if isinstance(answer, Python):
        assert not code_in(said), said
        return False
    return is_right(answer, said)


def test_the_suite_has_its_categories_and_each_enough_questions() -> None:
    found = {kind: {one.category for one in SUITE if one.kind == kind} for kind in KINDS}
    assert found == {kind: set(names.split()) for kind, names in CATEGORIES.items()}
    assert len(SUITE) == 35
    assert {one.category: len(one.questions) for one in SUITE if len(one.questions) < 20} == {}


def test_no_question_stands_twice() -> None:
    seen: dict[str, str] = {}
    twice = []
    for category, question in ASKED:
        key = normalised(question.ask).rstrip("?!. ")
        twice += [(seen[key], category.category, question.ask)] if key in seen else []
        seen[key] = category.category
    assert not twice


def echoes(ask: str) -> Iterator[str]:
    """A question said back, whole and in part."""
    yield from (ask, ask.lower(), f'"{ask}"', f"{ask}\n{ask}", f"{ask} {ask}", f"Question: {ask}\nAnswer:")
    yield f"The answer is: {ask}"
    yield from re.split(r"(?<=[.?!:]) ", ask)


def test_no_question_answers_itself() -> None:
    said = [
        (category.category, text)
        for category, question in ASKED
        for text in (*echoes(question.ask), "", " \n", ".", "?", "I do not know.", "I don't know.", "None", "Answer:")
        if right(question, text)
    ]
    assert not said


def constant_answers(category: Category) -> set[str]:
    """What might be said to all questions of a category: its right answers, its keys, its words, and what is always
    said."""
    said = {"Yes.", "No.", "Yes", "No", "True", "False", "0", "1", "It depends."}
    for question in category.questions:
        said.update(re.findall(r"\w+", f"{question.ask} {question.answer.described}"))
        said.update(ANSWERS.get(category.category, {}).get(question.ask, {}).get("right", ()))
        match question.answer:
            case Exact(exact=texts) | Set(set=texts):
                said.update((*texts, ", ".join(texts)))
            case Numeric(numeric=number):
                said.add(f"{number:g}")
    return {text for text in said if not code_in(text)}


@pytest.mark.parametrize("category", SUITE, ids=NAMES)
def test_no_answer_to_everything_gets_far(category: Category) -> None:
    shares = {
        said: sum(right(question, said) for question in category.questions) / len(category.questions)
        for said in constant_answers(category)
    }
    best = max(shares, key=lambda said: shares[said])
    assert shares[best] <= MOST_BY_ONE, best


def test_neither_the_first_nor_the_last_that_is_offered_is_always_right() -> None:
    """Over all the questions whose keys name what is right and what is not."""
    first, of = 0, 0
    for _, question in ASKED:
        answer = question.answer
        if isinstance(answer, Set) and answer.others:
            ask = normalised(question.ask)
            wanted = [ask.find(normalised(text)) for text in answer.set if names(ask, text)]
            others = [ask.find(normalised(text)) for text in answer.others if names(ask, text)]
            if wanted and others:
                of += 1
                first += min(wanted) < min(others)
    assert of > 60
    assert 1 - MOST_BY_ONE <= first / of <= MOST_BY_ONE


def test_a_choice_of_two_has_the_chance_of_one() -> None:
    """Not those of code, whose functions are no choice."""
    unsaid = [
        question.ask
        for category, question in ASKED
        if re.search(r"\byes or no\b|\bno or yes\b|^Is [^,]* (?:a|an|in) \w+ or (?:a|an|in) \w+\?", question.ask)
        and category.chance_of(question) != 0.5
    ]
    assert not unsaid
    assert all(not category.chance_of(question) for category, question in CODE)
    assert all(0.2 <= chance <= 0.5 for one in ASKED if (chance := one.category.chance_of(one.question)))


def test_answers_are_taken_for_what_they_are() -> None:
    known = {(category.category, question.ask): question for category, question in ASKED}
    told = {(category, ask): said for category, asks in ANSWERS.items() for ask, said in asks.items()}
    assert not told.keys() - known.keys()
    missing = [
        key
        for key, question in known.items()
        if isinstance(question.answer, Exact | Regex | Set | Form) and not told.get(key, {}).get("right")
    ]
    assert not missing
    refused = [(key, said) for key, one in told.items() for said in one["right"] if not right(known[key], said)]
    assert not refused
    taken = [(key, said) for key, one in told.items() for said in one.get("wrong", ()) if right(known[key], said)]
    assert not taken


@settings(max_examples=8, deadline=None)
@given(st.text(max_size=60) | st.text("0123456789,.-/#٣²½", max_size=60).map(lambda text: text * 100))
def test_whatever_is_said_is_right_or_wrong(said: str) -> None:
    for _, question in ASKED:
        if not isinstance(question.answer, Python):
            assert is_right(question.answer, said) in (True, False)


def test_sums_are_right() -> None:
    worked_out = dict(SOLVED)
    for name, together in (("addition", sum), ("multiplication", math.prod)):
        questions = SUITE[NAMES.index(name)].questions
        worked_out[name] = [together(map(int, re.findall(r"\d+", question.ask))) for question in questions]
    for name, values in worked_out.items():
        answers = [question.answer for question in SUITE[NAMES.index(name)].questions]
        numbers = [answer.numeric for answer in answers if isinstance(answer, Numeric)]
        assert numbers == pytest.approx(values, abs=1e-12), name
        assert len(numbers) == len(answers) == len(values)


def test_what_is_counted_and_sorted_is_right() -> None:
    checked = 0
    for _, question in ASKED:
        ask, said = question.ask, None
        if found := re.fullmatch(r'How many letters are in the word "(\w+)"\?', ask):
            said = str(len(found[1]))
        elif found := re.search(r'letter (\w) appear in the word "(\w+)"', ask):
            said = str(found[2].count(found[1]))
        elif found := re.search(r"words are in this sentence: (.*)", ask):
            said = str(len(found[1].split()))
        elif found := re.search(r"alphabetical order: (.*)\.", ask):
            said = ", ".join(sorted(found[1].split(", ")))
        elif found := re.search(r"numbers in order from (\w+) .*: (.*)\.", ask):
            numbers = sorted(map(int, found[2].split(", ")), reverse=found[1] == "largest")
            said = ", ".join(map(str, numbers))
        if said is not None:
            checked += 1
            assert right(question, said), (ask, said)
    assert checked >= 14


def test_no_word_of_a_form_counts_twice() -> None:
    """A key that is the plural of another would count for two."""
    double = [
        (question.ask, one)
        for _, question in ASKED
        if isinstance(question.answer, Form) and question.answer.form.contains
        for one in question.answer.form.contains
        if any(one != other and names(one, other, plural=True) for other in question.answer.form.contains)
    ]
    assert not double


def programs() -> list[Program]:
    return [one.question.answer.python for one in CODE if isinstance(one.question.answer, Python)]


def test_a_solution_to_every_program_passes() -> None:
    """All in one process: a call of `solved` is a call of what it names."""
    source = Path(solutions.__file__).read_text(encoding="utf-8")
    cases = [(program, case) for program in programs() for case in program.cases]
    dispatcher = "\n\ndef solved(name, arguments):\n    return globals()[name](*arguments)\n"
    found = run(source + dispatcher, "solved", [[program.function, list(case.arguments)] for program, case in cases])
    assert found.values is not None, found.problem
    wrong = [
        (program.function, case)
        for (program, case), value in zip(cases, found.values, strict=True)
        if not same(value, case.returns)
    ]
    assert not wrong
    assert len({program.function for program in programs()}) == len(programs()) > 40


def test_no_constant_and_no_argument_passes_for_a_program() -> None:
    passing = []
    for program in programs():
        constants = [None, True, False, 0, 1, -1, "", [], {}, *(case.returns for case in program.cases)]
        passing += [
            (program.function, constant)
            for constant in constants
            if all(same(constant, case.returns) for case in program.cases)
        ]
        passing += [
            (program.function, place)
            for place in range(len(program.cases[0].arguments))
            if all(same(case.arguments[place], case.returns) for case in program.cases)
        ]
    assert not passing


@pytest.mark.parametrize("program", programs()[::10], ids=lambda program: program.function)
def test_some_solutions_pass_as_they_are_answered(program: Program) -> None:
    source = Path(solutions.__file__).read_text(encoding="utf-8")
    assert works(program, f"Here it is:\n\n```python\n{source}```\nIt works.")
    constant = f"def {program.function}(*arguments):\n    return {program.cases[0].returns!r}"
    assert not works(program, constant)


def test_every_question_names_the_function_that_it_wants() -> None:
    for _, question in CODE:
        assert isinstance(question.answer, Python)
        program = question.answer.python
        assert f"{program.function}(" in question.ask
        assert len(program.cases) >= 3
        assert len({len(case.arguments) for case in program.cases}) == 1
