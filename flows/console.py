"""What a person sees of a run: a line per stage, a progress bar while one trains, and the result at the end."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, NamedTuple, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from artifacts.record import Record
from flows.plan import Step
from flows.view import LogView
from tasks.events import Event, Listener, event_line, part_done
from tasks.exact_match import SHOWN_GROUPS, shown_groups, shown_lengths


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


def evaluation_tables(record: Record) -> Group:
    """What an evaluation found, and samples of what the model writes."""
    return _perplexity(record.metrics) if record.stage == "perplexity" else _exact_match(record.metrics)


def _perplexity(metrics: dict[str, Any]) -> Group:
    title = Text(f"Perplexity on the {metrics['split']} split of {', '.join(metrics['data']) or 'the documents'}")
    scores = Table(title=title, title_justify="left", header_style="dim")
    for column in ("per token", "per word", "bits per byte", "loss", "tokens", "words", "window / stride"):
        scores.add_column(column, justify="right", overflow="fold")
    token, word = metrics["token_perplexity"], metrics["word_perplexity"]
    found = {score["metric"]: score["standard_error"] for score in metrics["scores"]}
    errors = {metric: "" if error is None else f" ± {error:.4f}" for metric, error in found.items()}
    scores.add_row(
        "∞" if token is None else f"[bold]{token:,.2f}[/]",
        "∞" if word is None else f"[bold]{word:,.1f}[/]",
        f"{metrics['bits_per_byte']:.4f}{errors['bits_per_byte']}",
        f"{metrics['loss']:.4f}{errors['loss']}",
        f"{metrics['tokens']:,}",
        f"{metrics['words']:,}",
        f"{metrics['window']:,} / {metrics['stride']:,}",
    )
    if not metrics["samples"]:
        return Group(scores)
    samples = Table(title="What it writes", title_justify="left", header_style="dim", show_lines=True)
    samples.add_column("prompt", overflow="fold", ratio=1)
    samples.add_column("continuation", overflow="fold", ratio=3)
    for sample in metrics["samples"]:
        samples.add_row(Text(sample["prompt"]), Text(sample["continuation"].strip()))
    return Group(scores, samples)


def _exact_match(metrics: dict[str, Any]) -> Group:
    scores = _shares(f"Exact match on the {metrics['split']} split", "answer length")
    for group in shown_lengths(metrics["by_answer_length"]):
        scores.add_row(str(group["length"]), *_share(group))
    scores.add_section()
    scores.add_row("all", *_share(metrics), style="bold")
    # A single group is the whole once more.
    by = [_grouped(name, groups) for name, groups in metrics["groups"].items() if len(groups) > 1]
    # A question and its answer take several lines.
    lines = "template" in metrics
    samples = Table(title="Sample predictions", title_justify="left", header_style="dim", show_lines=lines)
    for column in ("prompt", "prediction", "target"):
        samples.add_column(column, overflow="fold")
    samples.add_column("", no_wrap=True)
    for sample in metrics["samples"]:
        mark = "[green]✓[/]" if sample["correct"] else "[red]✗[/]"
        samples.add_row(Text(sample["prompt"]), Text(sample["prediction"]), Text(sample["target"]), mark)
    parts: list[RenderableType] = [scores, *by]
    # Scores that were made earlier do not say it.
    if metrics.get("cut_off"):
        parts.append(
            f"{metrics['cut_off']:,} answers had not ended at {metrics['max_new_tokens']:,} tokens or the model's last "
            "position, and count as wrong"
        )
    if "too_long" in metrics:
        parts.append(f"{metrics['too_long']:,} prompts are longer than the model's positions, and count as wrong")
    if "marks" in metrics:
        parts.append(_marks(metrics["marks"]))
    return Group(*parts, samples)


def _grouped(name: str, groups: Sequence[Mapping[str, Any]]) -> Table:
    shown = shown_groups(groups)
    worst = f": the {SHOWN_GROUPS} worst of {len(groups):,}" if len(shown) < len(groups) else ""
    table = _shares(f"Exact match by {name}{worst}", name, "left")
    for group in shown:
        table.add_row(Text(group["group"]), *_share(group))
    return table


def _shares(title: str, of: str, justify: JustifyMethod = "right") -> Table:
    table = Table(title=title, title_justify="left", header_style="dim")
    table.add_column(of, justify=justify, overflow="fold")
    for column in ("problems", "exact match", "95% interval"):
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _share(measured: Mapping[str, Any]) -> tuple[str, str, str]:
    """How many problems, the share of them that is right, and the interval in which it lies."""
    low, high = measured["interval"]
    return f"{measured['n']:,}", _with_error(measured), f"{low:.2%} to {high:.2%}"


def _with_error(measured: Mapping[str, Any]) -> str:
    error = measured["standard_error"]
    return f"{measured['exact_match']:.2%}" + ("" if error is None else f" ± {error:.2%}")


def _marks(marks: dict[str, Any]) -> Table:
    table = Table(title="Answers with calculator marks", title_justify="left", header_style="dim")
    for column in ("answers", "marks well-formed", "all of them right", "final number right"):
        table.add_column(column, justify="right")
    shares = (f"{marks[name]:.2%}" for name in ("well_formed", "right", "final_number"))
    table.add_row(f"{marks['n']:,}", *shares)
    return table


class Scored(NamedTuple):
    """An evaluation in a run."""

    model: str
    """The stage that made the model."""
    documents: str
    """The stage that made the documents."""
    record: Record

    @property
    def what(self) -> tuple[str, str]:
        """What was measured, and on what: scores of which these are the same may be compared."""
        return (self.documents, str(self.record.metrics.get("split")) + self.record.stage)


def last_of_each(evaluations: Sequence[Scored]) -> list[Scored]:
    """The last evaluation on each of the documents."""
    last = {one.what: one for one in evaluations}
    return [one for one in evaluations if last[one.what] is one]


def exact_match_table(evaluations: Sequence[Scored]) -> Table | None:
    """Exact match on the same documents, model by model; None where no documents were put to several models."""
    scored: dict[tuple[str, str], list[Scored]] = {}
    for one in evaluations:
        if "exact_match" in one.record.metrics:
            scored.setdefault(one.what, []).append(one)
    several = [group for group in scored.values() if len(group) > 1]
    if not several:
        return None
    title = "Exact match, model by model"
    table = Table(title=title, title_justify="left", header_style="dim", box=SIMPLE_HEAD)
    for column in ("documents", "model"):
        table.add_column(column, overflow="fold")
    for column in ("problems", "exact match"):
        table.add_column(column, justify="right", no_wrap=True)
    for group in several:
        for number, one in enumerate(group):
            metrics = one.record.metrics
            last = number == len(group) - 1
            table.add_row(
                "" if number else Text(one.documents),
                Text(one.model),
                f"{metrics['n']:,}",
                _with_error(metrics),
                style="bold" if last else None,
                end_section=last,
            )
    return table


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
