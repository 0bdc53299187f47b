"""What the training stages share: a model trained on token shards, from fresh weights or an artifact's."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from common.config import FrozenModel
from common.errors import UserError
from common.files import canonical_json, sha256_bytes, sha256_file
from models.config import ModelConfig
from models.engine import EngineName, Precision, TrainingEngine, training_engine
from models.lora import adapter_count, adapter_shapes, initial_adapters
from models.optimizer import OptimizerConfig
from models.tokenizer import TOKENIZER_FILE, Tokenizer
from models.training.batches import Batches, Source
from models.training.checkpoint import Checkpoints, named
from models.training.config import Portion, TrainingConfig, ValidationConfig
from models.training.events import Note, TrainingResult
from models.training.loop import Start, train
from models.training.metrics import Metrics as TrainingLogs
from models.tuning import WHOLE, Tuning
from models.weights import Array, parameter_count
from tasks.blend import TokensInput, blend_rows, tokenizer_folder, tokens_inputs
from tasks.checkpoint import Adapters, ModelFolder, check_vocabulary, whole, write_model
from tasks.growth_record import growth_phrase, growths
from tasks.history import Grown, History, Loss, Trained
from tasks.stage import Context, Kind, Metrics, ModelOf, Stage, StageFunction
from tasks.tokens import copy_tokenizer
from tasks.training_tasks import probes, resolved

_ROWS_AT_ONCE = 256


class TrainingStageConfig(FrozenModel):
    """What every training stage has."""

    engine: EngineName = "torch"
    """The engine that trains."""
    precision: Precision = "float32"
    """What it computes in; weights and moments are float32 always."""
    training: TrainingConfig
    """The run."""
    blend: tuple[Portion, ...] = ()
    """How much is drawn of each of several tokens, written where they are named: `tokens: {books: 0.5, web: {weight:
    0.5, budget: 1000000}}`; empty for equal shares."""


def check_positions(training: TrainingConfig, model: ModelConfig) -> None:
    """Raises UserError for rows that are longer than the model's positions."""
    if training.sequence_length > model.max_position_embeddings:
        raise UserError(
            f"training.sequence_length {training.sequence_length} exceeds the model's max_position_embeddings "
            f"{model.max_position_embeddings}; shorten the rows or give the model more positions"
        )


def usable_moments(model: ModelFolder, optimizer: OptimizerConfig, context: Context) -> dict[str, Array] | None:
    """The moments that come with a model whose adapters are still apart; where an optimizer cannot go on with them,
    they are left behind, and it is said."""
    if model.optimizer is None or model.trained_with is None:
        return None
    if model.adapters is not None:
        why = "the moments are of adapters, which are now part of the weights"
    elif model.trained_with.name != optimizer.name:
        why = f"the moments are {model.trained_with.name}'s"
    else:
        return model.optimizer
    context.report(Note(f"{why}: {optimizer.name} starts anew"))
    return None


def run_training(
    config: TrainingStageConfig,
    model: ModelConfig,
    start: Start,
    inputs: Mapping[str, Path],
    context: Context,
    history: History = (),
    tuning: Tuning = WHOLE,
) -> Metrics:
    """Trains and writes a model artifact with optimizer state and tokenizer; gives what the record says of it.

    `history`: what the model has been through before. `tuning`: how the engine trains; with adapters, fresh ones are
    trained, and the weights of the artifact are those of `start`.

    In several processes each does all of this, and process 0 alone writes.

    Raises UserError where the tokens do not fit the model, each other, or what is asked of them, and what the loop
    raises.
    """
    check_positions(config.training, model)
    _forget_peak()
    tokens = tokens_inputs(inputs, config.blend, context)
    _check_pairs(config.training, tokens, tuning)
    own_tokenizer = tokenizer_folder(tokens, inputs.get("model"))
    tokenizer = Tokenizer(own_tokenizer)
    check_vocabulary(len(tokenizer), model)
    filesystem, folder = context.scratch
    with _data(config.training, model, tokens, tokenizer.pad_id, tuning) as data:
        for note in data.notes:
            context.report(Note(note))
        engine = training_engine(
            config.engine, model, config.training.optimizer, config.precision, context.runtime.layout, tuning
        )
        if tuning.lora is not None:
            start = start._replace(adapters=initial_adapters(model, tuning.lora, config.training.seed))
        with probes(config.training, own_tokenizer, engine.inference(), context) as asking:
            result = train(
                engine,
                model,
                data.batches,
                data.validation,
                config.training,
                Checkpoints(filesystem, folder, context.runtime.checkpoints),
                start,
                report=context.report,
                metrics=TrainingLogs(
                    context.logs,
                    context.name,
                    config.model_dump(mode="json"),
                    data.validated,
                    tuning.preference is not None,
                    _asked(config.training),
                ),
                should_stop=context.should_stop,
                decode=tokenizer.decode,
                probes=asking,
                continue_on=context.runtime.continue_on,
            )
        blend = blend_rows(tokens, data.batches, result.state.step)
    history = (*history, _entry(model, result, start, data))
    # Every process exports, and process 0 writes: what is spread over several is gathered.
    trained = _model_folder(engine, model, config.training.optimizer, history, tuning)
    if engine.process == 0:
        write_model(context.output, trained)
        copy_tokenizer(own_tokenizer, context.output)
    metrics = _metrics(model, result, engine.device, data)
    if len(history) > 1 and isinstance(history[-2], Grown):
        _add_growth(metrics, history)
    if tuning.lora is not None:
        metrics["trained_parameters"] = adapter_count(model, tuning.lora)
    return {**metrics, "blend": blend, "peak_memory_bytes": engine.peak_memory()}


def training_stage(
    name: str, version: int, config: type[TrainingStageConfig], run: StageFunction, model_of: ModelOf
) -> Stage:
    """The declaration of a stage that trains on tokens, and on a model unless its config describes a new one."""
    model = {} if "model" in config.model_fields else {"model": Kind.MODEL}
    return Stage(
        name=name,
        version=version,
        config=config,
        inputs={**model, "tokens": Kind.TOKENS},
        many={"tokens": "blend"},
        lazy={"tokens": ".safetensors"},
        output=Kind.MODEL,
        run=run,
        resolved=_resolved,
        trains=True,
        model_of=model_of,
    )


def _resolved(config: TrainingStageConfig) -> TrainingStageConfig:
    return config.model_copy(update={"training": resolved(config.training)})


def _asked(training: TrainingConfig) -> tuple[str, ...]:
    """The tasks that are asked while training."""
    tasks = None if training.validation is None else training.validation.tasks
    return () if tasks is None else tasks.names


def _model_folder(
    engine: TrainingEngine, model: ModelConfig, optimizer: OptimizerConfig, history: History, tuning: Tuning
) -> ModelFolder:
    """What an engine has trained, with its adapters apart from the weights."""
    weights = whole(engine.export("weights"), model)
    adapters = None
    if tuning.lora is not None:
        names = adapter_shapes(model, tuning.lora).keys() & weights.keys()
        adapters = Adapters(tuning.lora, {name: weights.pop(name) for name in names})
    return ModelFolder(
        config=model,
        weights=weights,
        optimizer=whole(engine.export("optimizer"), model),
        trained_with=optimizer,
        history=history,
        adapters=adapters,
    )


def _check_pairs(training: TrainingConfig, tokens: Sequence[TokensInput], tuning: Tuning) -> None:
    """Raises UserError where pairs of documents are not for preference tuning, or preference tuning has none."""
    prefers = tuning.preference is not None
    for one in tokens:
        if prefers and not one.pairs:
            raise UserError(
                f"the tokens '{one.name}' are no pairs of answers: make them with loss_on: pairs, of documents with "
                f"conversations: preferences"
            )
        if one.pairs and not prefers:
            raise UserError(f"the tokens '{one.name}' are pairs of answers, of which the stage dpo alone learns")
    if training.packing == "pairs" and not prefers:
        raise UserError("training.packing: pairs is for the stage dpo alone; leave it out")


def _forget_peak() -> None:
    """Lets Linux measure this process's memory anew: it may have done other stages before."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class _Data(NamedTuple):
    """What a run reads."""

    batches: Batches
    validation: Batches | None
    measured_on: str | None
    """Identity of the validation rows; None where there are none, and where the loss on them is no cross-entropy."""
    validated: list[str]
    """The sources that have a validation loss of their own: where there are several."""
    notes: list[str]
    """What is said of them."""


@contextmanager
def _data(
    config: TrainingConfig, model: ModelConfig, tokens: Sequence[TokensInput], pad_id: int, tuning: Tuning
) -> Iterator[_Data]:
    """What a run reads; its shards are fetched no longer after the block.

    Raises UserError where splits are missing or too small, and where the budgets do not last.
    """
    for one in tokens:
        if "train" not in one.splits:
            raise UserError(f"the tokens '{one.name}' have no train split")
    with ExitStack() as stack:
        batches = stack.enter_context(_batches(config, model, [one.splits["train"] for one in tokens], pad_id))
        batches.require(config.steps)
        if config.validation is None:
            yield _Data(batches, None, None, [], [])
            return
        sources, notes = _validation_sources(tokens)
        validation = stack.enter_context(_batches(config, model, sources, pad_id))
        validated = [source.name for source in sources] if len(sources) > 1 else []
        measured_on = None
        if tuning.preference is None:
            tokenizer = tokens[0].folder / "tokenizer" / TOKENIZER_FILE
            measured_on = _identity(validation, [source.portion for source in sources], config.validation, tokenizer)
        yield _Data(batches, validation, measured_on, validated, notes)


def _batches(config: TrainingConfig, model: ModelConfig, sources: Sequence[Source], pad_id: int) -> Batches:
    return Batches(
        sources,
        seed=config.seed,
        sequence_length=config.sequence_length,
        packing=config.packing,
        batch_size=config.batch_size,
        document_masking=config.document_masking,
        pad_id=pad_id,
        vocab_size=model.vocab_size,
        shuffled=sources[0].split == "train",
    )


def _identity(validation: Batches, portions: Sequence[Portion], config: ValidationConfig, tokenizer: Path) -> str:
    """Identity of the validation rows: all that stands in those that are taken, and each source's share of the loss.

    The rows are read for it once, as every validation reads them.
    """
    total = sum(Fraction(str(portion.weight)) for portion in portions)
    sources = []
    for number, (source, portion) in enumerate(zip(validation.sources, portions, strict=True)):
        rows = source.rows if config.rows is None else min(config.rows, source.rows)
        share = Fraction(str(portion.weight)) / total
        sources.append([str(share), rows, _rows_digest(validation, number, rows)])
    return sha256_bytes(canonical_json([validation.sequence_length, sha256_file(tokenizer), sorted(sources)]))


def _rows_digest(batches: Batches, source: int, rows: int) -> str:
    """Digest of the first rows of a source: tokens, targets, which of them count, and documents."""
    digest = hashlib.sha256()
    for first in range(0, rows, _ROWS_AT_ONCE):
        for array in batches.source_rows(source, first, min(_ROWS_AT_ONCE, rows - first)):
            digest.update(b"" if array is None else array.tobytes())
    return digest.hexdigest()


def _entry(model: ModelConfig, result: TrainingResult, start: Start, data: _Data) -> Trained:
    return Trained(
        parameters=parameter_count(model),
        steps=result.state.step,
        tokens=result.tokens,
        flops=result.flops,
        fresh_optimizer=start.optimizer is None,
        measured_on=data.measured_on,
        validation=tuple(Loss(step=one.step, loss=one.loss) for one in result.state.validations),
    )


def _validation_sources(tokens: Sequence[TokensInput]) -> tuple[list[Source], list[str]]:
    """What is validated on, without budgets, and notes of what cannot be.

    A source of a blend may be too small to give some of it away; what is measured is then said to be of the others.
    """
    found = [
        replace(one.splits["validation"], portion=Portion(weight=one.portion.weight))
        for one in tokens
        if "validation" in one.splits
    ]
    if not found:
        raise UserError(
            "the tokens have no validation split: make one of the documents, or set training.validation: null"
        )
    missing = [one.name for one in tokens if "validation" not in one.splits]
    return found, [f"'{name}' has no validation split: validation losses are of the other tokens" for name in missing]


def _metrics(model: ModelConfig, result: TrainingResult, device: str, data: _Data) -> dict[str, Any]:
    state = json.loads(result.state.model_dump_json())
    best = None if result.best is None else json.loads(result.best.model_dump_json())
    for record in [*state["validations"], *([best] if best else [])]:
        record["by_source"] = dict(zip(data.validated, record["by_source"], strict=True))
    others = [f"went on from a checkpoint of {named(result.other_engines)}"] if result.other_engines else []
    return {
        "summary": _summary(model, result),
        "parameters": parameter_count(model),
        "steps": result.state.step,
        "stopped_early": result.stopped_early,
        "skipped_steps": result.state.skipped,
        "loss": result.loss,
        "tokens": result.tokens,
        "flops": result.flops,
        "training_seconds": result.state.seconds,
        "validation": state["validations"],
        "best_validation": best,
        "device": device,
        "notes": [*others, *data.notes],
    }


def _add_growth(metrics: dict[str, Any], history: History) -> None:
    """Adds what the last growth did to what the record says of the training after it."""
    for growth in growths(history)[-1:]:
        metrics["growth"] = json.loads(growth.model_dump_json())
        metrics["summary"] += f", {growth_phrase(growth)}"
        metrics["notes"] += [] if growth.note is None else [growth.note]


def _summary(model: ModelConfig, result: TrainingResult) -> str:
    parts = [f"{parameter_count(model):,} parameters, {result.state.step:,} steps"]
    if result.stopped_early:
        parts.append("stopped early")
    if result.state.validations:
        last = result.state.validations[-1]
        parts.append(f"validation loss {last.loss:.4f}")
        if last.exact_match is not None:
            parts.append(f"exact match {last.exact_match:.2%}")
        if last.preferences is not None:
            parts.append(f"accuracy {last.preferences.accuracy:.2%}, margin {last.preferences.margin:.4f}")
        parts += [f"{score.task} {score.value:.1%}" for score in last.tasks]
    if result.state.skipped:
        parts.append(f"{result.state.skipped} non-finite steps skipped")
    return ", ".join(parts)
