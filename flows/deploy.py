"""`cairn deploy`: what a Prefect server has to know of Cairn. Safe to repeat: what people have changed stays."""

import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

from common.errors import UserError
from flows.evaluation import REGRESSED
from flows.pipeline import TAG
from tasks.remote import DAMAGED, REFUSED, STOPPED

DEPLOYMENTS = Path(__file__).parent.parent / "deployment" / "prefect.yaml"
POOLS = {
    "pipeline": (10, "Pipelines, which mostly wait: none may hold the slot that its own stage waits for."),
    "cpu": (1, "Stages for machines with processors alone."),
    "cuda": (1, "Stages for machines with NVIDIA GPUs."),
    "tpu": (1, "Stages for machines with a TPU."),
    "apple": (1, "Stages for Apple Silicon."),
}
"""The pools: how many runs each has at a time, which may be changed later, and what it is for."""
SILENT_SECONDS = 90
PENDING_SECONDS = 300
WORSE = "a model is significantly worse than it was; the log and the report say in what"
_STATES = ("Completed", "Failed", "Cancelled", "Crashed", "AwaitingRetry", "Scheduled", REFUSED, DAMAGED, STOPPED)
_ENDINGS = {f"prefect.flow-run.{state}" for state in _STATES}
"""Events that say of a run that nobody need listen for it any more; each bears the name of the run's state."""


def deploy(tell: Callable[[str], None]) -> None:
    """Makes the pools, the automations and the deployments on the configured server; `tell` takes a line for each.

    Raises UserError where `prefect deploy` does not succeed.
    """
    with get_client(sync_client=True) as client:
        # First: without its pool, `prefect deploy` stops at a deployment.
        for name, (concurrency, description) in POOLS.items():
            tell(f"pool {name}: {_make_pool(client, name, concurrency, description)}")
        for automation in automations():
            tell(f"automation '{automation.name}': {_make_automation(client, automation)}")
    command = [sys.executable, "-P", "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file"]
    done = subprocess.run([*command, str(DEPLOYMENTS)], cwd=DEPLOYMENTS.parent, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"`prefect deploy` of {DEPLOYMENTS} did not succeed:\n{done.stdout}{done.stderr}".rstrip())
    tell(f"deployments: those of {DEPLOYMENTS}")


def _make_pool(client: SyncPrefectClient, name: str, concurrency: int, description: str) -> str:
    try:
        found = client.read_work_pool(name)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        pool = WorkPoolCreate(
            name=name,
            type="process",
            description=description,
            concurrency_limit=concurrency,
            base_job_template=template,
        )
        client.create_work_pool(pool)
        return f"made, {concurrency} at a time"
    limit = "without a limit" if found.concurrency_limit is None else f"{found.concurrency_limit} at a time"
    return f"there already, {limit}"


def _make_automation(client: SyncPrefectClient, automation: AutomationCore) -> str:
    for found in client.read_automations_by_name(automation.name):
        # Brought up to date, but for what people change: whether it is on, and after how long it acts.
        trigger = automation.trigger
        if isinstance(found.trigger, EventTrigger):
            trigger = trigger.model_copy(update={"within": found.trigger.within})
        client.update_automation(found.id, automation.model_copy(update={"enabled": found.enabled, "trigger": trigger}))
        return "there already" if found.enabled else "there already, and turned off"
    client.create_automation(automation)
    return "made"


def automations() -> list[AutomationCore]:
    """What ends runs that would wait or run for ever, and what tells of models that became worse."""
    return [
        _crash(
            "Cairn: silent runs have crashed",
            "no heartbeat any more: its process or its machine is gone",
            # The first heartbeat of a process that dies young may never arrive; the server says itself that it runs.
            after={"prefect.flow-run.heartbeat", "prefect.flow-run.Running"},
            expect={"prefect.flow-run.heartbeat", *_ENDINGS},
            seconds=SILENT_SECONDS,
        ),
        _crash(
            "Cairn: runs that never begin have crashed",
            "taken by a worker and not begun in time: its process could not start",
            after={"prefect.flow-run.Pending"},
            expect={"prefect.flow-run.Running", *_ENDINGS},
            seconds=PENDING_SECONDS,
        ),
        AutomationCore(
            name="Cairn: an evaluation that found a model worse has failed",
            description="Marks the flow run, so that it is seen, and what tells of failed runs tells of it.",
            trigger=EventTrigger(
                match={"prefect.resource.id": "cairn.model.*"},
                expect={REGRESSED},
                posture=Posture.Reactive,
                threshold=1,
                within=timedelta(0),
            ),
            actions=[
                # It may be over by then: an end is changed by force alone.
                ChangeFlowRunState(state=StateType.FAILED, name="Regressed", message=WORSE, force=True)
            ],
        ),
    ]


def _crash(name: str, message: str, after: set[str], expect: set[str], seconds: int) -> AutomationCore:
    return AutomationCore(
        name=name,
        description="Marks such a flow run as crashed, so that whoever waits for it can start it anew.",
        trigger=EventTrigger(
            match={"prefect.resource.id": "prefect.flow-run.*"},
            # Others may use the server too, with runs that are silent for longer.
            match_related={"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"},
            for_each={"prefect.resource.id"},
            after=after,
            expect=expect,
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=seconds),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=message)],
    )
