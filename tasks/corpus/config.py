"""The config of the stage `documents`."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from common.config import FrozenModel
from tasks.arithmetic import ArithmeticSource
from tasks.corpus.contamination import ContaminationConfig
from tasks.corpus.contamination import resolved as resolved_contamination
from tasks.corpus.conversations import CHOSEN, FORMATS, MESSAGES, REJECTED
from tasks.corpus.duplicates import DuplicatesConfig
from tasks.corpus.file_source import FilesSource
from tasks.corpus.hub_source import HubSource
from tasks.corpus.rules import Column, Rule
from tasks.corpus.sources import TEXT, ConversationFormat, ExternalSource, Split
from tasks.corpus.splitting import Fractions
from tasks.word_problems import WordProblemSource

Source = Annotated[HubSource | FilesSource | ArithmeticSource | WordProblemSource, Field(discriminator="kind")]


class Config(FrozenModel):
    """Where the documents come from, which of them are kept, and how they are written."""

    source: Source
    """The source; `kind` says which."""
    # Null stands in no key: documents that were made before there were conversations are what they were.
    conversations: ConversationFormat | None = Field(default=None, exclude_if=lambda format: format is None)
    """How the rows hold conversations, which then have the columns `messages`, and `chosen` and `rejected` of
    preferences; null where they hold texts. A last question without an answer is left out.

    - `alpaca`: `instruction`, `input` (behind a blank line, where it says anything), `output`
    - `gsm8k`: `question`, `answer`
    - `dolly`: `instruction`, `context` (as the input of alpaca), `response`
    - `sharegpt`: `conversations`, a list of `from` (system, human or user, gpt or assistant) and `value`
    - `messages`: `messages`, a list of `role` (system, user, assistant) and `content`
    - `preferences`: `chosen` and `rejected`, answers to `prompt` as texts or messages; or both as messages with the
      prompt before the answer, or as transcripts of `Human:` and `Assistant:`
    """
    rules: tuple[Rule, ...] = ()
    """What drops documents; each counts under the first rule that it breaks."""
    contamination: ContaminationConfig | None = None
    """Benchmarks whose test rows must not be in the documents; null for none."""
    duplicates: DuplicatesConfig | None = None
    """Which documents are dropped for being like an earlier one; null for none."""
    split: Split | Fractions | None = None
    """The split of all documents, or the shares of validation and test by a hash of the document; null leaves them
    where the source has them: a split of a hub data set that is called so, else training."""
    columns: tuple[str, ...] = ()
    """Columns of the source that are kept beside the text."""
    on_error: Literal["fail", "skip"] = "fail"
    """Whether bad input (a line that is no JSON, a row without text or without a whole conversation, invalid UTF-8, a
    damaged file) ends the stage, or is dropped and counted. A column that is nowhere, a source without documents, and a
    row that the library `datasets` cannot read (of formats other than Parquet and JSON Lines) always end it. Documents
    that are empty or only white space are no bad input: they are dropped and counted as `no_text` either way."""
    max_documents: int | None = Field(default=None, gt=0)
    """Documents that are kept at most; the source is not read any further. Null for all."""
    max_bytes: int | None = Field(default=None, gt=0)
    """Bytes of text (UTF-8) that are kept at most, in whole documents. Null for all."""
    shard_bytes: int = Field(default=32 << 20, gt=0)
    """Bytes after which a shard is full, those of the text, of other strings that are kept, and 16 for each document;
    a longer document has a shard of its own."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if TEXT in self.columns or len(set(self.columns)) < len(self.columns):
            raise ValueError(f"columns {', '.join(self.columns)}: each once, and not '{TEXT}', which is always kept")
        if self.conversations is not None:
            self._check_conversations()
        return self

    def _check_conversations(self) -> None:
        source = self.source
        if not isinstance(source, ExternalSource):
            raise ValueError(f"conversations: the source '{source.kind}' makes its own documents; leave it out")
        if source.column != TEXT or getattr(source, "rows", "documents") != "documents":
            raise ValueError("conversations: they have columns of their own; leave the source's column and rows out")
        taken = {MESSAGES, CHOSEN, REJECTED} & set(self.read_columns)
        if taken:
            raise ValueError(f"columns: a conversation has its own column '{min(taken)}', which is always kept")

    @property
    def document_columns(self) -> tuple[str, ...]:
        """The columns of the documents, the text first."""
        own = FORMATS[self.conversations].written if self.conversations else self.source.own_columns
        return tuple(dict.fromkeys((TEXT, *own, *self.columns)))

    @property
    def read_columns(self) -> tuple[str, ...]:
        """The columns that are read beside the text: those that are kept and those that rules ask for."""
        asked = (rule.column for rule in self.rules if isinstance(rule, Column))
        return tuple(dict.fromkeys(name for name in (*self.columns, *asked) if name != TEXT))

    def resolved(self) -> "Config":
        """The config with the digests of what it points at. Raises UserError where it points at nothing."""
        update: dict[str, Any] = {"source": self.source.resolved()}
        if self.contamination is not None:
            update["contamination"] = resolved_contamination(self.contamination)
        return self.model_copy(update=update)
