"""Stage `perplexity`: how well a model predicts the text of a split, and how it goes on with some prompts."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from common.config import FrozenModel
from common.errors import StageInterrupted, UserError
from common.files import canonical_json
from models.config import ModelConfig
from models.engine import Bits, EngineName, InferenceEngine, Precision, inference_engine
from models.generation import NotFinite, generate
from models.sampling import SamplingConfig
from models.tokenizer import Tokenizer, in_parts
from models.training.events import Note
from models.weights import whole_pieces
from tasks.checkpoint import read_model, tokenizer_of
from tasks.corpus.hub_source import HubSource
from tasks.corpus.sources import TEXT, Reading, Rows
from tasks.document_losses import Block, DocumentLosses, blocks_of
from tasks.documents import data_of
from tasks.scores import RESULTS, SAMPLES
from tasks.sliding_windows import negative_log_likelihoods
from tasks.stage import Context, Kind, Metrics, Stage

REPORT_SECONDS = 10.0
WIKITEXT_2 = HubSource(
    kind="hub",
    id="Salesforce/wikitext",
    config="wikitext-2-raw-v1",
    split="test",
    rows="lines",
    revision="b08601e04326c79dfdd32d625aee71d232d685c3",
)
"""The text of WikiText-2 (Merity et al., arXiv 1609.07843) as it was written, with no word replaced: one document."""


class Config(FrozenModel):
    """What text is read, through which windows, and which prompts are continued."""

    engine: EngineName = "torch"
    """The engine that reads and generates."""
    precision: Precision = "float32"
    """What it computes in."""
    # Null stands in no key: what was measured before there were bits counts as it did.
    bits: Bits | None = Field(default=None, exclude_if=lambda bits: bits is None)
    """Bits per weight in inference; null for whole weights; MLX alone."""
    split: Literal["train", "validation", "test"] = "test"
    """The split of the documents; a data set has its own under `data`."""
    # Null stands in no key: the documents do.
    data: HubSource | None = Field(default=None, exclude_if=lambda data: data is None)
    """The data set of the hub that is read where no documents are given: then, unless another is named, the test split
    of WikiText-2 raw as one document. Below `CAIRN_HUB` its digest is filled in, else the commit on the network."""
    window: int | None = Field(default=None, gt=0)
    """Positions of a window; null for as many as the model has."""
    stride: int | None = Field(default=None, gt=0)
    """Tokens that each further window scores, the others in it being context; null for half a window."""
    batch_size: int = Field(default=8, gt=0)
    """Windows that are read at once."""
    prompts: tuple[str, ...] = ()
    """Texts that the model goes on with, for people to read."""
    sampling: SamplingConfig = SamplingConfig()
    """How it goes on with them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.window and self.stride and self.stride > self.window:
            raise ValueError(f"stride {self.stride} exceeds the window of {self.window}: tokens would be left out")
        return self


class _Read(NamedTuple):
    """What is read."""

    texts: Iterator[str]
    split: str
    data: dict[str, str | None]
    """The data sets by their names: their digests or commits."""


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes `results.json`: the loss per token, the perplexity per token and per word, bits per byte, and their
    standard errors under `scores`; and `samples.parquet` with a row for each block of the documents' texts.

    Before each document stands what stood there in training (<bos>, or the <eos> of the document before), which is not
    scored; `bos` in the results says which token. Every token of every document is scored once, with at least window −
    stride tokens before it where the document has them. Words are what white space separates; bytes are those of
    UTF-8. Raises UserError where the split has no text, the window exceeds the model's positions, or what the model
    says is not finite.
    """
    read = _read(config, inputs)
    model = read_model(inputs["model"])
    tokenizer = tokenizer_of(inputs["model"], model.config)
    window = _window(config, model.config)
    stride = config.stride or max(1, window // 2)
    engine = inference_engine(
        config.engine, model.config, config.precision, whole_pieces(model.weights), bits=config.bits
    )
    losses = DocumentLosses(context.output / SAMPLES)
    waiting: deque[list[Block]] = deque()
    documents = _encoded(read.texts, tokenizer, waiting)
    try:
        scored = negative_log_likelihoods(engine, documents, window, stride, config.batch_size, _Watch(context))
        for losses_T in scored:
            losses.add(waiting.popleft(), losses_T)
        samples = _samples(config, engine, tokenizer)
    except NotFinite as error:
        raise NotFinite(f"the model '{context.labels.get('model', context.name)}'") from error
    finally:
        losses.close()
    if not losses.sizes["tokens"] or not losses.sizes["words"]:
        raise UserError(f"the documents have no text in their {read.split} split to measure perplexity on")
    scores = losses.scores()
    results = {
        "measure": "perplexity",
        "split": read.split,
        "data": read.data,
        **losses.sizes,
        **{score.metric: score.value for score in scores},
        "scores": [score.dumped() for score in scores],
        "bos": tokenizer.backend.id_to_token(tokenizer.bos_id),
        "window": window,
        "stride": stride,
        "precision": config.precision,
        **config.model_dump(include={"bits"}),  # nothing where it is null
        "samples": samples,
    }
    (context.output / RESULTS).write_bytes(canonical_json(results))
    return {"summary": _summary(results), **results, "device": engine.device}


def _summary(results: Mapping[str, Any]) -> str:
    perplexities = ((unit, results[f"{unit}_perplexity"]) for unit in ("token", "word"))
    return "perplexity " + ", ".join(
        f"{'∞' if value is None else f'{value:,.1f}'} per {unit}" for unit, value in perplexities
    )


class _Watch:
    """Is told how many tokens were scored: says so now and then, and stops where it is to."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._tokens = 0
        self._told = time.monotonic()

    def __call__(self, scored: int) -> None:
        """Raises StageInterrupted where the stage was told to stop."""
        self._tokens += scored
        if self._context.should_stop():
            raise StageInterrupted("the perplexity was stopped")
        if time.monotonic() - self._told > REPORT_SECONDS:
            self._told = time.monotonic()
            self._context.report(Note(f"{self._tokens:,} tokens read"))


def _encoded(texts: Iterator[str], tokenizer: Tokenizer, waiting: deque[list[Block]]) -> Iterator[list[int]]:
    """The tokens of each text that is not empty, behind what stands before a document; `waiting` gets its blocks."""
    for part in in_parts(text for text in texts if text):
        for text, encoding in zip(part, tokenizer.encode_batch(part), strict=True):
            waiting.append(blocks_of(text, [begin for begin, _ in encoding.offsets]))
            yield [tokenizer.bos_id, *encoding.ids]


def _read(config: Config, inputs: Mapping[str, Path]) -> _Read:
    if ("documents" in inputs) == (config.data is not None):
        raise UserError("perplexity is measured either on documents or on data, a data set of the hub: name one")
    if config.data is None:
        documents = inputs["documents"]
        return _Read(read_texts(documents, config.split), config.split, data_of(documents))
    data = config.data.resolved()
    return _Read(_texts_of(data), "+".join(data.splits), {data.id: data.digest or data.revision})


def read_texts(documents: Path, split: str) -> Iterator[str]:
    """The texts of a split, a few in memory at a time. Raises UserError where there is no such split."""
    import pyarrow.parquet as pq

    paths = sorted(documents.glob(f"{split}-*.parquet"))
    if not paths:
        raise UserError(f"the documents have no {split} split")
    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(256, columns=[TEXT]):
            yield from batch[TEXT].to_pylist()


def _texts_of(data: HubSource) -> Iterator[str]:
    """The texts of a data set, a few in memory at a time."""
    with TemporaryDirectory() as folder:
        for part in data.open(Reading(folder=Path(folder))).parts:
            if isinstance(part, Rows):
                yield from part.table[TEXT].to_pylist()


def resolved(config: Config) -> Config:
    """The config with the digest of the data set that it reads, or the commit on the network.

    Raises UserError where it is in neither place, or is not what its digest says.
    """
    if config.data is None:
        return config
    data = config.data.resolved()
    if data.digest is None and data.revision is None:
        data = data.model_copy(update={"revision": data.commit()})
    return config.model_copy(update={"data": data})


def _window(config: Config, model: ModelConfig) -> int:
    longest = model.max_position_embeddings
    if config.window is not None and config.window > longest:
        raise UserError(f"window {config.window} exceeds the model's max_position_embeddings {longest}")
    return config.window or longest


def _samples(config: Config, engine: InferenceEngine, tokenizer: Tokenizer) -> list[dict[str, str]]:
    encoded = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in config.prompts]
    for prompt, ids in zip(config.prompts, encoded, strict=True):
        if len(ids) > engine.config.max_position_embeddings:
            raise UserError(
                f"the prompt {prompt[:40]!r} has {len(ids)} tokens; the model takes "
                f"{engine.config.max_position_embeddings}"
            )
    answers = generate(engine, encoded, config.sampling, tokenizer.stop_ids, config.batch_size)
    return [
        {"prompt": prompt, "continuation": tokenizer.decode_after(ids, answer)}
        for prompt, ids, answer in zip(config.prompts, encoded, answers, strict=True)
    ]


def model_of(config: Config, inputs: Mapping[str, ModelConfig]) -> ModelConfig:
    """The model that is measured. Raises UserError for a window that is longer than its positions."""
    window = _window(config, inputs["model"])
    if config.stride and config.stride > window:
        raise UserError(f"stride {config.stride} exceeds the window of {window}: tokens would be left out")
    return inputs["model"]


STAGE = Stage(
    name="perplexity",
    version=4,
    config=Config,
    inputs={"model": Kind.MODEL},
    optional_inputs={"documents": Kind.DOCUMENTS},
    instead={"documents": ("data", WIKITEXT_2)},
    output=Kind.EVALUATION,
    run=run,
    resolved=resolved,
    model_of=model_of,
)
