"""Characters in UTF-8 that are not ASCII: where they are in some bytes, what they are, and their lower case.

What a character is follows the Unicode tables of the Python that runs; new versions of Unicode have only added some.

N bytes, C characters that are not ASCII.
"""

import unicodedata
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

SPACE, LETTER, WORD = 1, 2, 4  # what a character is, as bits: white space; a letter; a letter, digit or mark
_TABLE = 0x40000  # no letters or spaces are beyond; what is counts as the last code point before, which is nothing


class Wide:
    """The characters in some bytes of valid UTF-8 that are not ASCII."""

    def __init__(self, data_N: NDArray[np.uint8]) -> None:
        self.place_C = np.flatnonzero(data_N >= 0xC0)
        """Where each begins."""
        lead_C = data_N[self.place_C].astype(np.int64)
        self.size_C = 2 + (lead_C >= 0xE0).astype(np.int64) + (lead_C >= 0xF0)
        """Its bytes, 2 to 4."""
        code_C = lead_C & (0x7F >> self.size_C)
        for further in range(1, 4):
            has_C = self.size_C > further
            tail_C = data_N[np.where(has_C, self.place_C + further, 0)].astype(np.int64) & 0x3F
            code_C = np.where(has_C, code_C << 6 | tail_C, code_C)
        self.code_C = code_C
        """Its code point."""

    @cached_property
    def classes_C(self) -> NDArray[np.uint8]:
        """What each is: the bits SPACE, LETTER and WORD."""
        if not len(self.code_C):
            return np.zeros(0, np.uint8)
        classes_C: NDArray[np.uint8] = _classes()[np.minimum(self.code_C, _TABLE - 1)]
        return classes_C

    def mark(self, flags_N: NDArray[np.bool_], chosen_C: NDArray[np.bool_], value: bool) -> None:
        """Sets the flags of all bytes of the chosen characters."""
        place_C, size_C = self.place_C[chosen_C], self.size_C[chosen_C]
        for further in range(4):
            flags_N[place_C[size_C > further] + further] = value

    def lower(self, data_N: NDArray[np.uint8]) -> None:
        """Writes the lower case of each into its place, where that is one character of as many bytes."""
        if not len(self.code_C):
            return
        lower_C = _lower()[np.minimum(self.code_C, _TABLE - 1)]
        changed_C = (lower_C != self.code_C) & (self.code_C < _TABLE)
        place_C, size_C, code_C = self.place_C[changed_C], self.size_C[changed_C], lower_C[changed_C]
        for size in (2, 3, 4):
            own_C = size_C == size
            place, code = place_C[own_C], code_C[own_C]
            for further in range(size - 1, 0, -1):
                data_N[place + further] = 0x80 | code & 0x3F
                code >>= 6
            data_N[place] = (0xF00 >> size) & 0xFF | code


@cache
def _classes() -> NDArray[np.uint8]:
    categories = [unicodedata.category(chr(code)) for code in range(_TABLE)]
    return np.array(
        [
            SPACE * chr(code).isspace() | LETTER * (category[0] == "L") | WORD * (category[0] in "LMN")
            for code, category in enumerate(categories)
        ],
        np.uint8,
    )


@cache
def _lower() -> NDArray[np.int64]:
    table = np.arange(_TABLE)
    for code in range(0x80, _TABLE):
        lower = chr(code).lower()
        if len(lower) == 1 and ord(lower) != code and len(lower.encode()) == len(chr(code).encode()):
            table[code] = ord(lower)
    return table
