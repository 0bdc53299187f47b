"""`cairn evaluate --tasks`: an evaluation on this machine, with its progress and its result on the terminal."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from artifacts.record import Record
from artifacts.store import Store
from common.errors import UserError
from flows.console import ConsoleView
from flows.evaluating import Asking, evaluate
from flows.evaluation_tables import evaluation_tables
from flows.problems import first_problem
from flows.score_tables import differences_table, score_table
from tasks.events import as_event
from tasks.process import engine_process
from tasks.produce import produce
from tasks.report import REPORT_PAGE
from tasks.work import Work


def evaluate_on(store: Store, ref: str, keys: Mapping[str, Any], console: Console) -> None:
    """Evaluates a model on what `keys`, those of Asking, say, of which `tasks` has commas between them.

    Raises UserError for what the user can mend.
    """
    tasks = tuple(name.strip() for name in str(keys["tasks"]).split(","))
    try:
        asking = Asking.model_validate({**keys, "tasks": tasks})
    except ValidationError as error:
        raise UserError(first_problem(error, Asking)) from error
    with engine_process() as process, ConsoleView(console) as view:

        def do(work: Work) -> Record:
            listener = view.listener(work.name)
            if work.definition.has_engine:
                outcome = process.do(work, listener)
            else:
                outcome = produce(store, work, lambda event: listener(as_event(event)))
            if work.stage != "report":
                view.finished(work.name, outcome.record, outcome.reused, _seconds(outcome.record))
            return outcome.record

        found = evaluate(store, ref, asking, do)
    benchmarks = [one for one in found.evaluations if one.stage == "benchmark"]
    if benchmarks:
        console.print(score_table(benchmarks, found.groups))
    for one in found.evaluations:
        if one.stage != "benchmark":
            console.print(evaluation_tables(one))
    if found.report.metrics["differences"]:
        console.print(differences_table(found.report))
    attached = store.attachments(found.report.key)
    console.print(f"[dim]report[/]  {escape(found.report.name)}", highlight=False, soft_wrap=True)
    if REPORT_PAGE in attached:
        console.print(f"        {escape(attached[REPORT_PAGE])}", highlight=False, soft_wrap=True)


def _seconds(record: Record) -> float:
    return (record.ended - record.started).total_seconds()
