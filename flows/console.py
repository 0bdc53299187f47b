"""What a person sees of a run: a line per stage, a progress bar while one trains, and the result at the end."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from types import TracebackType
from typing import Any, NamedTuple, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from artifacts.record import Record
from flows.plan import Step
from flows.view import LogView
from tasks.asking.questions import KINDS as CATEGORY_KINDS
from tasks.evaluate import shown_groups
from tasks.events import Event, Listener, event_line


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
            if event["event"] == "Progress":
                if stage not in self._bars:
                    self._bars[stage] = self._progress.add_task("", stage=stage, detail="", total=event["steps"])
                self._progress.update(self._bars[stage], completed=event["step"], detail=line)
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
    tables = {"perplexity": _perplexity, "behaviour": _behaviour}
    return tables.get(record.stage, _exact_match)(record.metrics)


def _perplexity(metrics: dict[str, Any]) -> Group:
    scores = Table(title=f"Perplexity on the {metrics['split']} split", title_justify="left", header_style="dim")
    for column in ("per token", "per word", "bits per byte", "loss", "tokens", "words", "window / stride"):
        scores.add_column(column, justify="right")
    token, word = metrics["token_perplexity"], metrics["word_perplexity"]
    scores.add_row(
        "∞" if token is None else f"[bold]{token:,.2f}[/]",
        "∞" if word is None else f"[bold]{word:,.1f}[/]",
        f"{metrics['bits_per_byte']:.4f}",
        f"{metrics['loss']:.4f}",
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
    scores = Table(title=f"Exact match on the {metrics['split']} split", title_justify="left", header_style="dim")
    for column in ("answer length", "problems", "exact match"):
        scores.add_column(column, justify="right")
    for group in shown_groups(metrics["by_answer_length"]):
        scores.add_row(str(group["length"]), f"{group['n']:,}", f"{group['exact_match']:.2%}")
    scores.add_section()
    scores.add_row("all", f"{metrics['n']:,}", f"[bold]{metrics['exact_match']:.2%}[/] ± {_error(metrics)}")
    # A question and its answer take several lines.
    lines = "template" in metrics
    samples = Table(title="Sample predictions", title_justify="left", header_style="dim", show_lines=lines)
    for column in ("prompt", "prediction", "target"):
        samples.add_column(column, overflow="fold")
    samples.add_column("", no_wrap=True)
    for sample in metrics["samples"]:
        texts = (Text(sample[name]) for name in ("prompt", "prediction", "target"))
        samples.add_row(*texts, _mark(sample))
    parts: list[RenderableType] = [scores]
    # Scores that were made earlier do not say it.
    if metrics.get("cut_off"):
        parts.append(f"{_cut_off(metrics)}, and count as wrong")
    if "too_long" in metrics:
        parts.append(_too_long(metrics))
    if "marks" in metrics:
        parts.append(_marks(metrics["marks"]))
    return Group(*parts, samples)


def _cut_off(metrics: Mapping[str, Any]) -> str:
    limit = f"{metrics['max_new_tokens']:,} tokens or the model's last position"
    return f"{metrics['cut_off']:,} answers had not ended at {limit}"


def _too_long(metrics: Mapping[str, Any]) -> str:
    return f"{metrics['too_long']:,} prompts are longer than the model's positions, and count as wrong"


def _behaviour(metrics: dict[str, Any]) -> Group:
    scores = Table(title="Questions answered rightly", title_justify="left", header_style="dim")
    for column in ("kind", "category"):
        scores.add_column(column, overflow="fold")
    for column in ("questions", "right", "95% interval"):
        scores.add_column(column, justify="right", no_wrap=True)
    groups = sorted(metrics["categories"], key=lambda group: CATEGORY_KINDS.index(group["kind"]))
    for kind, of_kind in groupby(groups, key=lambda group: str(group["kind"])):
        for number, group in enumerate(of_kind):
            scores.add_row("" if number else kind, Text(group["category"]), *_right(group))
        scores.add_section()
    questions, right, interval = _right(metrics)
    scores.add_row("all", "", questions, f"[bold]{right}[/]", interval)
    samples = Table(title="Sample answers", title_justify="left", header_style="dim", show_lines=True)
    for column in ("category", "question", "answer", "asked for"):
        samples.add_column(column, overflow="fold")
    samples.add_column("", no_wrap=True)
    for sample in metrics["samples"]:
        texts = (Text(sample[name]) for name in ("category", "prompt", "prediction", "target"))
        samples.add_row(*texts, _mark(sample))
    notes = [said(metrics) for name, said in (("cut_off", _cut_off), ("too_long", _too_long)) if metrics[name]]
    return Group(scores, *notes, *([samples] if metrics["samples"] else []))


def _right(counted: Mapping[str, Any]) -> tuple[str, str, str]:
    low, high = counted["interval"]
    return f"{counted['n']:,}", f"{counted['correct'] / counted['n']:.1%}", f"{low:.1%} – {high:.1%}"


def _mark(sample: Mapping[str, Any]) -> str:
    return "[green]✓[/]" if sample["correct"] else "[red]✗[/]"


def _error(metrics: Mapping[str, Any]) -> str:
    return f"{metrics['standard_error']:.2%}"


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
    """The stage that made the documents; empty for the behaviour suite, which has none."""
    record: Record

    @property
    def what(self) -> tuple[str, str]:
        """What was measured, and on what: scores of which these are the same may be compared."""
        metrics = self.record.metrics
        return (self.documents, f"{metrics.get('split')} {metrics.get('suite')} {self.record.stage}")


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
                f"{metrics['exact_match']:.2%} ± {_error(metrics)}",
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
