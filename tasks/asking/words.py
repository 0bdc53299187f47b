"""Texts as answers are compared: without regard to case, white space and what stands around them."""

import re
import unicodedata

_AROUND = " .\"'`*_“”‘’„«»"
"""Quotes, full stops, and the marks of emphasis that chat models like."""
_APOSTROPHES = str.maketrans("’‘", "''")


def normalised(text: str) -> str:
    """A text in lower case, with single spaces, without surrounding quotes, full stops and marks of emphasis."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return " ".join(folded.split()).translate(_APOSTROPHES).strip(_AROUND)


def names(text: str, thing: str, *, plural: bool = False) -> bool:
    """Whether a thing stands in a text as whole words; `plural`: or as their plural."""
    pattern = re.escape(normalised(thing))
    if plural:
        pattern = f"{pattern[:-1]}(?:y|ys|ies)" if pattern.endswith("y") else f"{pattern}(?:s|es)?"
    # What is no letter or digit itself, such as the + of C++, ends where it ends.
    return re.search(rf"(?<!\w){pattern}(?!\w)", normalised(text)) is not None
