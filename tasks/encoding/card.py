"""The data card of a tokens artifact: what went in, what was dropped, what came out, and what it looks like."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from models.tokenizer import Tokenizer
from models.training.shards import open_shard
from tasks.encoding.lengths_picture import draw_lengths, quantile
from tasks.encoding.tokenizer_json import read_description

DATA_CARD, LENGTHS_PICTURE = "data_card.md", "document_lengths.png"
SAMPLES = 5
OPEN, CLOSE = "⟦", "⟧"
_SHOWN_BEFORE, _SHOWN_AFTER = 700, 300

Json = Mapping[str, Any]


def write_card(logs: Path, documents: Json, tokens: Json, folder: Path, name: str) -> None:
    """Writes the card and its picture into `logs`. `documents` and `tokens` are what `documents.json` and `tokens.json`
    hold, `folder` is the tokens artifact, `name` the stage's. The same artifact gives the same text."""
    lengths = {split: one["lengths"] for split, one in _in_order(tokens["splits"])}
    (logs / LENGTHS_PICTURE).write_bytes(draw_lengths(lengths, f"{tokens['source']}: document lengths"))
    (logs / DATA_CARD).write_text("\n".join(_lines(documents, tokens, folder, name)) + "\n", encoding="utf-8")


def _in_order(splits: Json) -> list[tuple[str, Any]]:
    known = ["train", "validation", "test"]
    return sorted(splits.items(), key=lambda item: (known.index(item[0]) if item[0] in known else len(known), item[0]))


def _lines(documents: Json, tokens: Json, folder: Path, name: str) -> Iterator[str]:
    splits = _in_order(tokens["splits"])
    yield f"# Data card of `{name}`: {tokens['source']}"
    yield ""
    total, texts = sum(one["tokens"] for _, one in splits), sum(one["documents"] for _, one in splits)
    yield f"{total:,} tokens in {texts:,} documents, with a tokenizer of {tokens['vocab_size']:,} tokens."
    yield ""
    yield "## Source"
    yield ""
    yield from _table(["key", "value"], [[f"`{key}`", _inline(value)] for key, value in documents["source"].items()])
    yield ""
    yield "## Documents"
    yield ""
    yield from _table(["", "rule", "documents", "bytes"], _document_rows(documents), right=(2, 3))
    yield ""
    yield "## Tokens"
    yield ""
    header = ["split", "documents", "bytes of text", "tokens", "trained on", "bytes per token", "median", "longest"]
    yield from _table([*header, "shards"], [_split_row(split, one) for split, one in splits], right=range(1, 9))
    yield ""
    yield from _tokenizer_lines(tokens, folder / "tokenizer")
    if "template" in tokens:
        yield from _template_lines(tokens)
    yield ""
    yield f"![How long the documents are, in tokens]({LENGTHS_PICTURE})"
    yield ""
    yield "## Samples"
    yield ""
    marked = f" What is trained on stands between {OPEN} and {CLOSE}." if "template" in tokens else ""
    yield f"Decoded from the shards; of long documents the beginning and the end.{marked}"
    yield from _sample_lines(splits, folder, marked="template" in tokens)


def _document_rows(documents: Json) -> list[list[str]]:
    read = documents["read"]
    rows = [["read", "", f"{read['documents']:,}", f"{read['bytes']:,}"]]
    for dropped in documents["dropped"]:
        parameters = {key: value for key, value in dropped["parameters"].items() if value is not None}
        listed = ", ".join(f"{key} {_inline(value)}" for key, value in parameters.items())
        rule = f"**{dropped['rule']}**" + (f": {listed}" if listed else "")
        rows.append(["dropped", rule, f"{dropped['documents']:,}", f"{dropped['bytes']:,}"])
    kept = [sum(one[what] for one in documents["splits"].values()) for what in ("documents", "bytes")]
    return [*rows, ["**kept**", "", *(f"**{number:,}**" for number in kept)]]


def _split_row(split: str, one: Json) -> list[str]:
    numbers = [one["documents"], one["bytes"], one["tokens"], one["counted_tokens"]]
    lengths = [quantile(one["lengths"], 0.5), one["longest_document"]]
    per_token = f"{one['bytes'] / one['tokens']:.3f}" if one["tokens"] else "—"
    return [
        split,
        *(f"{number:,}" for number in numbers),
        per_token,
        *(f"{number:,}" for number in lengths),
        f"{len(one['shards']):,}",
    ]


def _tokenizer_lines(tokens: Json, folder: Path) -> Iterator[str]:
    description = read_description(folder)
    backend = Tokenizer(folder).backend
    # The template says where conversations have the token that closes an answer.
    around = {"before": tokens["bos_id"], "after": None if "template" in tokens else tokens["eos_id"]}
    marks = [
        f"`{backend.id_to_token(token)}` ({token}) {place}" for place, token in around.items() if token is not None
    ]
    yield (
        f"Tokenizer: {description['model']['type']}, {tokens['vocab_size']:,} tokens; "
        f"{' and '.join(marks) if marks else 'nothing'} {'each document' if marks else 'is added to documents'}. "
        f"Ids are {tokens['dtype']}."
    )


def _template_lines(tokens: Json) -> Iterator[str]:
    cut, dropped = (
        sum(one[f"{what}_conversations"] for one in tokens["splits"].values()) for what in ("cut", "dropped")
    )
    yield ""
    yield (
        f"Conversations in the template `{tokens['template']}`, loss on `{tokens['loss_on']}`; to fit, {cut:,} were "
        f"cut after an earlier answer, and {dropped:,} left out."
    )


def _sample_lines(splits: Sequence[tuple[str, Any]], folder: Path, marked: bool) -> Iterator[str]:
    tokenizer = Tokenizer(folder / "tokenizer")
    split, one = splits[0]
    chosen = sorted({(2 * number + 1) * one["documents"] // (2 * SAMPLES) for number in range(SAMPLES)})
    for document in chosen:
        ids, counted = read_document(folder, one["shards"], document)
        text = _marked(tokenizer, ids, counted) if marked else tokenizer.decode(ids)
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        yield ""
        yield f"### {split}, document {document:,}: {len(ids):,} tokens"
        yield ""
        yield f"{fence}text"
        yield shortened(text)
        yield fence


def _marked(tokenizer: Tokenizer, ids: Sequence[int], counted: Sequence[bool]) -> str:
    """The text of a conversation, special tokens included, with marks around what counts."""

    def text(end: int) -> str:
        return str(tokenizer.backend.decode(list(ids[:end]), skip_special_tokens=False))

    turns = [place for place in range(1, len(ids)) if counted[place] != counted[place - 1]]
    parts = [text(end)[len(text(start)) :] for start, end in pairwise([0, *turns, len(ids)])]
    first = int(counted[0])
    return "".join(f"{OPEN}{part}{CLOSE}" if (number + first) % 2 else part for number, part in enumerate(parts))


def read_document(folder: Path, shards: Sequence[Json], document: int) -> tuple[list[int], list[bool]]:
    """The ids of one document of a split, by its number among all of them, and whether each counts."""
    for entry in shards:
        if document < entry["documents"]:
            shard = open_shard(folder / entry["name"]).map()
            start = int(shard.document_ends_D[document - 1]) if document else 0
            place = slice(start, int(shard.document_ends_D[document]))
            ids: list[int] = np.asarray(shard.tokens_N[place]).tolist()
            mask_N = shard.loss_mask_N
            return ids, [True] * len(ids) if mask_N is None else (mask_N[place] != 0).tolist()
        document -= entry["documents"]
    raise IndexError(f"there is no document {document} after the last shard")


def shortened(text: str) -> str:
    """A text whose middle is left out where it is long, with the number of characters that are missing."""
    missing = len(text) - _SHOWN_BEFORE - _SHOWN_AFTER
    if missing <= 0:
        return text
    return f"{text[:_SHOWN_BEFORE]}\n[… {missing:,} characters left out …]\n{text[-_SHOWN_AFTER:]}"


def _inline(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return " ".join(text.replace("|", "\\|").split()) or "—"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|" + "|".join(" ---: " if column in right else " --- " for column in range(len(header))) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
