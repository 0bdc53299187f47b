"""The deployment `evaluation/cairn`: by a schedule, with nothing new, with a worse model, stopped, and with models that
cannot be evaluated."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import Cancelling
from safetensors.numpy import load_file, save_file

from artifacts.record import Record
from artifacts.store import Store
from flows.deploy import WORSE, automations
from flows.evaluation import REGRESSED
from flows.inference import model_record
from tests.deployment.conftest import Fleet, wait_for
from tests.tasks.harness.against_hf import random_model

NAME = "models/tiny"
WEIGHTS, HEAD = "model.safetensors", "lm_head.weight"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model as a published folder: of the first 100 questions of boolq it gets 69 right."""
    return random_model(tmp_path_factory.mktemp("random"), "llama", hidden_size=16).published


def contrary(published: Path, folder: Path) -> Path:
    """The same model with its head negated: the likelier of two words becomes the less likely one."""
    shutil.copytree(published, folder)
    weights = load_file(folder / WEIGHTS)
    save_file({**weights, HEAD: -weights[HEAD]}, folder / WEIGHTS, {"format": "pt"})
    return folder


class Evaluations:
    """The deployment and its runs, on the store of a fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.store = Store.open(fleet.environment["CAIRN_STORE"])
        with fleet.client() as client:
            self.deployment = client.read_deployment_by_name("evaluation/cairn")

    def point(self, folder: Path) -> None:
        """Makes the name that of the model in a folder."""
        self.store.set_name(NAME, model_record(self.store, str(folder)).key)

    def start(self, **parameters: Any) -> FlowRun:
        """A run that no schedule has started."""
        with self._fleet.client() as client:
            return client.create_flow_run_from_deployment(self.deployment.id, parameters=parameters)

    def from_schedule(self, asked: dict[str, Any], after: datetime | None = None) -> list[FlowRun]:
        """The runs that schedules with some parameters have created, to begin after some time, the first one first."""
        with self._fleet.client() as client:
            runs = client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_ASC)
        mine = [run for run in runs if run.auto_scheduled and asked.items() <= run.parameters.items()]
        return [run for run in mine if after is None or (run.expected_start_time or after) > after]

    @contextmanager
    def schedule(self, seconds: float, asked: dict[str, Any]) -> Iterator[None]:
        """A further schedule of the deployment, in the block."""
        every = IntervalSchedule(interval=timedelta(seconds=seconds))
        added = DeploymentScheduleCreate(schedule=every, parameters=asked, slug="often")
        with self._fleet.client() as client:
            (made,) = client.create_deployment_schedules(self.deployment.id, [added])
            try:
                yield
            finally:
                client.delete_deployment_schedule(self.deployment.id, made.id)

    def state(self, run: FlowRun) -> State[Any]:
        with self._fleet.client() as client:
            state = client.read_flow_run(run.id).state
        assert state is not None
        return state

    def ended(self, run: FlowRun, seconds: float = 120.0) -> State[Any]:
        """Waits for a run's end."""
        wait_for(lambda: self.state(run).is_final(), seconds, what=f"the end of evaluation {run.id}")
        return self.state(run)

    def states(self, run: FlowRun) -> list[str]:
        """The names of the states that a run has been in."""
        with self._fleet.client() as client:
            return [str(state.name) for state in client.read_flow_run_states(run.id)]

    def tasks(self, run: FlowRun) -> list[tuple[str, str | None]]:
        """What a run had done: the names of its task runs, and how each ended."""
        mine = FlowRunFilter.model_validate({"id": {"any_": [run.id]}})
        with self._fleet.client() as client:
            return sorted((task.name, task.state_name) for task in client.read_task_runs(flow_run_filter=mine))

    def made(self, stage: str) -> list[Record]:
        """The records of a kind of stage."""
        return [record for record in self.store.records() if record.stage == stage]

    def report(self) -> Record:
        """The last report of the model."""
        return self.store.resolve("evaluations/models/tiny")

    def events(self) -> list[dict[str, Any]]:
        """The falls that the server was told of."""
        with self._fleet.client() as client:
            answer = client.request("POST", "/events/filter", json={"filter": {"event": {"name": [REGRESSED]}}})
        found: list[dict[str, Any]] = answer.json()["events"]
        return found


@pytest.fixture
def evaluations(fleet: Fleet) -> Evaluations:
    fleet.worker("pipeline", name="first")
    return Evaluations(fleet)


def test_it_is_deployed_with_its_schedule_and_what_reacts_to_it(fleet: Fleet) -> None:
    with fleet.client() as client:
        deployment = client.read_deployment_by_name("evaluation/cairn")
        (automation,) = client.read_automations_by_name(automations()[2].name)
    (nightly,) = [one for one in deployment.schedules if one.slug == "nightly"]
    assert isinstance(nightly.schedule, CronSchedule)
    assert (nightly.schedule.cron, nightly.active) == ("30 2 * * *", True)
    assert automation.enabled
    assert REGRESSED in automation.trigger.expect  # type: ignore[union-attr]


def test_a_schedule_evaluates_and_a_worse_model_fails_the_run(
    evaluations: Evaluations, published: Path, tmp_path: Path
) -> None:
    asked = {"models": ["models/*"], "tasks": ["boolq"], "limit": 100}
    evaluations.point(published)
    with evaluations.schedule(20, asked):
        (first, *_) = wait_for(lambda: evaluations.from_schedule(asked), 30, what="runs that the server creates itself")
        assert evaluations.ended(first).name == "Completed", evaluations.state(first)
        made = {record.key for record in evaluations.store.records()}
        report = evaluations.report()
        # On a busy machine others have begun before the first one was done.
        now = datetime.now(UTC)
        (second, *_) = wait_for(lambda: evaluations.from_schedule(asked, after=now), 30, what="a run after it")
        assert evaluations.ended(second).name == "Completed", evaluations.state(second)
    assert [name for name, _ in evaluations.tasks(first)] == [
        "models/tiny boolq",
        "models/tiny evaluations/models/tiny",
    ]
    assert report.flow_run_id == str(first.id)
    # Nothing has changed: no stage was run, and so no engine was started.
    assert evaluations.tasks(second) == []
    assert {record.key for record in evaluations.store.records()} == made
    assert evaluations.report().key == report.key
    assert evaluations.state(second).message == "models/tiny: as it was; 0 significantly worse"

    evaluations.point(contrary(published, tmp_path / "contrary"))
    third = evaluations.start(**asked)
    wait_for(lambda: evaluations.state(third).name == "Regressed", 60, "the automation")
    assert (evaluations.state(third).type, evaluations.state(third).message) == (StateType.FAILED, WORSE)
    # The run itself was over by then, so that nothing of its own comes after what the automation said.
    assert evaluations.states(third)[-2:] == ["Completed", "Regressed"]
    # The server reacts to an event before it has stored it.
    (event,) = wait_for(evaluations.events, 60, "the event")
    told = event["payload"]
    assert (told["model"], told["task"], told["documents"]) == ("models/tiny", "boolq", 100)
    assert told["score"] == pytest.approx(1 - told["before"])
    assert told["before"] == pytest.approx(0.69)
    assert told["report"] == evaluations.report().key != report.key


def test_its_worker_is_stopped_and_another_goes_on(evaluations: Evaluations, published: Path, fleet: Fleet) -> None:
    evaluations.point(published)
    run = evaluations.start(models=[NAME], tasks=["copa", "boolq"], limit=2000)
    wait_for(lambda: evaluations.made("benchmark"), what="the first task")
    (worker,) = fleet.started
    worker.terminate()
    assert worker.wait(60) == 0
    assert evaluations.state(run).name == "AwaitingRetry", evaluations.state(run)
    (copa,) = evaluations.made("benchmark")
    assert copa.config["task"] == "copa"
    fleet.worker("pipeline", name="second")
    assert evaluations.ended(run).name == "Completed", evaluations.state(run)
    assert evaluations.tasks(run) == [
        ("models/tiny boolq", "Cancelled"),
        ("models/tiny boolq", "Completed"),
        ("models/tiny copa", "Completed"),
        ("models/tiny evaluations/models/tiny", "Completed"),
    ]
    made = evaluations.made("benchmark")
    assert copa in made
    assert len(made) == 2


def test_it_is_cancelled(evaluations: Evaluations, published: Path, fleet: Fleet) -> None:
    evaluations.point(published)
    run = evaluations.start(models=[NAME], tasks=["copa", "boolq", "commonsense_qa", "winogrande"], limit=0)
    wait_for(lambda: evaluations.made("benchmark"), what="the first task")
    with fleet.client() as client:
        client.set_flow_run_state(run.id, Cancelling())
    assert evaluations.ended(run).name == "Cancelled", evaluations.state(run)
    made = evaluations.made("benchmark")
    assert 1 <= len(made) < 4
    again = evaluations.start(models=[NAME], tasks=["copa"], limit=0)
    assert evaluations.ended(again).name == "Completed", evaluations.state(again)
    assert evaluations.made("benchmark") == made
    assert [name for name, _ in evaluations.tasks(again)] == ["models/tiny evaluations/models/tiny"]


def test_one_that_cannot_be_evaluated_keeps_no_other_from_it(
    evaluations: Evaluations, published: Path, fleet: Fleet
) -> None:
    # Folders are looked for below the one that the worker was started in.
    for name in ("fine", "mute"):
        shutil.copytree(published, fleet.folder / "published" / name)
    (fleet.folder / "published" / "mute" / "tokenizer.json").unlink()
    run = evaluations.start(models=["./gone", "published/*", "nothing/*"], tasks=["copa"], limit=8)
    state = evaluations.ended(run)
    assert (state.type, state.name) == (StateType.FAILED, "Failed")
    told = str(state.message).split("; ")
    assert told[0] == "no model is called 'nothing/*'"
    assert told[1] == "./gone: there is no model in ./gone: it has no config.json"
    assert told[2].startswith("published/mute: model 'published/mute' has no tokenizer")
    assert told[3].startswith("published/fine: 1 task")
    assert [record.config["model"] for record in evaluations.made("report")] == ["published/fine"]
