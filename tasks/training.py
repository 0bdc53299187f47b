"""What the training stages share: a model trained on token shards, from fresh weights or an artifact's."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.config import FrozenModel
from common.errors import UserError
from models.config import ModelConfig
from models.engine import EngineName, Precision, TrainingEngine, training_engine
from models.lora import adapter_count, adapter_shapes, initial_adapters
from models.optimizer import OptimizerConfig
from models.tokenizer import Tokenizer
from models.training.checkpoint import Checkpoints, named
from models.training.config import Portion, TrainingConfig
from models.training.events import Note, TrainingResult
from models.training.loop import Start, train
from models.training.metrics import Metrics as TrainingLogs
from models.tuning import WHOLE, Tuning
from models.weights import Array, parameter_count
from tasks.blend import blend_rows, tokenizer_folder, tokens_inputs
from tasks.checkpoint import Adapters, ModelFolder, check_vocabulary, whole, write_model
from tasks.growth_record import growth_phrase, growths
from tasks.history import Grown, History, Loss, Trained
from tasks.stage import Context, Kind, Metrics, ModelOf, Stage, StageFunction
from tasks.tokens import copy_tokenizer
from tasks.training_data import TrainingData, check_pairs, training_data
from tasks.training_tasks import probes, resolved


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
    check_pairs(config.training, tokens, tuning)
    own_tokenizer = tokenizer_folder(tokens, inputs.get("model"))
    tokenizer = Tokenizer(own_tokenizer)
    check_vocabulary(len(tokenizer), model)
    filesystem, folder = context.scratch
    with training_data(config.training, model, tokens, tokenizer.pad_id, tuning) as data:
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


def _forget_peak() -> None:
    """Lets Linux measure this process's memory anew: it may have done other stages before."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _entry(model: ModelConfig, result: TrainingResult, start: Start, data: TrainingData) -> Trained:
    return Trained(
        parameters=parameter_count(model),
        steps=result.state.step,
        tokens=result.tokens,
        flops=result.flops,
        fresh_optimizer=start.optimizer is None,
        measured_on=data.measured_on,
        validation=tuple(Loss(step=one.step, loss=one.loss) for one in result.state.validations),
    )


def _metrics(model: ModelConfig, result: TrainingResult, device: str, data: TrainingData) -> dict[str, Any]:
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
