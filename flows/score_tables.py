"""Scores as tables, and the samples behind them."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from artifacts.record import Record
from artifacts.store import Store
from common.errors import UserError, suggestion
from tasks.groups import TaskGroup, group_scores
from tasks.registry import STAGES
from tasks.reporting.significance import Difference
from tasks.reporting.wording import p_text
from tasks.scores import SAMPLES, Score, figure
from tasks.stage import Kind

MARK = "*"
"""Stands behind a score that is no better than chance."""
PROMPT_END = 600
"""Characters of a prompt that are shown, the last ones: examples stand before the question."""
_SHOWN = ("prompt", "target", "prediction", "correct", "choices", "log_probabilities")
_READ_ROWS, _READ_BYTES = 256, 1 << 20
"""Rows, and bytes of a column, that are read of samples at once."""


def score_table(records: Sequence[Record], groups: Sequence[TaskGroup] = ()) -> Table:
    """The scores of evaluations, a row each, beside what guessing gives, and below them those of groups of their
    tasks."""
    table = Table(header_style="dim", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", overflow="fold")
    table.add_column("metric", no_wrap=True)
    for column in ("score", "chance", "majority", "n", "shots"):
        table.add_column(column, justify="right", no_wrap=True)
    every: list[Score] = []
    shots: dict[str, str] = {}
    for record in records:
        metrics: dict[str, Any] = record.metrics
        scores = [Score.of(dumped) for dumped in metrics["scores"]]
        for number, score in enumerate(scores):
            shots[score.task] = str(metrics.get("num_fewshot", ""))
            table.add_row("" if number else Text(score.task), *_cells(score), shots[score.task])
        every += scores
    table.add_section()
    for group in groups:
        for number, found in enumerate(group_scores(group, every)):
            alike = {shots[task] for task in found.tasks}
            name = f"{group.name}: {len(found.tasks):,} tasks"
            shown = alike.pop() if len(alike) == 1 else ""
            table.add_row("" if number else Text(name), *_cells(found.score), shown, style="bold")
    table.caption = f"{MARK} no more than two standard errors better than chance"
    table.caption_justify = "left"
    return table


def _cells(score: Score) -> tuple[RenderableType, ...]:
    shown = Text(f"{score.text}{MARK if score.near_chance else ' '}")
    levels = (score.figure(score.chance), score.figure(score.majority))
    return Text(score.metric), shown, *levels, f"{score.n:,}"


def show_samples(store: Store, record: Record, task: str, wrong: bool, count: int, console: Console) -> None:
    """Prints the first samples of a task, of an evaluation or of one that a report is of. Raises UserError where there
    is none."""
    folder = store.fetch(evaluation_of(store, record, task), [SAMPLES])
    rows, found = sample_rows(folder / SAMPLES, wrong, count)
    kind = "wrong " if wrong else ""
    if rows:
        console.print(samples_table(rows))
    console.print(f"{len(rows):,} of {found:,} {kind}samples of {task}", highlight=False, markup=False)


def evaluation_of(store: Store, record: Record, task: str) -> Record:
    """The evaluation on a task that a record is, or that a report is of. Raises UserError where it is not there."""
    found: dict[str, Record] = {}
    for one in [record, *(made for ref in record.inputs.values() if (made := store.read_record(ref.key)) is not None)]:
        if one.stage in STAGES and STAGES[one.stage].output == Kind.EVALUATION:
            found.setdefault(str(one.metrics.get("task", one.stage)), one)
    if task not in found:
        raise UserError(f"'{record.name}' has no samples of '{task}'{suggestion(task, found)}")
    return found[task]


def sample_rows(path: Path, wrong: bool, count: int) -> tuple[list[dict[str, Any]], int]:
    """The first `count` samples of a file, or of those alone that were answered wrongly, with the columns that are
    shown; and how many there are in all. Nothing behind them is read, but for what was right."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []
    with pq.ParquetFile(path, buffer_size=_READ_BYTES) as file:
        shown = [name for name in _SHOWN if name in file.schema_arrow.names]
        for batch in file.iter_batches(_READ_ROWS, columns=shown):
            rows += [row for row in batch.to_pylist() if not wrong or row.get("correct") is False]
            if len(rows) >= count:
                break
        if not wrong:
            return rows[:count], file.metadata.num_rows
        if "correct" not in shown:
            return [], 0
        right = file.read(["correct"])["correct"]
        return rows[:count], pc.sum(pc.equal(right.cast(pa.bool_()), False)).as_py() or 0


def samples_table(rows: Iterable[dict[str, Any]]) -> Table:
    """What was asked, what was right and what the model gave, with what it thought of each choice."""
    table = Table(header_style="dim", show_lines=True)
    table.add_column("prompt", overflow="fold", ratio=4)
    table.add_column("answers", overflow="fold", ratio=3)
    for row in rows:
        table.add_row(Text(_end(str(row.get("prompt") or ""))), _answers(row))
    return table


def _end(prompt: str) -> str:
    return prompt if len(prompt) <= PROMPT_END else f"…{prompt[-PROMPT_END:]}"


def _answers(row: dict[str, Any]) -> Text:
    if not row.get("choices"):
        correct = row.get("correct")
        mark, style = ("", "") if correct is None else ("✓", "green") if correct else ("✗", "red")
        return Text.assemble(
            (f"{mark} ", style), str(row.get("prediction", "")).strip(), ("\nwanted  ", "dim"), str(row.get("target"))
        )
    lines = Text()
    for choice, log_probability in zip(row["choices"], row["log_probabilities"], strict=False):
        taken, right = choice == row["prediction"], choice == row["target"]
        style = "green" if right else "red" if taken else ""
        lines.append(f"{'→' if taken else ' '} {log_probability:9.3f} {'✓' if right else ' '} {_end(choice)}\n", style)
    lines.rstrip()
    return lines


def differences_table(report: Record) -> Table:
    """Where a model differs significantly from what it is held against."""
    marked: Any = report.metrics["differences"]
    table = Table(title="Significantly different from before", title_justify="left", header_style="dim")
    for column in ("task", "metric", "before", "now", "p"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right", overflow="fold")
    for found in (Difference.model_validate(one) for one in marked):
        name = found.metric if found.group is None else f"{found.metric}, {found.group}"
        style = "red" if found.is_fall(1.0) else "green"
        table.add_row(
            *(Text(found.task), Text(name), figure(found.second, found.is_share)),
            *(Text(figure(found.first, found.is_share), style), p_text(found.p)),
        )
    return table
