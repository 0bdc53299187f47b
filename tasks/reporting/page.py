"""A report as one self-contained HTML page, which loads nothing and runs no script: light or dark, and printable."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from tasks.reporting import drawing, wording
from tasks.reporting.report_data import Part, Provenance, Published, Report
from tasks.reporting.significance import INTERVAL, Difference
from tasks.reporting.style import STYLE
from tasks.scores import NONE, Score, figure


def to_html(report: Report) -> str:
    """The whole page as text. All that comes from names and texts of others is escaped."""
    sections = [
        section
        for make in (_task_groups, _scores, _differences, _history, _groups, _published, _provenance)
        for section in make(report)
    ]
    body = "\n".join(sections)
    measured = report.history[-1].at if report.history else None
    at = f", measured {wording.day(measured)}" if measured else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(report.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(report.title)}</h1>
<p><b>{escape(report.model)}</b>{at}: {escape(report.summary)}.</p>
{body}
</body>
</html>
"""


def _task_groups(report: Report) -> Iterator[str]:
    if not report.grouped:
        return
    rows = "\n".join(_score_row(report, how, found.score, len(found.tasks)) for how, found in report.grouped)
    yield "<h2>Groups of tasks</h2>"
    yield _legend(report)
    yield _table(_score_heads("group", "tasks"), rows)
    yield f"<p>{escape(wording.GROUPED)}</p>"


def _scores(report: Report) -> Iterator[str]:
    if not report.wholes:
        return
    rows = "\n".join(_score_row(report, one.provenance, score) for one, score in report.wholes)
    yield "<h2>Scores</h2>"
    if not report.grouped:
        yield _legend(report)
    yield _table(_score_heads("task"), rows)
    yield f"<p>{wording.LEGEND} Bars of anything but shares have a scale of their own.</p>"


def _score_heads(of: str, *further: str) -> str:
    heads = ("score", *further, "n", "few-shot", "chance", "majority")
    numbers = "".join(f'<th class="number">{head}</th>' for head in heads)
    return f'<th>{of}</th><th class="drawing">{drawing.bar_heading()}</th>{numbers}<th></th>'


def _legend(report: Report) -> str:
    scores = [*report.scores, *(found.score for _, found in report.grouped)]
    marks = [('<rect class="bar" x="1" y="3" width="20" height="10"/>', "score")]
    if any(map(wording.mark, scores)):
        marks.append(
            ('<rect class="doubtful" x="1" y="3" width="20" height="10"/>', "near or below chance or majority")
        )
    if any(score.standard_error is not None for score in scores):
        marks.append(('<path class="error" d="M2,5v6M20,5v6M2,8H20"/>', "two standard errors"))
    if any(score.chance is not None for score in scores):
        marks.append(('<line class="chance" x1="11" x2="11" y1="0" y2="16"/>', "chance"))
    if any(score.majority is not None for score in scores):
        marks.append(('<line class="majority" x1="11" x2="11" y1="0" y2="16"/>', "always the commonest answer"))
    if any(report.references_of(score) for score in scores):
        marks.append(
            ('<path class="tick" d="M6,4h10l-5,9z"/>', "published of another model (named on hover, and below)")
        )
    items = (
        f'<li><svg width="22" height="16" viewBox="0 0 22 16" aria-hidden="true">{mark}</svg>{text}</li>'
        for mark, text in marks
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _score_row(report: Report, provenance: Provenance, score: Score, tasks: int | None = None) -> str:
    numbers = [
        *([] if tasks is None else [f"{tasks:,}"]),
        f"{score.n:,}",
        wording.shots(provenance.num_fewshot),
        score.figure(score.chance),
        score.figure(score.majority),
    ]
    cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
    return (
        f"<tr>{_task_cell(score.task, score)}"
        f'<td class="drawing">{drawing.bar(score, report.references_of(score))}</td>'
        f'<td class="number own">{score.text}</td>{cells}<td>{_tag(wording.mark(score))}</td></tr>'
    )


def _task_cell(name: str, measured: Score | Difference) -> str:
    less = "" if measured.higher_is_better else ", less is better"
    return f'<td class="task">{escape(name)} <span class="quiet">{escape(measured.metric)}{less}</span></td>'


def _part_cell(name: str) -> str:
    return f'<td class="task">{escape(name)}</td>'


def _tag(mark: str) -> str:
    return f'<span class="tag">{mark}</span>' if mark else ""


def _differences(report: Report) -> Iterator[str]:
    if not report.differences:
        return
    model, other = escape(report.model), escape(report.other)
    yield f"<h2>{model} against {other}</h2>"
    yield (
        f"<p>Document by document, on those that both have been asked: {other} lies at the dotted line, what is better "
        f"to its right where more is better. Intervals are {INTERVAL:g} standard errors of the paired difference to "
        f"either side. {escape(wording.by_chance(len(report.differences), report.level))}</p>"
    )
    heads = [model, other, "difference", "95% interval", "p", "n"]
    numbers = "".join(f'<th class="number">{head}</th>' for head in heads)
    for title, found in _scales(report.differences):
        reach = drawing.reach(found)
        rows = "\n".join(_difference_row(one, report.level, reach) for one in found)
        scale = drawing.interval_heading(reach, found[0].is_share)
        yield _table(f'<th>{escape(title)}</th><th class="drawing">{scale}</th>{numbers}<th></th>', rows)


def _scales(differences: Sequence[Difference]) -> Iterator[tuple[str, Sequence[Difference]]]:
    """Differences that are drawn on one scale, by a heading: shares of whole tasks, each other measure of them, and the
    parts of each task."""
    found: dict[str, list[Difference]] = {}
    for one in differences:
        whole = "task" if one.is_share else f"task, {one.metric}"
        found.setdefault(whole if one.group is None else f"{one.task}, {one.metric}", []).append(one)
    yield from found.items()


def _difference_row(one: Difference, level: float, reach: float) -> str:
    share = one.is_share
    said = wording.verdict(one, level)
    numbers = [
        figure(one.first, share),
        figure(one.second, share),
        wording.signed(one.difference, share),
        wording.interval_text(one),
        escape(wording.p_text(one.p)),
        f"{one.n:,}",
    ]
    cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
    return (
        f"<tr>{_task_cell(one.task, one) if one.group is None else _part_cell(one.group)}"
        f'<td class="drawing">{drawing.interval(one, reach, said or "same")}</td>{cells}'
        f'<td><span class="{said or "quiet"}">{said}</span></td></tr>'
    )


def _history(report: Report) -> Iterator[str]:
    lines = report.lines()
    if not lines:
        return
    yield "<h2>Over time</h2>"
    yield (
        "<p>Measurements in their order, each point with its time and score on hover; the band is two standard errors "
        "to either side, the dashed line chance.</p>"
    )
    charts = (
        f'<div class="card"><h3><span>{escape(series.task)} <span class="quiet">{escape(series.metric)}, '
        f"{escape(wording.series_text(series, lines))}</span></span>"
        f"<span>{points[-1][1].text}</span></h3>\n{drawing.chart(points)}</div>"
        for series, points in lines.items()
    )
    yield f'<div class="charts">\n{"".join(charts)}\n</div>'


def _groups(report: Report) -> Iterator[str]:
    for evaluation in report.evaluations:
        for (task, metric), kinds in evaluation.divided().items():
            every = [part for parts in kinds.values() for part in parts]
            yield f'<h2>{escape(task)} by part <span class="quiet">{escape(metric)}</span></h2>'
            yield f"<p>{wording.parts_legend(every)} Bars of shares reach from 0 to 100%.</p>"
            blocks = "\n".join(_parts(kind, parts) for kind, parts in kinds.items())
            yield f'<div class="card parts">\n{blocks}\n</div>'


def _parts(kind: str, parts: Sequence[Part]) -> str:
    rows = "\n".join(map(_part, parts))
    return f'<section class="kind"><h3>{escape(kind)}</h3>\n{rows}\n</section>' if kind else rows


def _part(part: Part) -> str:
    drawn = drawing.bar(part.score, narrow=True, interval=part.interval)
    return (
        f'<div class="part"><span>{escape(part.name)}</span>{drawn}'
        f"<span>{wording.part_text(part)}{_tag(wording.mark(part.score))}</span></div>"
    )


def _published(report: Report) -> Iterator[str]:
    models = report.reference_models()
    scores = [*(found.score for _, found in report.grouped), *(score for _, score in report.wholes)]
    measured = [score for score in scores if report.references_of(score)]
    if not measured:
        return
    yield "<h2>Published values</h2>"
    uncertain = "" if all(one.certain for one in report.references) else f" {wording.UNCERTAIN}"
    yield f"<p>As they were published, which may be with other prompts and other versions of the data.{uncertain}</p>"
    heads = "".join(f'<th class="number">{escape(name)}</th>' for name in (report.model, *models))
    sources = report.sources()
    numbers = {(title, url): number for number, (title, url, _) in enumerate(sources, 1)}
    rows = "\n".join(_published_row(score, report.references_of(score), models, numbers) for score in measured)
    yield _table(f"<th>task</th>{heads}", rows)
    items = "\n".join(
        f'<li id="source-{number}">{escape(", ".join(names))}: {_link(title, url)}</li>'
        for number, (title, url, names) in enumerate(sources, 1)
    )
    yield f"<ol>\n{items}\n</ol>"


def _published_row(
    score: Score, references: Sequence[Published], models: Sequence[str], numbers: Mapping[tuple[str, str], int]
) -> str:
    share = score.is_share
    found: dict[str, list[str]] = {model: [] for model in models}
    for one in references:
        number = numbers[one.source, one.url]
        source = f'<sup><a href="#source-{number}">{number}</a></sup>'
        found[one.model].append(f"{wording.published_text(one, share)}{source}")
    cells = "".join(f'<td class="number">{"<br>".join(values) or NONE}</td>' for values in found.values())
    own = f'<td class="number own">{score.figure(score.value)}</td>'
    return f"<tr>{_task_cell(score.task, score)}{own}{cells}</tr>"


def _link(title: str, url: str) -> str:
    """A link where its address is one of the web: a page from elsewhere may not run anything by being followed."""
    if not url.startswith(("https://", "http://")):
        return f"{escape(title)} ({escape(url)})"
    return f'<a href="{escape(url)}" rel="noreferrer">{escape(title)}</a>'


def _provenance(report: Report) -> Iterator[str]:
    told = [(one, dict(wording.provenance_rows(one.provenance))) for one in report.evaluations]
    heads = list(dict.fromkeys(name for _, rows in told for name in rows))
    if not heads:
        return
    yield "<h2>How it was measured</h2>"
    names = "".join(f"<th>{head}</th>" for head in ("evaluation", *heads, "scores"))
    rows = "\n".join(
        f'<tr><td class="prose">{escape(one.name)}</td>'
        + "".join(f'<td class="prose">{escape(rows.get(head, NONE))}</td>' for head in heads)
        + f"<td>{len(one.scores)}</td></tr>"
        for one, rows in told
    )
    yield _table(names, rows)


def _table(heads: str, rows: str) -> str:
    return f'<div class="card"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'
