"""What `pretrain` and `refine` share: a model trained on token shards, from fresh weights or from an artifact's."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from common.config import FrozenModel
from common.errors import UserError
from models.config import ModelConfig
from models.engine import EngineName, Precision, training_engine
from models.tokenizer import Tokenizer
from models.training.batches import Batches, Source
from models.training.checkpoint import Checkpoints
from models.training.config import Portion, TrainingConfig
from models.training.events import TrainingResult
from models.training.loop import Start, train
from models.training.metrics import Metrics as TrainingLogs
from models.training.shards import ShardCounts, open_shard
from models.weights import parameter_count
from tasks.checkpoint import ModelFolder, check_vocabulary, whole, write_model
from tasks.stage import Context, Metrics
from tasks.tokens import copy_tokenizer


class TrainingStageConfig(FrozenModel):
    """What every training stage has."""

    engine: EngineName = "torch"
    """The engine that trains."""
    precision: Precision = "float32"
    """What it computes in; weights and moments are float32 always."""
    training: TrainingConfig
    """The run."""


def check_positions(training: TrainingConfig, model: ModelConfig) -> None:
    """Raises UserError for rows that are longer than the model's positions."""
    if training.sequence_length > model.max_position_embeddings:
        raise UserError(
            f"training.sequence_length {training.sequence_length} exceeds the model's max_position_embeddings "
            f"{model.max_position_embeddings}; shorten the rows or give the model more positions"
        )


def run_training(
    config: TrainingStageConfig, model: ModelConfig, start: Start, tokens: Path, context: Context
) -> Metrics:
    """Trains and writes a model artifact with optimizer state and tokenizer; gives what the record says of it.

    Raises UserError where the tokens do not fit the model, and what the loop raises.
    """
    check_positions(config.training, model)
    tokenizer = Tokenizer(tokens / "tokenizer")
    check_vocabulary(len(tokenizer), model)
    engine = training_engine(config.engine, model, config.training.optimizer, config.precision)
    validated = config.training.validation is not None
    batches = _batches(config.training, model, tokens, "train", tokenizer.pad_id)
    filesystem, folder = context.scratch
    result = train(
        engine,
        model,
        batches,
        _batches(config.training, model, tokens, "validation", tokenizer.pad_id) if validated else None,
        config.training,
        Checkpoints(filesystem, folder, context.runtime.checkpoints),
        start,
        report=context.report,
        metrics=TrainingLogs(context.logs, title=context.name, config=config.model_dump(mode="json")),
        should_stop=context.should_stop,
        decode=tokenizer.decode,
    )
    trained = ModelFolder(
        config=model,
        weights=whole(engine.export("weights"), model),
        optimizer=whole(engine.export("optimizer"), model),
        trained_with=config.training.optimizer,
    )
    write_model(context.output, trained)
    copy_tokenizer(tokens / "tokenizer", context.output)
    return _metrics(model, result, batches, engine.device)


def _batches(config: TrainingConfig, model: ModelConfig, tokens: Path, split: str, pad_id: int) -> Batches:
    shards = sorted(tokens.glob(f"{split}-*.safetensors"))
    if not shards:
        raise UserError(f"the tokens have no {split} split")
    return Batches(
        [_source(shards)],
        seed=config.seed,
        sequence_length=config.sequence_length,
        packing=config.packing,
        batch_size=config.batch_size,
        pad_id=pad_id,
        vocab_size=model.vocab_size,
        shuffled=split == "train",
    )


def _source(paths: list[Path]) -> Source:
    counts: list[ShardCounts] = []
    lengths: Counter[int] = Counter()
    for path in paths:
        file = open_shard(path)
        counts.append(ShardCounts(path.name, file.token_count, file.document_count))
        found, number = np.unique(np.diff(file.map().document_ends_D, prepend=np.uint64(0)), return_counts=True)
        lengths.update(dict(zip(found.tolist(), number.tolist(), strict=True)))
    return Source("the tokens", counts, sorted(lengths.items()), paths[0].parent.joinpath, Portion())


def _metrics(model: ModelConfig, result: TrainingResult, batches: Batches, device: str) -> dict[str, Any]:
    source = batches.sources[0]
    return {
        "summary": _summary(model, result),
        "parameters": parameter_count(model),
        "steps": result.state.step,
        "stopped_early": result.stopped_early,
        "skipped_steps": result.state.skipped,
        "loss": result.loss,
        "tokens": result.tokens,
        "flops": result.flops,
        "epochs": result.state.step * batches.batch_size / source.rows,
        "cut_documents": source.cut_documents,
        "dropped_tokens": source.dropped_tokens,
        "training_seconds": result.state.seconds,
        "validation": json.loads(result.state.model_dump_json())["validations"],
        "best_validation": None if result.best is None else json.loads(result.best.model_dump_json()),
        "device": device,
        "notes": [f"went on from a checkpoint of engine '{result.other_engine}'"] if result.other_engine else [],
    }


def _summary(model: ModelConfig, result: TrainingResult) -> str:
    parts = [f"{parameter_count(model):,} parameters, {result.state.step:,} steps"]
    if result.stopped_early:
        parts.append("stopped early")
    if result.state.validations:
        last = result.state.validations[-1]
        parts.append(f"validation loss {last.loss:.4f}")
        if last.exact_match is not None:
            parts.append(f"exact match {last.exact_match:.2%}")
    if result.state.skipped:
        parts.append(f"{result.state.skipped} non-finite steps skipped")
    return ", ".join(parts)
