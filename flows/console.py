"""What a person sees of a run: a line per stage, a progress bar while one trains, and the result at the end."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from artifacts.record import Record
from flows.plan import Step
from tasks.events import Event, Listener

LOG_SECONDS = 10.0


class View(Protocol):
    """Takes what happens in a run."""

    def listener(self, stage: str) -> Listener:
        """Takes a stage's progress events; called from any thread."""
        ...

    def finished(self, stage: str, record: Record, reused: bool, seconds: float) -> None:
        """A stage is done."""
        ...

    def note(self, message: str) -> None:
        """A line to show."""
        ...


class ConsoleView(AbstractContextManager["ConsoleView"]):
    """Shows a run on a terminal with a live bar, or as plain lines every few seconds elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("  {task.fields[stage]:<12}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}"),
            console=console,
            transient=True,
        )
        self._bars: dict[str, TaskID] = {}
        self._said: dict[str, float] = {}

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def listener(self, stage: str) -> Listener:
        """Takes a stage's progress events; called from any thread."""

        def listen(event: Event) -> None:
            _HANDLERS.get(event["event"], _ignore)(self, stage, event)

        return listen

    def finished(self, stage: str, record: Record, reused: bool, seconds: float) -> None:
        """A stage is done: one line says what it did, or that it was reused."""
        if stage in self._bars:
            self._progress.remove_task(self._bars.pop(stage))
        mark, took = ("[dim]=[/]", "reused") if reused else ("[green]✓[/]", f"{seconds:.1f} s")
        self.console.print(f"{mark} {stage:<12} [dim]{took:>8}[/]  {escape(summary(record))}", highlight=False)

    def note(self, message: str) -> None:
        """A line to show."""
        self.console.print(f"[yellow]![/] {escape(message)}", highlight=False)

    def _train(self, stage: str, event: Event) -> None:
        detail = progress_line(event)
        if not self.console.is_terminal:
            if time.monotonic() - self._said.get(stage, 0.0) >= LOG_SECONDS:
                self._said[stage] = time.monotonic()
                self.console.print(f"  {stage:<12} {detail}", highlight=False, soft_wrap=True)
            return
        if stage not in self._bars:
            self._bars[stage] = self._progress.add_task("", stage=stage, detail=detail, total=event["steps"])
        self._progress.update(self._bars[stage], completed=event["step"], detail=detail)

    def _validate(self, stage: str, event: Event) -> None:
        exact = "" if event["exact_match"] is None else f", exact match {event['exact_match']:.2%}"
        self.console.print(
            f"  [dim]{stage:<12} step {event['step']:,}: validation loss {event['loss']:.4f}{exact}[/]", highlight=False
        )

    def _log(self, stage: str, event: Event) -> None:
        self.note(f"{stage}: {event['message']}")

    def _say(self, stage: str, event: Event) -> None:
        self.note(f"{stage}: {event['text']}")


def _ignore(view: ConsoleView, stage: str, event: Event) -> None:
    """Events that nobody has to see."""


_HANDLERS: dict[str, Callable[[ConsoleView, str, Event], None]] = {
    "Progress": ConsoleView._train,
    "Validation": ConsoleView._validate,
    "Log": ConsoleView._log,
    "Note": ConsoleView._say,
}


def progress_line(event: Event) -> str:
    """One line about a training step: step, loss, tokens/s, utilisation or FLOP/s, time to go."""
    loss = "—" if event["loss"] is None else f"{event['loss']:.4f}"
    speed = f"MFU {event['mfu']:.1%}" if event["mfu"] is not None else f"{_short(event['flops_per_second'])}FLOP/s"
    minutes, seconds = divmod(int(event["eta_seconds"]), 60)
    return (
        f"step {event['step']:,}/{event['steps']:,}  loss {loss}  {_short(event['tokens_per_second'])}tokens/s  "
        f"{speed}  ETA {minutes}:{seconds:02d}"
    )


def _short(number: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number:.0f} "


def summary(record: Record) -> str:
    """What a stage made, in a few words."""
    metrics: dict[str, Any] = record.metrics
    parts = []
    if record.stage == "documents":
        parts.append(", ".join(f"{count:,} {split}" for split, count in metrics["rows"].items()) + " documents")
    elif record.stage == "tokenizer":
        parts.append(f"{metrics['vocab_size']:,} tokens in the vocabulary")
    elif record.stage == "tokens":
        parts.append(f"{sum(split['tokens'] for split in metrics['splits'].values()):,} tokens")
    elif record.stage in ("pretrain", "refine"):
        parts.append(f"{metrics['parameters']:,} parameters, {metrics['steps']:,} steps")
        if metrics.get("validation"):
            last = metrics["validation"][-1]
            parts.append(f"validation loss {last['loss']:.4f}")
            if last.get("exact_match") is not None:
                parts.append(f"exact match {last['exact_match']:.2%}")
        if metrics.get("skipped_steps"):
            parts.append(f"{metrics['skipped_steps']} non-finite steps skipped")
    elif record.stage == "stack":
        parameters = metrics["parameters"]
        parts.append(f"{len(metrics['source_layers'])} layers, {parameters['before']:,} → {parameters['after']:,}")
    elif record.stage == "evaluate":
        parts.append(f"exact match {metrics['exact_match']:.2%} of {metrics['n']:,}")
    elif record.stage == "publish":
        parts.append(f"{metrics['parameters']:,} parameters")
    return "; ".join(parts) or record.output[:12]


def plan_table(steps: list[Step]) -> Table:
    """The plan of a run."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("stage", "kind", "", "why"):
        table.add_column(column, overflow="fold")
    colours = {"reused": "green", "to run": "yellow", "waits": "dim"}
    for step in steps:
        table.add_row(
            step.entry.name,
            step.entry.stage,
            Text(step.verdict, style=colours[step.verdict]),
            Text(step.reason),
        )
    return table


def evaluation_tables(record: Record) -> Group:
    """Exact match, its breakdown by answer length, and sample predictions."""
    metrics: dict[str, Any] = record.metrics
    scores = Table(title=f"Exact match on the {metrics['split']} split", title_justify="left", header_style="dim")
    for column in ("answer length", "problems", "exact match"):
        scores.add_column(column, justify="right")
    for group in metrics["by_answer_length"]:
        scores.add_row(str(group["length"]), f"{group['n']:,}", f"{group['exact_match']:.2%}")
    scores.add_section()
    error = metrics["standard_error"]
    scores.add_row("all", f"{metrics['n']:,}", f"[bold]{metrics['exact_match']:.2%}[/] ± {error:.2%}")
    samples = Table(title="Sample predictions", title_justify="left", header_style="dim")
    for column in ("prompt", "prediction", "target", ""):
        samples.add_column(column)
    for sample in metrics["samples"]:
        mark = "[green]✓[/]" if sample["correct"] else "[red]✗[/]"
        samples.add_row(Text(sample["prompt"]), Text(sample["prediction"]), Text(sample["target"]), mark)
    return Group(scores, samples)


def record_table(record: Record) -> Table:
    """Everything that a record says."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in record.model_dump(mode="json").items():
        if name == "files":
            value = {file: f"{entry['size']:,} bytes, sha256 {entry['sha256'][:12]}…" for file, entry in value.items()}
        for key, inner in _rows(name, value):
            table.add_row(key, Text(inner))
    return table


def _rows(name: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [row for key, inner in value.items() for row in _rows(f"{name}.{key}", inner)]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [row for index, inner in enumerate(value) for row in _rows(f"{name}.{index}", inner)]
    return [(name, str(value))]
