"""A report over evaluations as a short table that fits 80 columns."""

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from tasks.reporting import wording
from tasks.reporting.report_data import Report
from tasks.reporting.significance import Difference

_STYLES = {"better": "green", "worse": "red", "": ""}


def report_table(report: Report) -> Table:
    """The scores of whole tasks, each beside chance and beside the other model where there is one."""
    table = Table(
        title=Text(report.title),
        title_justify="left",
        header_style="dim",
        caption=Text(report.summary),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0),
        pad_edge=False,
    )
    compared = {(one.task, one.metric): one for one in report.differences if one.group is None}
    for column in ("task", "metric"):
        table.add_column(column, overflow="fold")
    for column in ("score", "chance"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    if compared:
        table.add_column(Text(f"against {report.other}"), justify="right", overflow="fold")
    for _, score in report.wholes:
        table.add_row(
            Text(score.task),
            Text(score.metric),
            wording.score_text(score),
            wording.figure(score.chance, wording.is_share(score)),
            Text(wording.mark(score), style="yellow"),
            *([_against(compared.get((score.task, score.metric)), report.level)] if compared else []),
        )
    return table


def _against(one: Difference | None, level: float) -> Text:
    if one is None:
        return Text(wording.NONE)
    shown = f"{wording.signed(one.difference, wording.is_share(one))}, p {wording.p_text(one.p)}"
    return Text(shown, style=_STYLES[wording.verdict(one, level)])
