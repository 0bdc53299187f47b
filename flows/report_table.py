"""A report over evaluations as a short table that fits 80 columns."""

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from tasks.reporting import wording
from tasks.reporting.report_data import Report
from tasks.reporting.significance import Difference
from tasks.scores import NONE

_STYLES = {"better": "green", "worse": "red", "": ""}


def report_table(report: Report) -> Table:
    """The scores of whole tasks and of groups, each beside chance and beside the other model where there is one."""
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
    table.add_column("task", overflow="fold")
    for column in ("score", "chance"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for heading in (Text(f"against\n{report.other}", overflow="ellipsis"), "p") if compared else ():
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [(score.task, score) for _, score in report.wholes]
    rows += [(f"{found.score.task}, {len(found.tasks)} tasks", found.score) for _, found in report.grouped]
    for name, score in rows:
        table.add_row(
            Text.assemble(name, " ", (score.metric, "dim")),
            score.text,
            score.figure(score.chance),
            Text(wording.mark(score), style="yellow"),
            *(_against(compared.get((score.task, score.metric)), report.level) if compared else ()),
        )
    return table


def _against(one: Difference | None, level: float) -> tuple[Text, Text]:
    if one is None:
        return Text(NONE), Text("")
    style = _STYLES[wording.verdict(one, level)]
    return Text(wording.signed(one.difference, one.is_share), style=style), Text(wording.p_text(one.p))
