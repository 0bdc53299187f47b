"""The logs of a run in one folder: CSV, TensorBoard, the loss curve, and Weights & Biases where it is set up.

They are for people: nothing reads them back to decide anything. What they say of steps after the one that a run goes
on from is dropped, so that no step stands twice.
"""

import csv
import importlib.util
import io
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TextIO

from common.files import write_atomically
from models.preference import PreferenceFigures
from models.training.events import Progress, Validation
from models.training.loss_curve import CHANCE, EVALUATION, draw_loss_curve

log = logging.getLogger("cairn.training")
_TRAINING = (
    "step",
    "loss",
    "gradient_norm",
    "learning_rate_scale",
    "tokens_per_second",
    "flops_per_second",
    "elapsed_seconds",
    "skipped",
)
_VALIDATION = ("step", "loss", "exact_match")
_PREFERENCES = tuple(field.name for field in fields(PreferenceFigures))
_LOSS_OF = "loss/"
_DRAW_SECONDS = 60.0
_FLUSH_SECONDS = 1.0


class Metrics:
    """Writes `training.csv`, `validation.csv`, `samples.jsonl`, `tensorboard/` and `loss.png` below a folder."""

    def __init__(
        self,
        folder: Path,
        title: str = "",
        config: Mapping[str, Any] | None = None,
        validated: Sequence[str] = (),
        prefers: bool = False,
        tasks: Sequence[str] = (),
    ) -> None:
        """`title` stands above the loss curve and names the run in Weights & Biases, which is given `config`;
        `validated`: the names of the sources that have a validation loss of their own; `prefers`: whether the run is
        preference tuning, whose figures have columns; `tasks`: those that are asked, whose scores have them too."""
        self._folder = folder
        self._title = title
        self._config = dict(config or {})
        more = _PREFERENCES if prefers else ()
        self._training = _CsvFile(folder / "training.csv", (*_TRAINING, *more))
        by_source = (_LOSS_OF + name for name in validated)
        scores = (prefix + name for prefix in (EVALUATION, CHANCE) for name in tasks)
        self._validation = _CsvFile(folder / "validation.csv", (*_VALIDATION, *more, *by_source, *scores))
        self._samples = _LinesFile(folder / "samples.jsonl", lambda line: int(json.loads(line)["step"]))
        self._tensorboard: _TensorBoard | None = None
        self._wandb: Any = None
        self._drawn_at = self._flushed_at = time.monotonic()

    def resume(self, step: int, validated: bool) -> None:
        """Opens the logs of a run of which `step` steps are done, and drops what they say of later ones, and of a
        validation at `step` where it is still to come.

        Raises OSError where the folder cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._training.resume(step)
        for file in (self._validation, self._samples):
            file.resume(step if validated else step - 1)
        self._tensorboard = _TensorBoard(self._folder / "tensorboard", step)
        self._wandb = _wandb_run(self._folder, self._title, self._config)

    def training(self, progress: Progress) -> None:
        """One row of what the last steps found."""
        values = {name: getattr(progress, name) for name in _TRAINING} | _preferences(progress)
        self._training.append(values)
        self._publish("training", values)
        if time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self.flush()

    def validation(self, event: Validation) -> None:
        """One row of a validation, its samples, and the loss curve from time to time."""
        values = {name: getattr(event, name) for name in _VALIDATION}
        values |= _preferences(event) | {_LOSS_OF + name: loss for name, loss in event.by_source.items()}
        scores = {score.task: score.value for score in event.tasks}
        levels = {CHANCE + score.task: score.chance for score in event.tasks}
        self._validation.append({**values, **{EVALUATION + task: value for task, value in scores.items()}, **levels})
        for sample in event.samples:
            self._samples.append_line(json.dumps({"step": event.step, **vars(sample)}, ensure_ascii=False))
        self._publish("validation", values)
        if scores:
            self._publish("evaluation", {"step": event.step, **scores})
        if time.monotonic() - self._drawn_at > _DRAW_SECONDS:
            self._draw()

    def flush(self) -> None:
        """Hands everything over to the system, so that a kill loses none of it; before a checkpoint, for example."""
        for file in (self._training, self._validation, self._samples):
            file.flush()
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Draws the loss curve and closes every file."""
        for file in (self._training, self._validation, self._samples):
            file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
            self._draw()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def _publish(self, group: str, values: Mapping[str, Any]) -> None:
        named = {f"{group}/{name}": value for name, value in values.items() if name != "step" and value is not None}
        if self._tensorboard is not None:
            self._tensorboard.add(named, values["step"])
        if self._wandb is not None:
            self._wandb.log({"step": values["step"], **named})

    def _draw(self) -> None:
        self._drawn_at = time.monotonic()
        try:
            self.flush()
            curve = draw_loss_curve(read_csv(self._training.path), read_csv(self._validation.path), self._title)
            write_atomically(self._folder / "loss.png", curve)
        except FileNotFoundError as error:
            log.warning("the loss curve is not drawn, its numbers are gone: %s", error)


def _preferences(event: Progress | Validation) -> dict[str, float]:
    return {} if event.preferences is None else asdict(event.preferences)


class _LinesFile:
    """A text file of one line per entry, of which each belongs to a step."""

    def __init__(self, path: Path, step_of: Callable[[str], int], header: str | None = None) -> None:
        self.path = path
        self._step_of = step_of
        self._header = header
        self._file: TextIO | None = None

    def resume(self, step: int) -> None:
        kept = [] if self._header is None else [self._header]
        if self.path.exists():
            kept += [line for line in self.path.read_text("utf-8").splitlines() if self._is_kept(line, step)]
        write_atomically(self.path, "".join(f"{line}\n" for line in kept).encode())
        self._file = self.path.open("a", encoding="utf-8")

    def _is_kept(self, line: str, step: int) -> bool:
        try:
            return self._step_of(line) <= step
        except (ValueError, KeyError, TypeError):  # the header, or a line that a kill cut off
            return False

    def append_line(self, line: str) -> None:
        if self._file is not None:
            self._file.write(line + "\n")

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class _CsvFile(_LinesFile):
    """A CSV file with a header, whose first column is the step."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        def step_of(line: str) -> int:
            values = line.split(",")
            if len(values) != len(columns):
                raise ValueError(line)
            return int(values[0])

        super().__init__(path, step_of, ",".join(columns))
        self._columns = columns

    def append(self, values: Mapping[str, Any]) -> None:
        self.append_line(",".join("" if values.get(name) is None else str(values[name]) for name in self._columns))


def read_csv(path: Path) -> dict[str, list[float]]:
    """The columns of a log; NaN where a field is empty."""
    with io.StringIO(path.read_text("utf-8")) as text:
        rows = list(csv.DictReader(text))
        names = rows[0].keys() if rows else ()
    return {name: [float(row[name]) if row[name] else math.nan for row in rows] for name in names}


class _TensorBoard:
    """Event files, written without any framework."""

    def __init__(self, folder: Path, step: int) -> None:
        # Imported here, because it takes a noticeable part of a second.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(folder))
        # TensorBoard forgets what earlier files say of this step and later ones when it reads a session's start.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=step + 1, session_log=start))

    def add(self, values: Mapping[str, float], step: int) -> None:
        scalars = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._writer.add_event(
            self._event(wall_time=time.time(), step=step, summary=self._summary(value=scalars)),
        )

    def close(self) -> None:
        self._writer.close()


def _wandb_run(folder: Path, title: str, config: Mapping[str, Any]) -> Any:
    """A run of Weights & Biases where it is installed and set up, else None; the same one when the training goes on."""
    wanted = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") == "offline"
    if not wanted or importlib.util.find_spec("wandb") is None:
        return None
    import wandb

    identity = folder / "wandb-id"
    if not identity.exists():
        write_atomically(identity, uuid.uuid4().hex.encode())
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "cairn"),
            id=identity.read_text(),
            resume="allow",
            dir=str(folder),
            name=title or None,
            config=dict(config),
            # Its lines would stand in the middle of the progress bar, and catching the output is not its to do.
            settings=wandb.Settings(silent=True, console="off"),
        )
        run.define_metric("*", step_metric="step")
    except Exception as error:  # whatever is wrong over there, training goes on
        log.warning("Weights & Biases is not used (%s)", error)
        return None
    return run
