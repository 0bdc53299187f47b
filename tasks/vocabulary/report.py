"""How well a tokenizer fits a text: tokens per word and bytes per token, beside tokenizers that many know."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from common.errors import UserError
from models.tokenizer import Tokenizer, in_parts
from tasks.hub import local_copy, not_found
from tasks.vocabulary.config import Hub
from tasks.vocabulary.hub import files_of, resolved, write_hub_tokenizer

COMPARED = {"GPT-2": "openai-community/gpt2", "SmolLM2": "HuggingFaceTB/SmolLM2-135M"}
WIKITEXT, WIKITEXT_FILES = "Salesforce/wikitext", "wikitext-2-raw-v1/test-*.parquet"
SAMPLE_BYTES = 4 << 20


class Fertility(NamedTuple):
    """What a tokenizer makes of a text."""

    tokenizer: str
    text: str
    vocab_size: int
    words: int
    """What white space separates."""
    bytes: int
    """Of UTF-8."""
    tokens: int

    @property
    def tokens_per_word(self) -> float:
        return self.tokens / max(1, self.words)

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(1, self.tokens)

    def metrics(self) -> dict[str, Any]:
        """A row of the table, as JSON."""
        return {**self._asdict(), "tokens_per_word": self.tokens_per_word, "bytes_per_token": self.bytes_per_token}


class Report(NamedTuple):
    """The table, and what could not be had for it."""

    rows: list[Fertility]
    notes: list[str]

    def markdown(self) -> str:
        """The table for people."""
        lines = [
            "Words are what white space separates, bytes those of UTF-8.",
            "",
            "| tokenizer | vocabulary | text | words | tokens per word | bytes per token |",
            "|---|---:|---|---:|---:|---:|",
            *(
                f"| {row.tokenizer} | {row.vocab_size:,} | {row.text} | {row.words:,} | {row.tokens_per_word:.3f} "
                f"| {row.bytes_per_token:.3f} |"
                for row in self.rows
            ),
        ]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"


def report(name: str, folder: Path, texts: Iterable[str]) -> Report:
    """The fertility of the tokenizer in a folder on some of its training texts and on the test split of WikiText-2,
    beside GPT-2's and SmolLM2's, as far as those are to be had."""
    notes: list[str] = []
    measured = {"training documents": list(texts)}
    try:
        measured["WikiText-2 test"] = wikitext()
    except UserError as error:
        notes.append(f"not measured on WikiText-2: {error}")
    rows = [_fertility(name, Tokenizer(folder), label, text) for label, text in measured.items()]
    for label, hub_id in COMPARED.items():
        try:
            other = _compared(hub_id)
        except UserError as error:
            notes.append(f"not compared with {label}: {error}")
        else:
            rows += [_fertility(label, other, text_label, text) for text_label, text in measured.items()]
    return Report(sorted(rows, key=lambda row: list(measured).index(row.text)), notes)


def wikitext() -> list[str]:
    """The lines of WikiText-2's test split, as they are (`wikitext-2-raw-v1`). Raises UserError where it cannot be
    had."""
    import pyarrow.parquet as pq

    folder = local_copy("dataset", WIKITEXT) or _downloaded_wikitext()
    paths = sorted(folder.glob(WIKITEXT_FILES))
    if not paths:
        raise not_found("dataset", WIKITEXT, f"there is no {WIKITEXT_FILES} in {folder}")
    return [text for path in paths for text in pq.read_table(path, columns=["text"])["text"].to_pylist()]


def _downloaded_wikitext() -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(WIKITEXT, repo_type="dataset", allow_patterns=[WIKITEXT_FILES]))
    except Exception as error:  # the network has as many errors as libraries
        raise not_found("dataset", WIKITEXT, " ".join(str(error).split())) from error


def _compared(hub_id: str) -> Tokenizer:
    config = resolved(Hub(kind="hub", id=hub_id))
    with TemporaryDirectory() as folder:
        write_hub_tokenizer(files_of(config), Path(folder), hub_id)
        return Tokenizer(Path(folder))


def _fertility(name: str, tokenizer: Tokenizer, label: str, texts: Sequence[str]) -> Fertility:
    tokens = sum(len(encoding) for batch in in_parts(texts) for encoding in tokenizer.encode_batch(batch))
    return Fertility(
        tokenizer=name,
        text=label,
        vocab_size=len(tokenizer),
        words=sum(len(text.split()) for text in texts),
        bytes=sum(len(text.encode()) for text in texts),
        tokens=tokens,
    )
