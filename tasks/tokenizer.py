"""Stage `tokenizer`: a `tokenizer.json` that `transformers` opens, written down, trained on documents, or fetched."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from common.config import FrozenModel
from common.errors import UserError
from models.tokenizer import SENTENCEPIECE_FILE, Tokenizer, write_tokenizer
from tasks.stage import Context, Kind, Metrics, Stage, gathered
from tasks.vocabulary.bpe import bpe_tokenizer, byte_bpe_tokenizer
from tasks.vocabulary.config import BPE, ROLES, ByteBPE, Bytes, Characters, Hub, SentencePiece, Trained, Vocabulary
from tasks.vocabulary.hub import files_of, write_hub_tokenizer
from tasks.vocabulary.hub import resolved as resolved_hub
from tasks.vocabulary.report import SAMPLE_BYTES, report
from tasks.vocabulary.sample import Sample, described
from tasks.vocabulary.sentencepiece_training import train
from tasks.vocabulary.written import bytes_tokenizer, characters_tokenizer

REPORT = "report.md"


class Share(FrozenModel):
    """How much of the text that a vocabulary is learnt from comes from one of several artifacts of documents."""

    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Share of the bytes, relative to the other artifacts' weights; one with less text than its share gives all."""


class Config(FrozenModel):
    """Which tokenizer is made."""

    vocabulary: Vocabulary
    """Its tokens; `kind` says where they come from."""
    chat_template: str | None = None
    """How a chat becomes text, in Jinja, for `transformers`; null for none, or the one that a hub tokenizer has."""
    blend: tuple[Share, ...] = ()
    """The share of each artifact of documents, where they are several."""


def resolved(config: Config) -> Config:
    """The config with what tells the files of a hub tokenizer. Raises UserError where they are nowhere to be had."""
    if not isinstance(config.vocabulary, Hub):
        return config
    return config.model_copy(update={"vocabulary": resolved_hub(config.vocabulary)})


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes `tokenizer.json`, `tokenizer_config.json`, and `tokenizer.model` where SentencePiece made it.

    With documents, the tokens that their words take are measured, which goes into the metrics and `report.md` in the
    logs. Raises UserError where a vocabulary has to be trained and there are no documents, where they do not give as
    many tokens as asked for, and for hub tokenizers that cannot be had or read.
    """
    folders = gathered(inputs, "documents")
    shares = config.blend or (Share(),) * len(folders)
    if len(shares) != len(folders):
        raise UserError(f"blend has {len(shares)} shares for {len(folders)} artifacts; write them beside the documents")
    sources = [
        described(context.labels.get(name, name), folder, share.weight)
        for (name, folder), share in zip(folders.items(), shares, strict=True)
    ]
    vocabulary = config.vocabulary
    limit = vocabulary.training_bytes if isinstance(vocabulary, Trained) else SAMPLE_BYTES
    sample = Sample(sources, limit, context.should_stop)
    notes = _write(config, sample if sources else None, context.output)
    size = len(Tokenizer(context.output))
    summary = f"{size:,} tokens in the vocabulary"
    metrics: Metrics = {"summary": summary, "kind": vocabulary.kind, "vocab_size": size}
    if isinstance(vocabulary, Trained):
        metrics["trained_on"] = [drawn._asdict() for drawn in sample.drawn]
    if sources and not isinstance(vocabulary, Characters):
        metrics |= _measured(context, Sample(sources, SAMPLE_BYTES, context.should_stop), summary)
    return {**metrics, "notes": [*notes, *metrics.get("notes", [])]}


def _write(config: Config, sample: Sample | None, folder: Path) -> list[str]:
    """Writes the tokenizer's files; gives what is to be known of it."""
    vocabulary = config.vocabulary
    if isinstance(vocabulary, Hub):
        return write_hub_tokenizer(files_of(vocabulary), folder, vocabulary.id, config.chat_template)
    if isinstance(vocabulary, SentencePiece):
        model, converted = train(vocabulary, _needed(sample, vocabulary))
        (folder / SENTENCEPIECE_FILE).write_bytes(model)
        backend = converted.backend
    elif isinstance(vocabulary, BPE):
        backend = bpe_tokenizer(vocabulary, _needed(sample, vocabulary))
    elif isinstance(vocabulary, ByteBPE):
        backend = byte_bpe_tokenizer(vocabulary, _needed(sample, vocabulary))
    elif isinstance(vocabulary, Bytes):
        backend = bytes_tokenizer(vocabulary)
    else:
        backend = characters_tokenizer(vocabulary)
    write_tokenizer(folder, backend, ROLES, config.chat_template)
    return []


def _needed(sample: Sample | None, vocabulary: Trained) -> Sample:
    if sample is None:
        kind = vocabulary.kind
        raise UserError(f"documents is missing: a vocabulary of the kind {kind} is learnt from text; name their stage")
    return sample


def _measured(context: Context, sample: Sample, summary: str) -> Metrics:
    found = report(context.name, context.output, sample.documents())
    (context.logs / REPORT).write_text(found.markdown(), encoding="utf-8")
    own = found.rows[0]
    return {
        "summary": f"{summary}, {own.bytes_per_token:.2f} bytes each",
        "fertility": [row.metrics() for row in found.rows],
        "notes": found.notes,
    }


STAGE = Stage(
    name="tokenizer",
    version=2,
    config=Config,
    optional_inputs={"documents": Kind.DOCUMENTS},
    many={"documents": "blend"},
    output=Kind.TOKENIZER,
    run=run,
    resolved=resolved,
)
