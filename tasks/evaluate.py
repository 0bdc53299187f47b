"""Stage `evaluate`: exact match by greedy generation over a whole split."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from common.config import FrozenModel
from common.errors import UserError
from common.files import canonical_json
from models.engine import Bits, EngineName, Precision, inference_engine
from models.generation import generate
from models.sampling import SamplingConfig
from models.weights import whole_pieces
from tasks.checkpoint import read_model, tokenizer_of
from tasks.stage import Context, Kind, Metrics, Stage

RESULTS, SAMPLES = "results.json", "samples.parquet"


class Config(FrozenModel):
    """What is evaluated, and with what."""

    engine: EngineName = "torch"
    """The engine that generates."""
    precision: Precision = "float32"
    """What it computes in."""
    # Null stands in no key: what was measured before there were bits counts as it did.
    bits: Bits | None = Field(default=None, exclude_if=lambda bits: bits is None)
    """Bits per weight in inference; null for whole weights; MLX alone."""
    split: Literal["train", "validation", "test"] = "test"
    """The split of the documents."""
    max_new_tokens: int = Field(default=16, gt=0)
    """Tokens after which an answer is cut off and counts as wrong."""
    batch_size: int = Field(default=1024, gt=0)
    """Prompts that are generated for at once."""
    shown_samples: int = Field(default=10, ge=0)
    """Predictions that are shown; all of them are kept."""


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes `results.json` and `samples.parquet` with every prompt, target and prediction.

    Raises UserError for documents without prompts and targets.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    prompts, targets = read_problems(inputs["documents"], config.split)
    model = read_model(inputs["model"])
    tokenizer = tokenizer_of(inputs["model"], model.config)
    engine = inference_engine(
        config.engine, model.config, config.precision, whole_pieces(model.weights), bits=config.bits
    )
    parts = tokenizer.encode_parts(prompts, targets)
    encoded = [[tokenizer.bos_id, *prompt] for prompt, _ in parts]
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=config.max_new_tokens)
    answers = generate(engine, encoded, sampling, stop_ids=[tokenizer.eos_id], batch_size=config.batch_size)
    # Tokens, not text: decoding leaves special tokens out, and an answer that did not end is not the answer.
    correct = [answer == [*target, tokenizer.eos_id] for answer, (_, target) in zip(answers, parts, strict=True)]
    predictions = [tokenizer.decode_after(prompt, answer) for prompt, answer in zip(encoded, answers, strict=True)]
    columns: dict[str, list[Any]] = {
        "prompt": prompts,
        "target": targets,
        "prediction": predictions,
        "correct": correct,
    }
    pq.write_table(pa.table(columns), context.output / SAMPLES, compression="zstd")
    results = {
        "split": config.split,
        **config.model_dump(include={"bits"}),  # nothing where it is null
        **summarise(targets, correct),
        "samples": [
            {name: column[row] for name, column in columns.items()}
            for row in range(min(config.shown_samples, len(prompts)))
        ],
    }
    (context.output / RESULTS).write_bytes(canonical_json(results))
    summary = f"exact match {results['exact_match']:.2%} of {results['n']:,}"
    return {"summary": summary, **results, "device": engine.device}


def read_problems(documents: Path, split: str) -> tuple[list[str], list[str]]:
    """Prompts and targets of a split. Raises UserError where there are none."""
    import pyarrow.parquet as pq

    prompts: list[str] = []
    targets: list[str] = []
    for path in sorted(documents.glob(f"{split}-*.parquet")):
        file = pq.ParquetFile(path)
        missing = {"prompt", "target"} - set(file.schema_arrow.names)
        if missing:
            raise UserError(f"the documents have no column {missing.pop()!r}; exact match needs prompts and targets")
        table = file.read(["prompt", "target"])
        prompts += table["prompt"].to_pylist()
        targets += table["target"].to_pylist()
    if not prompts:
        raise UserError(f"the documents have no {split} split to evaluate")
    return prompts, targets


def summarise(targets: Sequence[str], correct: Sequence[bool]) -> dict[str, Any]:
    """The share of correct answers with its standard error, over all and by the answer's length in characters."""
    by_length = defaultdict(list)
    for target, right in zip(targets, correct, strict=True):
        by_length[len(target)].append(right)
    share = sum(correct) / len(correct)
    return {
        "n": len(correct),
        "exact_match": share,
        "standard_error": math.sqrt(share * (1 - share) / len(correct)),
        "by_answer_length": [
            {"length": length, "n": len(group), "exact_match": sum(group) / len(group)}
            for length, group in sorted(by_length.items())
        ],
    }


STAGE = Stage(
    name="evaluate",
    version=2,
    config=Config,
    inputs={"model": Kind.MODEL, "documents": Kind.DOCUMENTS},
    output=Kind.EVALUATION,
    run=run,
)
