"""The flow that a worker runs: one stage, whose work is its one parameter."""

import logging
import os
from typing import Any

from prefect import flow, get_run_logger
from prefect.states import Cancelled, Completed, Crashed, Failed

from artifacts.store import DamagedObject, Store
from common.errors import StageFailed, StageInterrupted, TransientError, UserError
from flows.devices import hold_devices
from flows.own_run import OwnRun
from flows.showing import LiveProgress
from flows.stopping import Stopping
from flows.view import LogView
from models.engine import check_engine
from models.machine import accelerators
from tasks.dispatch import do_here
from tasks.events import Event
from tasks.process import EngineProcess, engine_process
from tasks.remote import DAMAGED, REFUSED, STOPPED
from tasks.work import Outcome, Work

WORKER = "CAIRN_WORKER"
"""The environment's name for the pool that this machine works for, which `cairn worker` sets."""
logger = logging.getLogger("cairn.flows")


@flow(name="stage", persist_result=False, validate_parameters=False)
def stage(work: dict[str, Any], key: str) -> Any:
    """Does a stage that a pipeline has sent to this machine's pool. Not to be started by hand.

    `key`: the work's as the pipeline has it, which another version of Cairn would not have.
    """
    parsed = Work.model_validate(work)
    own = OwnRun()
    try:
        with engine_process() as process, Stopping(process.interrupt) as stopping:
            outcome = _done(parsed, key, process, stopping)
    except DamagedObject as error:
        own.end(Failed(name=DAMAGED, message=str(error)))
    except TransientError as error:
        own.end(Failed(message=str(error)))
    except UserError as error:
        own.end(Failed(name=REFUSED, message=str(error)))
    except StageInterrupted as error:
        if own.is_cancelled:
            own.end(Cancelled(message=str(error)))
        # Only the worker is being stopped, and the stage is to go on elsewhere.
        own.end(Crashed(name=STOPPED, message=f"the worker on {os.uname().nodename} was stopped"))
    except StageFailed as error:
        # It brings the traceback of the process that failed; that of this one says nothing more.
        own.end(Failed(message=str(error)))
    return Completed(message=outcome.record.summary)


def _done(work: Work, key: str, process: EngineProcess, stopping: Stopping) -> Outcome:
    Store.open(work.store).be_patient()
    check_fits(work, key)
    run_logger = get_run_logger()
    log = LogView(lambda stage, line: run_logger.info("%s: %s", stage, line)).listener(work.name)
    live = LiveProgress(work.name)

    def listen(event: Event) -> None:
        log(event)
        live.listen(event)

    def should_stop() -> bool:
        return stopping.requested

    with hold_devices(work, should_stop) as process.locks:
        return do_here(work, process, listen, should_stop)


def check_fits(work: Work, key: str) -> None:
    """Raises UserError where this machine is not what a work wants, or does not see its store."""
    pool = work.runtime.worker
    mine = os.environ.get(WORKER)
    if mine != pool:
        raise UserError(
            f"stage '{work.name}' is for workers of pool '{pool}', and this is one of '{mine or 'none'}': "
            f"start workers with `cairn worker {pool}`"
        )
    if work.key != key:
        raise UserError(
            f"stage '{work.name}': the worker on {os.uname().nodename} has another version of Cairn than the pipeline; "
            f"give all machines the same commit"
        )
    if pool != "local" and not accelerators(pool):
        raise UserError(f"stage '{work.name}' wants '{pool}', and this machine ({os.uname().nodename}) has none")
    if work.definition.has_engine:
        check_engine(work.config["engine"], work.config.get("precision", "float32"), work.config.get("bits"))
    store = Store.open(work.store)
    for name, reference in work.inputs.items():
        if store.read_record(reference.key) is None:
            raise UserError(
                f"stage '{work.name}': the worker on {os.uname().nodename} does not see the input '{name}' in "
                f"{work.store}; machines that work together need one store that all reach, such as s3://bucket/store"
            )
