"""A fleet on PostgreSQL: three workers, several pipelines at a time, the automations at work."""

from collections.abc import Iterator

import pytest
from prefect.client.schemas.filters import FlowRunFilter

from tests.deployment.conftest import Fleet, Server, deploy_to, wait_for
from tests.deployment.postgres import postgres
from tests.flows.processes import descendants, kill

PIPELINES = 3


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that keeps what it knows in PostgreSQL."""
    with postgres() as url:
        server = Server(tmp_path_factory.mktemp("shared"), PREFECT_SERVER_DATABASE_CONNECTION_URL=url)
        server.start()
        deploy_to(server)
        yield server
        server.kill()


@pytest.fixture
def fleet(shared: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(shared, tmp_path_factory.mktemp("fleet"))
    yield fleet
    fleet.close()


def test_pipelines_and_workers_at_once_while_one_worker_dies(fleet: Fleet, shared: Server) -> None:
    fleet.prefect("work-pool", "update", "cpu", "--concurrency-limit", "3")
    workers = {}
    for name in ("one", "two", "three"):
        # Three machines, each with devices of its own.
        workers[name] = fleet.worker(name=name, CAIRN_LOCKS=str(fleet.folder / f"locks-{name}"))
    runs = {
        f"{seed}.log": fleet.run(f"stages.base.training.seed={seed}", log=f"{seed}.log") for seed in range(PIPELINES)
    }
    wait_for(lambda: sum(run.start_time is not None for run in fleet.runs()) == PIPELINES, what="all to train")
    kill(workers["one"].pid, *descendants(workers["one"].pid))
    for log, run in runs.items():
        fleet.finish(run, log)
    assert sorted(map(str, fleet.states())) == ["Completed", "Completed", "Completed", "Crashed"]
    with fleet.client() as client:
        crashed = client.read_flow_runs(
            flow_run_filter=FlowRunFilter.model_validate({"state": {"name": {"any_": ["Crashed"]}}})
        )
    assert ["no heartbeat" in str(run.state) for run in crashed] == [True]
    assert "database is locked" not in (shared.home / "server.log").read_text()
