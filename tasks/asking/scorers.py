"""Whether an answer is right, by its question's kind of answer; `python` apart, for which see tasks.asking.programs."""

import re
from fractions import Fraction

from tasks.asking.answers import Checks, Exact, Form, Numeric, Regex, Set
from tasks.asking.words import names, normalised
from tasks.calculator import final_number

_MINUS = str.maketrans("−", "-")
_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def is_right(answer: Exact | Numeric | Regex | Set | Form, said: str) -> bool:
    """Whether what a model said is such an answer. What is blank never is."""
    if not said.strip():
        return False
    match answer:
        case Exact():
            return is_exact(answer, said)
        case Numeric():
            return is_number(answer, said)
        case Regex():
            return re.search(answer.regex, said, re.IGNORECASE) is not None
        case Set():
            return names_set(answer, said)
        case Form():
            return has_form(answer.form, said)


def is_exact(answer: Exact, said: str) -> bool:
    """Whether the first line that is not blank is one of the texts."""
    return normalised(said.strip().splitlines()[0]) in {normalised(text) for text in answer.exact}


def is_number(answer: Numeric, said: str) -> bool:
    """Whether the last number, or the one behind `####`, is the one that is asked for; commas may part thousands, and
    units may follow."""
    found = final_number(said.translate(_MINUS))
    # As they are written: 0.1 is a tenth here.
    wanted, tolerance = Fraction(repr(answer.numeric)), Fraction(repr(answer.tolerance))
    return found is not None and abs(found - wanted) <= tolerance


def names_set(answer: Set, said: str) -> bool:
    """Whether enough of the set stand in it as whole words, and none of the others."""
    found = sum(names(said, thing) for thing in answer.set)
    return found >= (answer.at_least or len(answer.set)) and not any(names(said, thing) for thing in answer.others)


def has_form(checks: Checks, said: str) -> bool:
    """Whether all the checks hold that are given."""
    said = said.strip()
    lines = sum(bool(line.strip()) for line in said.splitlines())
    words = [word.casefold() for word in _WORD.findall(said)]
    contains = checks.contains or ()
    return (
        _within(lines, checks.min_lines, checks.max_lines)
        and _within(len(words), checks.min_words, checks.max_words)
        and sum(names(said, thing, plural=True) for thing in contains) >= (checks.at_least or len(contains))
        and (checks.min_distinct is None or len(set(words)) >= checks.min_distinct * max(1, len(words)))
        and (checks.starts_with is None or said.casefold().startswith(checks.starts_with.casefold()))
        and (checks.matches is None or re.search(checks.matches, said, re.IGNORECASE) is not None)
    )


def _within(number: int, least: int | None, most: int | None) -> bool:
    return (least is None or number >= least) and (most is None or number <= most)
