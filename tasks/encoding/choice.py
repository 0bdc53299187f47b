"""Which library encodes a corpus: the fastest whose ids were seen to be the reference's, on texts of that corpus and on
texts that are known to divide libraries."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from common.config import FrozenModel
from tasks.encoding.encoders import Candidate, Encoded, Reference, first_difference, shown, text_of, version_of
from tasks.encoding.libraries import LIBRARIES
from tasks.encoding.tokenizer_json import read_description
from tasks.encoding.units import Unit, read_documents

WORTH_IT_BYTES = 2 << 20
"""Text below which the reference is done before another library has been proven."""
SAMPLED_PLACES, SAMPLED_BYTES = 16, 1 << 20
"""Places in a corpus that documents are taken from for the proof, and bytes of text from all of them."""
_RUN = 4_000


class Choice(FrozenModel):
    """The library that encodes, and why none of the faster ones does."""

    library: str
    """Its name on PyPI."""
    version: str
    """Its installed version."""
    refused: dict[str, str]
    """Why each faster library was not taken."""
    proven_on: int = 0
    """Texts whose ids were compared with those of `tokenizers`."""


def choose(folder: Path, texts: Sequence[str]) -> Choice:
    """The library for a tokenizer's folder, proven on `texts` and on `difficult_texts`.

    Raises UserError for a text of `texts` that the tokenizer cannot encode.
    """
    import pyarrow as pa

    reference = Reference(folder, parallel=True)
    expected = reference.encode(pa.array(texts, pa.large_string()))
    difficult = difficult_texts(special_tokens(folder))
    try:
        hard = reference.encode(pa.array(difficult, pa.large_string()))
    except Exception as error:
        # What is unknown to it is an error that no other library gives.
        return the_reference(f"not every text can be encoded: {text_of(error)}")
    refused: dict[str, str] = {}
    for name, make in LIBRARIES.items():
        try:
            candidate = Candidate(partial(make, folder, False), reference)
            problem = _difference(candidate, difficult, hard) or _difference(candidate, texts, expected)
        except ImportError:
            problem = "not installed: pip install 'cairn[data]'"
        except Exception as error:
            problem = text_of(error)
        if problem is None:
            count = len(difficult) + len(texts)
            return Choice(library=name, version=version_of(name), refused=refused, proven_on=count)
        refused[name] = problem
    return Choice(library=Reference.name, version=version_of(Reference.name), refused=refused)


def the_reference(why: str) -> Choice:
    """The choice of `tokenizers` where nothing else comes into question."""
    refused = dict.fromkeys(LIBRARIES, why)
    return Choice(library=Reference.name, version=version_of(Reference.name), refused=refused)


def sampled_texts(documents: Path, units: Sequence[Unit]) -> list[str]:
    """Documents from the beginnings of shards all over a corpus, about a megabyte of them."""
    import pyarrow as pa

    found: list[str] = []
    taken = 0
    places = np.unique(np.linspace(0, len(units) - 1, min(SAMPLED_PLACES, len(units))).astype(int)).tolist()
    for number, place in enumerate(places, 1):
        for _, columns in read_documents(documents / units[place].name, units[place], ["text"], 16 << 10):
            found += columns["text"].to_pylist()
            taken += columns["text"].nbytes
            if taken >= SAMPLED_BYTES * number // len(places):
                break
    # Arrow would keep what it read the shards with.
    pa.default_memory_pool().release_unused()
    return found


def _difference(candidate: Candidate, texts: Sequence[str], expected: Encoded) -> str | None:
    """The first text whose ids differ from the expected ones, or None."""
    import pyarrow as pa

    encoded = candidate.encode(pa.array(texts, pa.large_string()))
    row = first_difference(encoded, expected)
    if row is None:
        return None
    return f"its ids differ from those of tokenizers for {shown(texts[row])}"


def special_tokens(folder: Path) -> list[str]:
    """The added tokens of a tokenizer, special or not."""
    return [token["content"] for token in read_description(folder)["added_tokens"]]


def difficult_texts(tokens: Iterable[str]) -> list[str]:
    """Texts on which libraries were seen to differ, or might: `tokens` written out in them, odd Unicode, and runs."""
    written_out = [*tokens, "<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<|im_start|>", "<0x0A>"]
    runs = [*" \n\taZé1٣!_▁\0\u00a0\u3000字👍", "\r\n", "ab ", "A1"]
    letters = np.random.default_rng(0).integers(97, 123, 100_000).astype(np.uint8).tobytes().decode()
    return [
        *_ODD_TEXTS,
        *(form.format(token, token[:-1]) for token in written_out for form in ("{}", "a{}b", " {} ", "{0}{0}\n{1}")),
        *(run * _RUN for run in runs),
        *(f"{run * n}x {run * n}" for run in runs for n in (1, 2, 3, 7)),
        letters,
        "".join(map(chr, [*range(0xD800), *range(0xE000, 0x3000 + 0xE000)])),
        " ".join(map(chr, range(0x10000, 0x20000, 7))),
    ]


_ODD_TEXTS = [
    "",
    " ",
    "  leading and trailing  ",
    "one\r\ntwo\rthree\n\n\nfour \n five\n ",
    "don't DON'T I'LL we'Re it's 'tis ’s ʼs x'y 'S",
    "tabs\t\tand\x0bfeeds\x0c\x1c\x1d\x1e\x1f\x85 \u2028\u2029 \u200b\u2060\ufeff",
    "nul\0in the\0\0middle\0",
    "\ufeffbyte order mark",
    "non\u00a0breaking\u202fspaces\u3000and\u2009thin ones",
    "1234567890 3.14159 1,000,000 1e-5 0x1F ½ ² Ⅷ ٠١٢٣ १२३ １２３ 𝟏𝟐 一二三",
    "cafe\u0301 café naïve Å Å Å ﬁ ﬀ ĳ Ǆ ß ẞ İ ı",
    "e\u0301\u0302\u0303\u0304\u0327 a\u0345\u0300 \u0301alone",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪🇫🇷 🏴󠁧󠁢󠁥󠁮󠁧󠁿 1️⃣ ❤️ ☺",
    "שָׁלוֹם עולם مرحبا بالعالم \u202emirrored\u202c",
    "漢字かなカナ ｶﾀｶﾅ 한국어 각 각 中文，标点。",
    "नमस्ते दुनिया สวัสดีชาวโลก ខ្មែរ မြန်မာ ᏣᎳᎩ",
    "▁lower ▁▁block▁ __init__ ĠĊ âĢĻ Ä",
    "mixed CamelCase snake_case kebab-case SCREAMING CASE iPhone12Pro x86_64",
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}  # …\n\n\tif x != 3 and y >= 4: pass\n",
    "<a href='https://example.org/?q=1&r=%20#x'>link</a> user@example.org $E=mc^2$ \\frac{a}{b}",
    "\U0010ffff\ufffe\uffff\ufffd\ud7ff\ue000\U000e0001",
    "“quotes” ‘single’ «guillemets» — – … ‽ ¿? ¡! £€¥ ©®™ °",
]
