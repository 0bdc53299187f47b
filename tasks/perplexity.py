"""Stage `perplexity`: how well a model predicts the text of a split, and how it goes on with some prompts.

B windows read at once, T positions of a window.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from common.config import FrozenModel
from common.errors import StageInterrupted, UserError
from common.files import canonical_json
from models.config import ModelConfig
from models.engine import Batch, Bits, EngineName, InferenceEngine, Precision, inference_engine
from models.generation import generate
from models.sampling import SamplingConfig
from models.tokenizer import Tokenizer
from models.training.events import Note
from models.weights import whole_pieces
from tasks.checkpoint import read_model, tokenizer_of
from tasks.scores import RESULTS
from tasks.stage import Context, Kind, Metrics, Stage

REPORT_SECONDS = 10.0


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
    """The split of the documents."""
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


class Window(NamedTuple):
    """A part of a document."""

    tokens: list[int]
    """What the model reads, and the last target behind it."""
    scored: int
    """How many of its targets, the last ones, are scored in it."""


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes `results.json`: the loss per token, the perplexity per token and per word, and bits per byte.

    Before each document stands what stood there in training (<bos>, or the <eos> of the document before), which is not
    scored. Every token of every document is scored once, with at least window − stride tokens before it where the
    document has them. Words are what white space separates; bytes are those of UTF-8. Raises UserError where the split
    has no text, the window exceeds the model's positions, or what the model says is not finite.
    """
    model = read_model(inputs["model"])
    tokenizer = tokenizer_of(inputs["model"], model.config)
    window = _window(config, model.config)
    stride = config.stride or max(1, window // 2)
    engine = inference_engine(
        config.engine, model.config, config.precision, whole_pieces(model.weights), bits=config.bits
    )
    first = tokenizer.bos_id
    total, tokens, words, size = 0.0, 0, 0, 0
    told = time.monotonic()

    def watch(scored: int) -> None:
        nonlocal told
        if context.should_stop():
            raise StageInterrupted("the perplexity was stopped")
        if time.monotonic() - told > REPORT_SECONDS:
            told = time.monotonic()
            context.report(Note(f"{tokens + scored:,} tokens read"))

    for text in read_texts(inputs["documents"], config.split):
        ids = tokenizer.encode(text)
        total += negative_log_likelihood(engine, [first, *ids], window, stride, config.batch_size, watch)
        tokens, words, size = tokens + len(ids), words + len(text.split()), size + len(text.encode())
    if not tokens or not words:
        raise UserError(f"the documents have no text in their {config.split} split to measure perplexity on")
    if not math.isfinite(total):
        raise UserError("the model's log-probabilities are not finite: look at the losses of its training")
    results = {
        "measure": "perplexity",
        "split": config.split,
        "tokens": tokens,
        "words": words,
        "bytes": size,
        "loss": total / tokens,
        "token_perplexity": _exponential(total / tokens),
        "word_perplexity": _exponential(total / words),
        "bits_per_byte": total / size / math.log(2),
        "window": window,
        "stride": stride,
        "precision": config.precision,
        **config.model_dump(include={"bits"}),  # nothing where it is null
        "samples": _samples(config, engine, tokenizer, first),
    }
    (context.output / RESULTS).write_bytes(canonical_json(results))
    summary = f"perplexity {results['token_perplexity']:,.1f} per token, {results['word_perplexity']:,.1f} per word"
    return {"summary": summary, **results, "device": engine.device}


def read_texts(documents: Path, split: str) -> Iterator[str]:
    """The texts of a split, a few in memory at a time. Raises UserError where there is no such split."""
    import pyarrow.parquet as pq

    paths = sorted(documents.glob(f"{split}-*.parquet"))
    if not paths:
        raise UserError(f"the documents have no {split} split")
    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(256, columns=["text"]):
            yield from batch["text"].to_pylist()


def negative_log_likelihood(
    engine: InferenceEngine,
    tokens: Sequence[int],
    window: int,
    stride: int,
    batch_size: int,
    watch: Callable[[int], None] = lambda scored: None,
) -> float:
    """The sum over all tokens but the first of −ln p(token | tokens before it in its window).

    `watch` is told after each batch how many have been scored.
    """
    total, scored = 0.0, 0
    parts = windows(tokens, window, stride)
    while batch := list(itertools.islice(parts, batch_size)):
        total -= _scored(engine, batch)
        scored += sum(part.scored for part in batch)
        watch(scored)
    return total


def windows(tokens: Sequence[int], window: int, stride: int) -> Iterator[Window]:
    """Cuts a document so that each token but the first is scored exactly once: the first window scores all of its
    own, each further one the `stride` tokens that it adds, or what is left."""
    targets = len(tokens) - 1
    done = 0
    while done < targets:
        end = min(targets, done + (stride if done else window))
        begin = max(0, end - window)
        yield Window(list(tokens[begin : end + 1]), end - done)
        done = end


def _scored(engine: InferenceEngine, parts: Sequence[Window]) -> float:
    """The sum of the scored targets' log-probabilities."""
    length = max(len(part.tokens) for part in parts) - 1
    tokens_BT, targets_BT = (np.zeros((len(parts), length), np.int32) for _ in range(2))
    scored_BT = np.zeros((len(parts), length), np.bool_)
    for row, part in enumerate(parts):
        own = len(part.tokens) - 1
        tokens_BT[row, :own], targets_BT[row, :own] = part.tokens[:-1], part.tokens[1:]
        scored_BT[row, own - part.scored : own] = True
    found_BT = engine.log_probabilities(Batch(tokens_BT, targets_BT, scored_BT))
    return float(found_BT.sum(dtype=np.float64, where=scored_BT))


def _window(config: Config, model: ModelConfig) -> int:
    longest = model.max_position_embeddings
    if config.window is not None and config.window > longest:
        raise UserError(f"window {config.window} exceeds the model's max_position_embeddings {longest}")
    return config.window or longest


def _exponential(value: float) -> float | None:
    """None where the number is too large to be one, as of a model that knows nothing and words of many tokens."""
    try:
        return math.exp(value)
    except OverflowError:
        return None


def _samples(config: Config, engine: InferenceEngine, tokenizer: Tokenizer, first: int) -> list[dict[str, str]]:
    encoded = [[first, *tokenizer.encode(prompt)] for prompt in config.prompts]
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
    version=2,
    config=Config,
    inputs={"model": Kind.MODEL, "documents": Kind.DOCUMENTS},
    output=Kind.EVALUATION,
    run=run,
    model_of=model_of,
)
