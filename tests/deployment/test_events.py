"""What befalls a run on a worker: whatever it is, the published weights are bitwise those of an undisturbed run."""

import signal
import time

import pytest

from tests.deployment.conftest import Fleet, Server, wait_for
from tests.flows.processes import descendants, kill

LONG = (
    "stages.base.training.steps=1500",
    "stages.base.checkpoints.every_seconds=0.5",
    "stages.base.checkpoints.keep_last=2",
)
"""Training that lasts long enough to be disturbed."""


@pytest.fixture(scope="session")
def undisturbed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of what the recipe publishes where nothing happens, made without a worker."""
    fleet = Fleet(server, tmp_path_factory.mktemp("undisturbed"))
    fleet.finish(fleet.run("worker=local", *LONG))
    return fleet.published()


def test_the_stage_process_is_killed(fleet: Fleet, undisturbed: str) -> None:
    worker = fleet.worker()
    run = fleet.run(*LONG)
    fleet.training()
    kill(fleet.stage_process(worker))
    killed = time.monotonic()
    wait_for(lambda: len(fleet.runs("base")) == 2 and fleet.runs("base")[1].state_name == "Running")
    print(f"on a worker again after {time.monotonic() - killed:.1f} s")
    fleet.finish(run)
    first, second = fleet.runs("base")
    assert (first.state_name, second.state_name) == ("Failed", "Completed")
    assert "killed by signal 9" in (first.state.message or "")  # type: ignore[union-attr]
    assert fleet.published() == undisturbed


def test_the_worker_is_killed_with_its_children(fleet: Fleet, undisturbed: str) -> None:
    worker = fleet.worker()
    run = fleet.run(*LONG)
    fleet.training()
    kill(worker.pid, *descendants(worker.pid))
    killed = time.monotonic()
    fleet.worker(name="two")
    wait_for(lambda: fleet.runs("base")[0].state_name == "Crashed", 150)
    print(f"seen as crashed after {time.monotonic() - killed:.1f} s")
    fleet.finish(run)
    assert [one.state_name for one in fleet.runs("base")] == ["Crashed", "Completed"]
    assert fleet.published() == undisturbed


def test_the_pipeline_is_killed(fleet: Fleet, undisturbed: str) -> None:
    fleet.worker()
    run = fleet.run(*LONG)
    fleet.training()
    kill(run.pid, *descendants(run.pid))
    fleet.finish(fleet.run(*LONG, log="again.log"), log="again.log")
    assert [one.state_name for one in fleet.runs("base")] == ["Completed"]
    assert fleet.published() == undisturbed


def test_the_worker_is_stopped(fleet: Fleet, undisturbed: str) -> None:
    worker = fleet.worker()
    # Going on elsewhere is no failure, so no retry is needed for it.
    run = fleet.run(*LONG, "stages.base.retries=0")
    fleet.training()
    worker.terminate()
    assert worker.wait(60) == 0
    stopped = fleet.runs("base")[0]
    assert stopped.state_name == "Stopped"
    fleet.worker(name="two")
    fleet.finish(run)
    assert [one.state_name for one in fleet.runs("base")] == ["Stopped", "Completed"]
    assert fleet.published() == undisturbed


def test_the_pipeline_is_stopped(fleet: Fleet, undisturbed: str) -> None:
    fleet.worker()
    run = fleet.run(*LONG)
    fleet.training()
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130, fleet.text()
    assert [one.state_name for one in fleet.runs("base")] == ["Cancelled"]
    fleet.finish(fleet.run(*LONG, log="again.log"), log="again.log")
    assert [one.state_name for one in fleet.runs("base")] == ["Cancelled", "Completed"]
    assert fleet.published() == undisturbed


def test_two_pipelines_share_one_run(fleet: Fleet, undisturbed: str) -> None:
    fleet.worker()
    one, other = fleet.run(*LONG, log="one.log"), fleet.run(*LONG, log="other.log")
    fleet.finish(one, log="one.log")
    fleet.finish(other, log="other.log")
    assert [one.state_name for one in fleet.runs("base")] == ["Completed"]
    assert fleet.published() == undisturbed
