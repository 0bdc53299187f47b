"""The one training loop of every engine: cadence, schedule, validation, checkpoints, resumption, progress, signals.

The contract: a run that is killed at any moment and started again ends with the weights, optimizer state, validation
history and early stop of one that never was. So everything that decides anything is in `RunState` or a function of
the step, and times decide only when something is written.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from common.errors import UserError
from common.files import canonical_json, sha256_bytes
from models.config import ModelConfig
from models.engine import StepResult, TrainingEngine
from models.preference import PreferenceFigures
from models.training.batches import Batches
from models.training.checkpoint import Checkpoint, Checkpoints, named
from models.training.clock import Clock
from models.training.config import TrainingConfig
from models.training.events import Event, Note, Progress, TrainingResult, Validation
from models.training.flops import peak_flops_per_second, training_flops_per_token
from models.training.metrics import Metrics
from models.training.prefetch import Prefetcher
from models.training.schedule import learning_rate_scale
from models.training.signals import StopSignals
from models.training.state import RunState, ValidationRecord
from models.training.validation import Probe, Validator
from models.weights import Array, Piece, assemble, canonical_shapes, whole_pieces

LOG_STEPS = 10
LOG_SECONDS = 1.0
"""The device's values are read every so many steps, or seconds where steps are slow: each reading waits for it."""
REPORT_SECONDS = 0.2
"""Progress is reported this often at most."""
EXIT_GO_ON_LATER = os.EX_TEMPFAIL
"""The exit status (75) of a process whose training was interrupted in good order and is to be started again."""


_GO_ON, _SAVE, _STOP = range(3)
"""What the processes of a run agree on between two steps: the largest of their words."""


class Interrupted(Exception):
    """Training was asked to stop and has written a checkpoint, from which the same call goes on."""

    def __init__(self, step: int) -> None:
        super().__init__(f"training was interrupted after step {step}; start it again to go on from there")
        self.step = step


class Start(NamedTuple):
    """What a run begins with."""

    weights: Mapping[str, Array]
    """Canonical arrays, whole; the reference of preference tuning too, whatever checkpoint the run goes on from."""
    optimizer: Mapping[str, Array] | None = None
    """An exported optimizer state, whole; None for a fresh one."""
    validated: bool = False
    """Whether the weights are validated before the first step, where the config asks for validation: those of a model
    that comes from elsewhere are worth knowing, those of a fresh one are not."""
    adapters: Mapping[str, Array] | None = None
    """For an engine that trains adapters: the weights then stay as they are, and checkpoints are without them."""


class _Pending(NamedTuple):
    step: int
    scale: float
    result: StepResult


def fingerprint(model: ModelConfig, config: TrainingConfig, batches: Batches, validation: Batches | None) -> str:
    """What a checkpoint has to agree on with the run that goes on from it."""
    parts = [
        model.model_dump(mode="json"),
        config.model_dump(mode="json"),
        batches.fingerprint,
        None if validation is None else validation.fingerprint,
    ]
    return sha256_bytes(canonical_json(parts))


def dropout_key(seed: int, step: int) -> int:
    """What dropout depends on: the same for a step that is done again, another for every other step and seed."""
    return (seed % (1 << 11) << 32) + step


def train(
    engine: TrainingEngine,
    model: ModelConfig,
    batches: Batches,
    validation: Batches | None,
    config: TrainingConfig,
    checkpoints: Checkpoints,
    start: Start,
    *,
    report: Callable[[Event], None],
    metrics: Metrics | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
    probes: Sequence[Probe] = (),
    should_stop: Callable[[], bool] = lambda: False,
    continue_on: bool = False,
) -> TrainingResult:
    """Trains from the newest intact checkpoint, or else from `start`, to the last step or an early stop.

    `batches` have to have the config's batch size and sequence length. With packing "pairs" the engine is one of
    preference tuning, and `start` its reference. `report` is told how it goes, `metrics` keeps
    it, `decode` makes text of sampled token ids, and `probes` are the tasks that the config asks, in its order.
    `should_stop` is asked between any two steps. `continue_on` goes on from another engine's checkpoint too. The final
    weights and moments are those of `engine.export`.

    In several processes, each is given all of this: `report` and `metrics` are used in process 0 alone, the others
    only read `checkpoints`, and one whose `should_stop` comes true stops all of them.

    Raises Interrupted after SIGTERM, SIGINT or `should_stop`, with a checkpoint written; UserError where too many
    steps in a row are not finite, where a checkpoint cannot be written, or where a token shard is damaged.
    """
    if (config.validation is None) != (validation is None):
        raise ValueError("validation batches are given exactly where the config asks for validation")
    tasks = None if config.validation is None else config.validation.tasks
    if len(probes) != (0 if tasks is None else len(tasks.names)):
        raise ValueError("there is a probe for each task that the config asks")
    if (batches.batch_size, batches.sequence_length) != (config.batch_size, config.sequence_length):
        raise ValueError("the batches have another batch size or sequence length than the config")
    with StopSignals() as signals:
        if engine.process:
            report, metrics = _untold, None
        loop = _Loop(engine, model, batches, validation, config, checkpoints, report, metrics, decode, probes)
        loop.asked_to_stop = lambda: signals.received is not None or should_stop()
        loop.begin(start, continue_on)
        return loop.run()


def _untold(event: Event) -> None:
    """Process 0 has reported it."""


class _Loop:
    def __init__(
        self,
        engine: TrainingEngine,
        model: ModelConfig,
        batches: Batches,
        validation: Batches | None,
        config: TrainingConfig,
        checkpoints: Checkpoints,
        report: Callable[[Event], None],
        metrics: Metrics | None,
        decode: Callable[[Sequence[int]], str] | None,
        probes: Sequence[Probe],
    ) -> None:
        self.engine = engine
        self.model = model
        self.config = config
        self.batches = batches
        self.checkpoints = checkpoints
        self.report = report
        self.metrics = metrics
        self.asked_to_stop: Callable[[], bool] = lambda: False
        self.validator: Validator | None = None
        if validation is not None and config.validation is not None:
            rows = config.micro_batch_size or config.batch_size
            self.validator = Validator(engine, validation, config.validation, rows, decode, probes)
        self.fingerprint = fingerprint(model, config, batches, validation)
        self.shapes = canonical_shapes(model)
        self.step_tokens = config.batch_size * config.sequence_length
        self.prefers = config.packing == "pairs"
        self.token_flops = training_flops_per_token(model, config.sequence_length, reference=self.prefers)
        self.peak = peak_flops_per_second(engine.device)
        self.frozen: Mapping[str, Array] = {}
        self.state = RunState()
        self.validates_start = False
        self.resumed_from: int | None = None
        self.pending: list[_Pending] = []
        self.loss: float | None = None
        self.saved: tuple[int, bool] | None = None

    def begin(self, start: Start, continue_on: bool) -> None:
        """Takes over the newest checkpoint, or the start."""
        name = self.engine.name
        self.validates_start = start.validated
        found = self._found(name, continue_on)
        self.frozen = start.weights if start.adapters is not None else {}
        if found is None:
            self._restore({**start.weights, **(start.adapters or {})}, start.optimizer)
        else:
            self._restore({**self.frozen, **found.weights}, found.optimizer)
            self.state = RunState.model_validate(found.state)
            self.saved = (self.state.step, self.state.validated)
            others = named([engine for engine in found.engines if engine != name])
            made = f", made by {others}; engine '{name}' goes on" if others else ""
            self.report(Note(f"going on from the checkpoint of step {found.step}{made}"))
            self.resumed_from = found.step
        engines = (*(found.engines if found else ()), name)
        self.state = self.state.model_copy(update={"engines": tuple(dict.fromkeys(engines))})
        if self.prefers:
            reference = {name: start.weights[name] for name in canonical_shapes(self.model)}
            self.engine.restore("reference", whole_pieces(reference))
        if self.metrics is not None:
            self.metrics.resume(self.state.step, self.state.validated)
        self.clock = Clock(self.state.step, self.state.seconds)

    def _found(self, name: str, continue_on: bool) -> Checkpoint | None:
        """The newest intact checkpoint as process 0 finds it, which every process then reads."""
        found = None if self.engine.process else self.checkpoints.load(name, self.fingerprint, continue_on)
        step = self.engine.agreed(-1 if found is None else found.step)
        if step < 0:
            return None
        # Engines may have left one each; nothing is written before all have read.
        makers = self.checkpoints.makers(step)
        which = self.engine.agreed(0 if found is None else makers.index(found.maker))
        return found or self.checkpoints.read(step, makers[which])

    def _restore(self, weights: Mapping[str, Array], optimizer: Mapping[str, Array] | None) -> None:
        self.engine.restore("weights", whole_pieces(weights))
        if optimizer is not None:
            self.engine.restore("optimizer", whole_pieces(optimizer))

    def run(self) -> TrainingResult:
        first, micro = self.state.step, self.config.micro_batch_size
        try:
            with Prefetcher(self.batches, first, self.config.steps, micro) as prefetcher:
                # The start's validation, or one in the middle of which the run was stopped.
                self._validate_if_due()
                self._heed(_GO_ON)
                while not self._finished():
                    self._step(prefetcher)
                    self._validate_if_due()
                    self._heed(self._save_word())
            self._read_pending()
        finally:
            self.checkpoints.close()
            if self.metrics is not None:
                self.metrics.close()
        return self._result()

    def _finished(self) -> bool:
        return self.state.step == self.config.steps or self.state.stops_early(self.config.early_stopping)

    def _step(self, prefetcher: Prefetcher) -> None:
        step = self.state.step
        scale = learning_rate_scale(self.config.schedule, step, self.config.steps)
        result = self.engine.step(prefetcher.next(), scale, dropout_key(self.config.seed, step))
        self.pending.append(_Pending(step, scale, result))
        self.state = self.state.model_copy(update={"step": step + 1})
        if (step + 1) % LOG_STEPS == 0 or self.clock.since_reading() >= LOG_SECONDS:
            self._read_pending()

    def _read_pending(self) -> None:
        """Reads what the steps since the last reading found, counts the skipped ones, and logs."""
        if not self.pending:
            return
        losses, figures = [], []
        skipped, in_row = self.state.skipped, self.state.skipped_in_row
        for pending in self.pending:
            bad = bool(pending.result.skipped)
            skipped, in_row = skipped + bad, in_row + 1 if bad else 0
            if not bad:
                losses.append(float(pending.result.loss))
                figures += [] if pending.result.figures is None else [pending.result.figures.tolist()]
            if in_row >= self.config.skipped_steps_limit:
                self._fail(pending.step + 1, in_row)
        self.state = self.state.model_copy(update={"skipped": skipped, "skipped_in_row": in_row})
        last = self.pending[-1]
        self.pending = []
        self.loss = sum(losses) / len(losses) if losses else math.nan
        speed = self.step_tokens / self.clock.step_seconds(self.state.step)
        flops = speed * self.token_flops
        progress = Progress(
            step=self.state.step,
            steps=self.config.steps,
            loss=self.loss,
            gradient_norm=float(last.result.gradient_norm),
            learning_rate_scale=last.scale,
            tokens_per_second=speed,
            flops_per_second=flops,
            mfu=flops / self.peak if self.peak else None,
            eta_seconds=self.clock.eta(self.state.step, self.config.steps),
            elapsed_seconds=self.clock.elapsed(),
            skipped=skipped,
            preferences=PreferenceFigures.of(np.mean(figures, axis=0).tolist()) if figures else None,
        )
        if self.metrics is not None:
            self.metrics.training(progress)
        if self.clock.report_is_due(REPORT_SECONDS) or self.state.step == self.config.steps:
            self.report(progress)

    def _fail(self, step: int, in_row: int) -> None:
        raise UserError(
            f"{in_row} steps in a row, up to step {step}, had a loss or gradient that is not finite; training stops "
            f"and its checkpoints stay: lower the learning rate or lengthen the warm-up, or look at the data"
        )

    def _validate_if_due(self) -> None:
        config = self.config.validation
        step = self.state.step
        if self.validator is None or config is None or self.state.validated:
            return
        if step == 0 and not self.validates_start:
            return
        if step % config.every and step != self.config.steps:
            return
        self._read_pending()
        asks = config.tasks is not None and config.tasks.asks(step, self.config.steps)
        with self.clock.paused():
            measured = self.validator.measure(self._stopping, asks)
        if measured is None:
            self._interrupt()
            return
        record = ValidationRecord(
            step=step,
            loss=measured.loss,
            exact_match=measured.exact_match,
            by_source=measured.by_source,
            preferences=measured.preferences,
            tasks=measured.tasks,
        )
        self.state = self.state.model_copy(update={"validations": (*self.state.validations, record)})
        by_source = self.validator.by_name(measured.by_source)
        event = Validation(
            step=step,
            loss=measured.loss,
            exact_match=measured.exact_match,
            samples=measured.samples,
            by_source=by_source,
            preferences=measured.preferences,
            tasks=measured.tasks,
        )
        if self.metrics is not None:
            self.metrics.validation(event)
        self.report(event)
        if self.state.is_among_best(self.checkpoints.config.keep_best):
            self._save()

    def _save_word(self) -> int:
        """This process's word on whether a checkpoint is to be written now."""
        self.checkpoints.check()
        every = self.checkpoints.config.every_seconds
        due = every == 0 or (self.clock.since_saving() >= every and not self.checkpoints.busy)
        return _SAVE if due and not self.engine.process else _GO_ON

    def _heed(self, word: int) -> None:
        """Does what the processes agree on: stops or saves where one of them wants it."""
        stops = not self._finished() and self.asked_to_stop()
        word = self.engine.agreed(_STOP if stops else word)
        if word == _STOP:
            self._interrupt()
        elif word == _SAVE:
            self._save()
            if self.checkpoints.config.every_seconds == 0:
                self.checkpoints.wait()

    def _stopping(self) -> bool:
        """Whether any process was asked to stop; collective."""
        return self.engine.agreed(_STOP if self.asked_to_stop() else _GO_ON) == _STOP

    def _save(self) -> None:
        if self.saved == (self.state.step, self.state.validated):
            return
        self._read_pending()
        self.checkpoints.wait()  # before the arrays are copied, not after: there is one copy at a time
        if self.metrics is not None:
            self.metrics.flush()
        with self.clock.paused():
            state = self.state.model_copy(update={"seconds": self.clock.elapsed()})
            checkpoint = Checkpoint(
                step=state.step,
                engines=state.engines,
                fingerprint=self.fingerprint,
                weights=assemble(self._moving(), self.shapes),
                optimizer=assemble(self.engine.export("optimizer"), self.shapes),
                state=state.to_json(),
                score=state.score,
            )
            if not self.engine.process:
                self.checkpoints.save(checkpoint)
        self.saved = (self.state.step, self.state.validated)
        self.clock.saved()

    def _moving(self) -> Iterator[Piece]:
        """The weights but for those that stay as they were at the start, which is there again when a run goes on."""
        return (piece for piece in self.engine.export("weights") if piece.name not in self.frozen)

    def _interrupt(self) -> None:
        self._save()
        self.checkpoints.wait()
        raise Interrupted(self.state.step)

    def _result(self) -> TrainingResult:
        state = self.state.model_copy(update={"seconds": self.clock.elapsed()})
        tokens = state.step * self.step_tokens
        return TrainingResult(
            state=state,
            stopped_early=state.step < self.config.steps,
            loss=self.loss,
            tokens=tokens,
            flops=tokens * self.token_flops,
            resumed_from=self.resumed_from,
            other_engines=tuple(engine for engine in state.engines if engine != self.engine.name),
        )
