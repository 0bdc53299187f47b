"""What a person sees of a run: a line per stage, a progress bar while one trains, and the result at the end."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from artifacts.record import Record
from flows.plan import Step
from flows.view import LogView
from tasks.events import Event, Listener, event_line, part_done


class ConsoleView(AbstractContextManager["ConsoleView"]):
    """Shows a run on a terminal with a live bar, or as plain lines every few seconds elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._log = LogView(self._line)
        self._progress = Progress(
            TextColumn("  {task.fields[stage]:<18}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}"),
            console=console,
            transient=True,
        )
        self._bars: dict[str, TaskID] = {}

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

        if not self.console.is_terminal:
            return LogView.listener(self._log, stage)

        def listen(event: Event) -> None:
            line = event_line(event)
            if line is None:
                return
            part = part_done(event)
            if part is not None:
                if stage not in self._bars:
                    self._bars[stage] = self._progress.add_task("", stage=stage, detail="", total=part[1])
                self._progress.update(self._bars[stage], completed=part[0], detail=line)
            else:
                self._line(stage, line)

        return listen

    def finished(self, stage: str, record: Record, reused: bool, seconds: float) -> None:
        """A stage is done: one line says what it did, or that it was reused."""
        if stage in self._bars:
            self._progress.remove_task(self._bars.pop(stage))
        mark, took = ("[dim]=[/]", "reused") if reused else ("[green]✓[/]", f"{seconds:.1f} s")
        line = f"{mark} {escape(stage):<18} [dim]{took:>7}[/]  {escape(record.summary)}"
        self.console.print(line, highlight=False, soft_wrap=True)

    def _line(self, stage: str, line: str) -> None:
        self.console.print(f"  [dim]{escape(stage):<18} {escape(line)}[/]", highlight=False, soft_wrap=True)


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


def blend_table(records: Mapping[str, Record]) -> Table | None:
    """What the stages of a run were trained on: of each source what was asked for and what came out; None where
    nothing was trained."""
    blends: dict[str, Any] = {stage: record.metrics.get("blend") for stage, record in records.items()}
    if not any(blends.values()):
        return None
    table = Table(title="What was trained on", title_justify="left", header_style="dim", box=SIMPLE_HEAD)
    table.add_column("stage", overflow="fold")
    table.add_column("source", overflow="fold")
    for column in ("asked", "drawn", "tokens", "epochs", "validation loss"):
        table.add_column(column, justify="right", no_wrap=True)
    notes: list[str] = []
    for stage, blend in blends.items():
        whole, by_source = _last_validation(records[stage])
        for number, row in enumerate(blend or []):
            source = str(row["source"])
            table.add_row(
                "" if number else Text(stage),
                Text(source),
                f"{row['share_asked']:.1%}",
                "—" if row["share"] is None else f"{row['share']:.1%}",
                f"{row['tokens']:,}",
                f"{row['epochs']:,.2f}",
                by_source.get(source, "" if len(blend) > 1 else whole),
            )
            if row["used_up_at_step"] is not None:
                notes.append(f"{stage}: the budget of {source} was used up at step {row['used_up_at_step']:,}")
            if row["cut_documents"]:
                lost = f"{row['cut_documents']:,} documents of {source} were cut, {row['dropped_tokens']:,} tokens lost"
                notes.append(f"{stage}: {lost}")
        if blend and len(blend) > 1:
            tokens = f"{sum(row['tokens'] for row in blend):,}"
            table.add_row("", "all", "", "", tokens, "", f"[bold]{whole}[/]")
    table.caption = Text("\n".join(notes))
    table.caption_justify = "left"
    return table


def _last_validation(record: Record) -> tuple[str, dict[str, str]]:
    """The validation loss at the end of training, and that of each source where there are several.

    One that is not finite is a string in the record, which JSON has no number for.
    """
    validations: Any = record.metrics.get("validation")
    if not validations:
        return "", {}
    by_source = {source: f"{float(loss):.4f}" for source, loss in validations[-1]["by_source"].items()}
    return f"{float(validations[-1]['loss']):.4f}", by_source


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
