"""Calculator marks such as `<<48/2=24>>` (GSM8K: Cobbe et al., arXiv 2110.14168), read and worked out."""

import re
from collections.abc import Iterator
from fractions import Fraction
from operator import add, mul, sub
from typing import NamedTuple

OPEN, CLOSE, FINAL = "<<", ">>", "####"
# So many digits that no number is too long to be one; what is longer is no number.
_NUMBER = re.compile(r"[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40}")
_SIGNED = re.compile(rf"\s*(-?)\s*({_NUMBER.pattern})\s*")
_IN_TEXT = re.compile(r"(?<![0-9.)])-?[0-9]{1,40}(?:,[0-9]{3}){0,400}(?:\.[0-9]{1,400})?")
_SYMBOLS = "+-*/()"
_SIGNS = {"+": "plus", "-": "minus"}
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "plus": 3, "minus": 3}
_BINARY = {"+": add, "-": sub, "*": mul}


class Mark(NamedTuple):
    """`<<expression=value>>`."""

    worked_out: Fraction | None
    """What the expression comes to; None where it divides by zero."""
    value: Fraction
    """What the mark says that it comes to."""
    decimals: int
    """Decimals that the value is written with."""

    @property
    def right(self) -> bool:
        """Whether the value is the expression's: exactly, or rounded to the decimals that it is written with, where
        there are any."""
        if self.worked_out is None:
            return False
        slack = Fraction(1, 2 * 10**self.decimals) if self.decimals else 0
        return abs(self.worked_out - self.value) <= slack


def marks_in(text: str) -> list[Mark] | None:
    """The marks of a text, in order; None where they are not well-formed.

    They are well-formed where there is at least one, each `<<` is closed by a `>>` before the next one opens and no
    `>>` closes nothing, and each holds `expression=value`: numbers without thousands separators, `+ - * /`, signs and
    parentheses; a number.
    """
    pieces = re.split(f"({OPEN}|{CLOSE})", text)
    brackets, insides = pieces[1::2], pieces[2::4]
    if not brackets or brackets != [OPEN, CLOSE] * (len(brackets) // 2):
        return None
    try:
        return [_mark(inside) for inside in insides]
    except ValueError:
        return None


def final_number(text: str) -> Fraction | None:
    """The number behind the last `####`, or, in a text without, the last number; None where there is none."""
    _, found, after = text.rpartition(FINAL)
    numbers = _IN_TEXT.findall(after)
    if not numbers:
        return None
    return Fraction((numbers[0] if found else numbers[-1]).replace(",", ""))


def _mark(inside: str) -> Mark:
    """Raises ValueError where it is no mark."""
    expression, _, value = inside.rpartition("=")
    said = _SIGNED.fullmatch(value)
    if said is None:
        raise ValueError(f"{value!r} is no number")
    sign, digits = said.groups()
    number = Fraction(digits)
    return Mark(_worked_out(expression), -number if sign else number, len(digits.partition(".")[2]))


def _worked_out(expression: str) -> Fraction | None:
    """What an expression comes to; None where it divides by zero. Raises ValueError where it is no expression.

    Dijkstra's shunting yard, without recursion: what a model writes may nest as deep as it likes.
    """
    values: list[Fraction | None] = []
    waiting: list[str] = []
    operand_next = True
    for token in _tokens(expression):
        if operand_next and token in ("(", *_SIGNS):
            waiting.append(_SIGNS.get(token, token))
        elif operand_next and token not in _SYMBOLS:
            values.append(Fraction(token))
            operand_next = False
        elif operand_next or token == "(" or token not in _SYMBOLS:
            raise ValueError(f"{token!r} is out of place")
        elif token == ")":
            while waiting and waiting[-1] != "(":
                _apply(waiting.pop(), values)
            if not waiting:
                raise ValueError("')' closes nothing")
            waiting.pop()
        else:
            while waiting and _PRECEDENCE.get(waiting[-1], 0) >= _PRECEDENCE[token]:
                _apply(waiting.pop(), values)
            waiting.append(token)
            operand_next = True
    if operand_next or "(" in waiting:
        raise ValueError("the expression does not end")
    while waiting:
        _apply(waiting.pop(), values)
    return values[0]


def _apply(operator: str, values: list[Fraction | None]) -> None:
    right = values.pop()
    if operator in _SIGNS.values():
        values.append(-right if operator == "minus" and right is not None else right)
        return
    left = values.pop()
    if left is None or right is None or (operator == "/" and not right):
        values.append(None)
    else:
        values.append(left / right if operator == "/" else _BINARY[operator](left, right))


def _tokens(expression: str) -> Iterator[str]:
    place = 0
    while place < len(expression):
        character = expression[place]
        found = _NUMBER.match(expression, place)
        if found is not None:
            yield found.group()
            place = found.end()
            continue
        if character in _SYMBOLS:
            yield character
        elif character != " ":
            raise ValueError(f"{character!r} is no part of an expression")
        place += 1
