"""What evaluations found, as tables, with samples of what the models wrote."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from artifacts.record import Record
from flows.score_tables import score_table
from tasks.asking.questions import KINDS as CATEGORY_KINDS
from tasks.exact_match import SHOWN_GROUPS, shown_groups, shown_lengths


def evaluation_tables(record: Record) -> Group:
    """What an evaluation found, and samples of what the model writes."""
    if record.stage == "benchmark":
        return Group(score_table([record]))
    tables = {"perplexity": _perplexity, "behaviour": _behaviour}
    return tables.get(record.stage, _exact_match)(record.metrics)


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
        texts = (Text(sample[name]) for name in ("prompt", "prediction", "target"))
        samples.add_row(*texts, _mark(sample))
    parts: list[RenderableType] = [scores, *by]
    # Scores that were made earlier do not say it.
    if metrics.get("cut_off"):
        parts.append(f"{_cut_off(metrics)}, and count as wrong")
    if "too_long" in metrics:
        parts.append(_too_long(metrics))
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
                _with_error(metrics),
                style="bold" if last else None,
                end_section=last,
            )
    return table
