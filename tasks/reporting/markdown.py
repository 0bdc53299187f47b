"""A report as Markdown tables, as a README and the Prefect UI show them."""

from collections import Counter
from collections.abc import Iterator, Sequence

from tasks.reporting import wording
from tasks.reporting.report_data import Provenance, Report
from tasks.reporting.significance import Difference
from tasks.reporting.wording import markdown
from tasks.scores import NONE, Score, figure

SHOWN_REFERENCES = 6
"""Models beside whose published scores there is room in a table."""
SHOWN_SNAPSHOTS = 6
"""The newest measurements, for which there is room in a table."""

SHOWN_LETTERS = 200
"""Letters of a template, say, for which there is room in a line."""

Row = Sequence[str]
_HEADS = ("metric", "score", "n", "few-shot", "chance", "majority", "")


def to_markdown(report: Report) -> str:
    """The whole report. All that comes from names and texts of others is escaped."""
    parts = [
        f"# {markdown(report.title)}",
        f"**{markdown(report.model)}**: {markdown(report.summary)}.",
        *_task_groups(report),
        *_scores(report),
        *_differences(report),
        *_history(report),
        *_groups(report),
        *_sources(report),
        *_provenance(report),
    ]
    return "\n\n".join(parts) + "\n"


def _task_groups(report: Report) -> Iterator[str]:
    if not report.grouped:
        return
    published = {one.model for _, found in report.grouped for one in report.references_of(found.score)}
    models = [model for model in _shown_models(report) if model in published]
    rows = []
    for provenance, found in report.grouped:
        row = _score_row(report, provenance, found.score, models)
        rows.append([*row[:3], f"{len(found.tasks):,}", *row[3:]])
    yield "## Groups of tasks"
    yield _table(["group", *_HEADS[:2], "tasks", *_HEADS[2:], *map(markdown, models)], rows, left=(0, 1, 8))
    yield wording.GROUPED


def _scores(report: Report) -> Iterator[str]:
    if not report.wholes:
        return
    models = _shown_models(report)
    rows = [_score_row(report, one.provenance, score, models) for one, score in report.wholes]
    yield "## Scores"
    yield _table(["task", *_HEADS, *map(markdown, models)], rows, left=(0, 1, 7))
    yield wording.LEGEND
    if not all(one.certain for one in report.references):
        yield wording.UNCERTAIN
    left_out = [model for model in report.reference_models() if model not in models]
    if left_out:
        yield f"Not in the table: what was published of {', '.join(map(markdown, left_out))}."


def _shown_models(report: Report) -> list[str]:
    """The models that most was published of, in the order of the references."""
    known = report.reference_models()
    published = Counter(one.model for one in report.references)
    most = sorted(known, key=lambda model: -published[model])[:SHOWN_REFERENCES]
    return [model for model in known if model in most]


def _score_row(report: Report, provenance: Provenance, score: Score, models: Sequence[str]) -> Row:
    share = score.is_share
    published = {
        model: ", ".join(
            wording.published_text(one, share) for one in report.references_of(score) if one.model == model
        )
        for model in models
    }
    return [
        markdown(score.task),
        _metric(score.metric, score.higher_is_better),
        f"**{score.text}**",
        f"{score.n:,}",
        wording.shots(provenance.num_fewshot),
        score.figure(score.chance),
        score.figure(score.majority),
        wording.mark(score),
        *(published[model] or NONE for model in models),
    ]


def _metric(metric: str, higher_is_better: bool) -> str:
    return markdown(metric) + ("" if higher_is_better else " (less is better)")


def _differences(report: Report) -> Iterator[str]:
    if not report.differences:
        return
    yield f"## Against {markdown(report.other)}"
    heads = ["task", "metric", "first", "second", "difference", "95% interval", "p", "n", ""]
    heads[2:4] = [markdown(report.model), markdown(report.other)]
    yield _table(heads, [_difference_row(one, report.level) for one in report.differences], left=(0, 1, 8))
    yield (
        "Document by document, on those that both have been asked. "
        f"{wording.by_chance(len(report.differences), report.level)}"
    )


def _difference_row(one: Difference, level: float) -> Row:
    share = one.is_share
    said = wording.verdict(one, level)
    return [
        markdown(one.task if one.group is None else f"{one.task}: {one.group}"),
        _metric(one.metric, one.higher_is_better),
        figure(one.first, share),
        figure(one.second, share),
        wording.signed(one.difference, share),
        wording.interval_text(one),
        wording.p_text(one.p),
        f"{one.n:,}",
        f"**{said}**" if said else "",
    ]


def _history(report: Report) -> Iterator[str]:
    lines = report.lines()
    if not lines:
        return
    shown = list(enumerate(report.history, 1))[-SHOWN_SNAPSHOTS:]
    yield "## Over time"
    rows = []
    for series, points in lines.items():
        given = {id(snapshot): score for snapshot, score in points}
        cells = [given.get(id(snapshot)) for _, snapshot in shown]
        if any(cells):
            asked = (series.task, series.metric, wording.series_text(series, lines))
            rows.append([*map(markdown, asked), *(one.text if one else NONE for one in cells)])
    times = (wording.moment(snapshot, number) for number, snapshot in shown)
    yield _table(["task", "metric", "asked", *times], rows, (0, 1, 2))


def _groups(report: Report) -> Iterator[str]:
    for evaluation in report.evaluations:
        for (task, metric), kinds in evaluation.divided().items():
            yield f"## {markdown(task)} by part, {markdown(metric)}"
            rows = [
                [
                    *(markdown(kind), markdown(part.name), wording.part_text(part)),
                    *(f"{part.score.n:,}", wording.mark(part.score)),
                ]
                for kind, parts in kinds.items()
                for part in parts
            ]
            yield _table(["of", "part", "score", "n", ""], rows, left=(0, 1, 4))
            yield wording.parts_legend([part for parts in kinds.values() for part in parts])


def _sources(report: Report) -> Iterator[str]:
    if not report.references:
        return
    yield "## Published values"
    yield "\n".join(
        f"- {markdown(', '.join(models))}: {markdown(title)}, {_address(url)}"
        for title, url, models in report.sources()
    )


def _address(url: str) -> str:
    """A link where it is one that a reader may follow, else text."""
    plain = url.startswith(("https://", "http://")) and not any(letter in url for letter in "<>\\ \n\t|")
    return f"<{url}>" if plain else markdown(url)


def _provenance(report: Report) -> Iterator[str]:
    told = [(one.name, wording.provenance_rows(one.provenance)) for one in report.evaluations]
    if not any(rows for _, rows in told):
        return
    yield "## How it was measured"
    yield "\n".join(
        f"- {markdown(name)}: " + "; ".join(f"{what} {markdown(_cut(text))}" for what, text in rows)
        for name, rows in told
        if rows
    )


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_LETTERS else f"{text[: SHOWN_LETTERS - 1]}…"


def _table(heads: Row, rows: Sequence[Row], left: Sequence[int]) -> str:
    lines = [heads, ["---" if column in left else "---:" for column in range(len(heads))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
