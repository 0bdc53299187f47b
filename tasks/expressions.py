"""What a problem of arithmetic is about, read from its text: the operators, and how long the operands are."""

import re
from typing import NamedTuple

_SPACE = re.compile(r"\s+")
_EXPRESSION = re.compile(r"-?[0-9]+(?:[-+*/]-?[0-9]+)+")
# A sign behind an operator is the operand's.
_OPERAND_AND_OPERATOR = re.compile(r"-?([0-9]+)([-+*/]?)")


class Expression(NamedTuple):
    """What a problem is about."""

    operators: str
    """Its operators, each once."""
    digits: int
    """Digits of its longest operand."""


def expression_of(prompt: str, target: str) -> Expression | None:
    """The expression that a problem asks for: what the prompt is but for its equals sign (`554+456=`), or else what the
    target begins with (`554 + 456 = <<554+456=1010>>1010`), for a question puts it into words. None where neither is
    one."""
    for text in (prompt.rstrip().removesuffix("="), target.partition("=")[0]):
        # Two numbers with nothing but space between them are not one.
        joined = _SPACE.sub("", text)
        if _EXPRESSION.fullmatch(joined) and not re.search(r"[0-9]\s+[0-9]", text):
            parts = _OPERAND_AND_OPERATOR.findall(joined)
            operators = sorted({operator for _, operator in parts if operator}, key="+-*/".index)
            return Expression("".join(operators), max(len(operand) for operand, _ in parts))
    return None
