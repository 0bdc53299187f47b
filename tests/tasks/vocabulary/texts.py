"""Texts for tests of tokenizers: pieces of real ones where they are to be had, made-up English, and odd Unicode."""

import json
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

HUB = os.environ.get("CAIRN_HUB")
needs_hub = pytest.mark.skipif(HUB is None, reason="CAIRN_HUB does not say where the real data are")
CORPORA = ("local/openstax-textbooks", "local/standard-ebooks", "Salesforce/wikitext")

WRITTEN_OUT = (
    *("<eos>", "<bos>", "<pad>", "<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>"),
    *("<0x41>", "<0x0A>", "<0xFF>", "[INST]", "▁", "▁▁", "Ġ", "Ċ"),
)
"""What some tokenizer has as a token, or inside one."""
ODD = (
    *("", " ", "  ", "\n", " leading", "trailing ", "  two  ", " " * 100, "\n" * 50, "\t" * 33, " \n \t  \r\n"),
    "👩‍👩‍👧‍👦 a family, 👍🏽 with a colour, 🏴󠁧󠁢󠁥󠁮󠁧󠁿 and 🇩🇪 flags, 1️⃣ ❤️",
    "שָׁלוֹם עולם مرحبا بالعالم \u202emirrored\u202c",
    "e\u0301\u0302\u0303 a\u0345\u0300 \u0301alone Z̸̢͠a̵l̷g̵o é à ñ ä́̂",
    *("a\0b\0\0", "\x01\x02\x1f\x7f\x80\x9f\x85", "a\u2028b\u2029c", "zero\u200bwidth\u2060\ufeff", "\ufeffmark"),
    *("\ufffd", "\ufffe\uffff\U0010ffff\U000e0001\ud7ff\ue000", "▅ block ⁇", "non\u00a0breaking\u202f\u3000"),
    *("x" * 5000, "supercalifragilistic" * 50, "ab" * 300, "-" * 77, "#" * 200, "字" * 90, "👍" * 40),
    *("１２３ 123 ٣ १२३ ½ ² Ⅷ 𝟏𝟐 一二三", "3.14159 1,000,000 1e-5 0x1F", "don't I'LL we've 'tis ’s"),
    *("漢字かなカナ ｶﾀｶﾅ 한국어 각 中文，标点。", "नमस्ते สวัสดี ខ្មែរ မြန်မာ ᏣᎳᎩ", "ﬁ ﬀ ß ẞ İ ı Ǆ"),
    *(form.format(text) for text in WRITTEN_OUT for form in ("{0}", "a{0}b", " {0} ", "{0}{0}\n{0}", "▁{0}x")),
)


def any_text() -> st.SearchStrategy[str]:
    """Texts of all that Unicode has, with what tokenizers have names for."""
    letters = st.characters(exclude_categories=["Cs"])
    parts = st.one_of(st.text(letters, max_size=8), st.sampled_from(WRITTEN_OUT), st.sampled_from(ODD), st.text(" ab1"))
    return st.lists(parts, max_size=5).map("".join)


def english(count: int, seed: int = 0) -> list[str]:
    """Documents of a few hundred made-up words, the frequent ones short, with numbers, quotes and paragraphs."""
    random_ = random.Random(seed)
    syllables = ["".join(random_.choices("aeiou", k=1) + random_.choices("bdfglmnprstv", k=1)) for _ in range(60)]
    words = ["".join(random_.choices(syllables, k=1 + number // 40)) for number in range(200)]
    weights = [1 / (1 + number) for number in range(200)]
    marks = [" "] * 20 + [", ", ". ", ".\n\n", " “", "” ", "-", " 1", "42 ", " (", ") ", "  ", "é "]
    return [
        "".join(word + random_.choice(marks) for word in random_.choices(words, weights, k=random_.randint(20, 400)))
        for _ in range(count)
    ]


def runs(count: int, seed: int = 0) -> list[str]:
    """Repeated and shuffled characters, on which ways of dividing a text are often worth the same."""
    random_ = random.Random(seed)
    found = [c * n for c in 'aA e-=_*.#/\\0\n\t▁字é~!"' for n in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 64, 127)]
    while len(found) < count:
        characters = "".join(random_.choices("ab ▁-=e tn*#.", k=random_.randint(2, 5)))
        found.append(characters * random_.randint(2, 20))
        found.append("".join(random_.choices("ab ▁-=e tn*#.", k=random_.randint(2, 40))))
    return found[:count]


def scattered(count: int, seed: int = 0) -> list[str]:
    """Characters from all over Unicode."""
    random_ = random.Random(seed)
    blocks = [(0, 0x250), (0x300, 0x370), (0x590, 0x700), (0x2000, 0x2100), (0x4E00, 0x4F00), (0xE000, 0x110000)]
    return [
        "".join(chr(random_.randrange(*random_.choice(blocks))) for _ in range(random_.randint(1, 30)))
        for _ in range(count)
    ]


def real(count: int, seed: int = 0, longest: int = 300) -> list[str]:
    """Pieces of the documents below CAIRN_HUB."""
    assert HUB is not None
    paths = [path for name in CORPORA for path in sorted((Path(HUB) / name).rglob("*.parquet"))]
    whole = [text for path in paths for text in pq.read_table(path, columns=["text"])["text"].to_pylist() if text]
    random_ = random.Random(seed)
    found = []
    for _ in range(count):
        text = random_.choice(whole)
        start = random_.randrange(len(text))
        found.append(text[start : start + random_.randint(1, longest)])
    return found


def write_documents(folder: Path, shards: Sequence[Iterable[str]], split: str = "train") -> Path:
    """An artifact of documents as the stage `documents` makes them."""
    folder.mkdir(parents=True)
    described: list[dict[str, Any]] = []
    for number, texts in enumerate(map(list, shards)):
        name = f"{split}-{number:05d}.parquet"
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), folder / name, row_group_size=7)
        size = sum(len(text.encode()) for text in texts)
        described.append({"name": name, "documents": len(texts), "bytes": size})
    totals = {key: sum(int(shard[key]) for shard in described) for key in ("documents", "bytes")}
    content = {"source": {"name": "texts"}, "splits": {split: {**totals, "shards": described}}}
    (folder / "documents.json").write_text(json.dumps(content))
    return folder
