"""What the Prefect UI shows of a stage: how far it is while it trains, then a table, pictures and the lineage."""

import base64
import logging
import re
import time
from collections.abc import Callable, Iterator
from uuid import UUID

from prefect import runtime
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from artifacts.lineage import Node, summary, tree
from artifacts.record import Record
from artifacts.store import Store
from tasks.compare import COMPARISON_PICTURE
from tasks.encoding.card import DATA_CARD, LENGTHS_PICTURE
from tasks.events import Event, event_line, part_done
from tasks.report import REPORT_MARKDOWN

LOSS_CURVE = "loss.png"
PICTURES = {
    LOSS_CURVE: ("loss", "Loss curve"),
    LENGTHS_PICTURE: ("lengths", "Document lengths"),
    COMPARISON_PICTURE: ("comparison", "Loss against training FLOPs"),
}
"""Pictures among a stage's logs: how their artifacts' keys end, and what they show."""
_LIVE_SECONDS = 5.0
_IMPATIENT = {PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: 5.0}
logger = logging.getLogger("cairn.flows")


class LiveProgress:
    """A progress artifact of the run that it is made in, renewed every few seconds while a stage trains."""

    def __init__(self, stage: str) -> None:
        self._key = f"{_slug(stage)}-progress"
        self._artifact: UUID | None = None
        self._at = -_LIVE_SECONDS

    def listen(self, event: Event) -> None:
        """Takes a stage's events."""
        part = part_done(event)
        if part is None or (time.monotonic() - self._at < _LIVE_SECONDS and part[0] < part[1]):
            return
        done, total = part
        # A page shows several spaces as one.
        line = " · ".join(str(event_line(event)).split("  "))
        _quietly("progress", lambda: self._show(100 * done / total, line))
        self._at = time.monotonic()

    def _show(self, percent: float, line: str) -> None:
        # The stage waits for whoever takes its events: a server that is away shall not hold it up by many tries.
        with temporary_settings(_IMPATIENT), get_client(sync_client=True) as client:
            if self._artifact is None:
                made = client.create_artifact(
                    ArtifactCreate(
                        key=self._key,
                        type="progress",
                        description=line,
                        data=percent,
                        flow_run_id=runtime.flow_run.id,
                        task_run_id=runtime.task_run.id,
                    )
                )
                self._artifact = made.id
            else:
                client.update_artifact(self._artifact, ArtifactUpdate(description=line, data=percent))


def show_stage(recipe: str, stage: str, store: Store, record: Record) -> None:
    """Puts a stage's table, pictures and lineage into the Prefect UI; what fails there does not fail the run."""
    key = f"{_slug(recipe)}-{_slug(stage)}"

    def show() -> None:
        rows = [{"name": name, "value": value} for name, value in sorted(plain_metrics(record).items())]
        create_table_artifact(rows, key=key, description=record.summary)
        lines = _lineage_lines(tree(store, record), "", "")
        create_markdown_artifact("\n".join(lines), key=f"{key}-lineage", description="What it was made from")
        attached = store.attachments(record.key)
        pictures = {name: _inline(store.attachment(record.key, name)) for name in PICTURES if name in attached}
        for name, data in pictures.items():
            ending, description = PICTURES[name]
            # Not as an image artifact: the page of one spells its data out, across all that is beside it.
            picture = f"![{description}]({data})"
            create_markdown_artifact(picture, key=f"{key}-{ending}", description=description)
        if DATA_CARD in attached:
            card = store.attachment(record.key, DATA_CARD).decode()
            for name, data in pictures.items():
                card = card.replace(f"]({name})", f"]({data})")
            create_markdown_artifact(card, key=f"{key}-card", description="Data card")
        # A tokenizer has a file of that name too.
        if record.stage == "report" and REPORT_MARKDOWN in attached:
            report = store.attachment(record.key, REPORT_MARKDOWN).decode()
            create_markdown_artifact(report, key=f"{key}-report", description="Report")

    _quietly(f"artifacts of stage '{stage}'", show)


def _quietly(what: str, show: Callable[[], None]) -> None:
    try:
        show()
    except Exception as error:  # whatever the server answers, what was made is in the store
        logger.warning("the Prefect server did not take the %s: %s", what, error)


def _inline(picture: bytes) -> str:
    """A PNG file as a URL that needs no server."""
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def _lineage_lines(node: Node, title: str, indent: str) -> Iterator[str]:
    """A lineage as a nested list, which a narrow page breaks into lines."""
    yield f"{indent}- {title}**{_escaped(node.label)}** {_escaped(summary(node))}"
    for name, child in node.inputs.items():
        yield from _lineage_lines(child, f"{_escaped(name)}: ", f"{indent}  ")


def _escaped(text: str) -> str:
    """Text in which markdown and HTML find nothing of theirs."""
    return re.sub(r"[\\`*_\[\]<>&#|~]", r"\\\g<0>", text)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def plain_metrics(record: Record) -> dict[str, str]:
    """The numbers and short texts among a record's metrics but its summary, nested ones by dotted names."""
    found: dict[str, str] = {}

    def visit(name: str, value: object) -> None:
        if isinstance(value, dict):
            for inner_name, inner in value.items():
                visit(f"{name}.{inner_name}" if name else inner_name, inner)
        elif not isinstance(value, list):
            found[name] = _plain(value)

    visit("", {name: value for name, value in record.metrics.items() if name != "summary"})
    return found


def _plain(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "—", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e6 else f"{value:,.6g}"
    return str(value)
