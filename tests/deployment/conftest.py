"""What tests of a fleet share: a real Prefect server, real workers, and pipelines that they work for."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, WorkerStatus
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import PREFECT_API_URL, temporary_settings

from artifacts.identity import content_digest, describe_files
from artifacts.store import Store
from tests.flows.processes import checkpoints, descendants, kill, runs_module

ROOT = Path(__file__).parents[2]
RECIPE = "arithmetic-tiny"
LONG = ("stages.base.training.steps=1500", "stages.base.checkpoints.every_seconds=0.5")
Process = subprocess.Popen[bytes]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks all tests of this folder, before others choose by marks."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("deployment")


def wait_for(found: Callable[[], Any], seconds: float = 120.0, what: str = "") -> Any:
    """The first result that is not false; fails where there is none in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if result := found():
            return result
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds:.0f} s: {what or found}")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


class Server:
    """A Prefect server that can be killed and started again with what it knew."""

    def __init__(self, home: Path, **settings: str) -> None:
        self.home, self.port, self._settings = home, free_port(), settings
        self.url = f"http://127.0.0.1:{self.port}/api"
        self._process: Process | None = None

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(self.home), **self._settings}
        with (self.home / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "flows.cli", "server", "--port", str(self.port)],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_for(self._answers, what=f"the server's answer; see {self.home}")

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health").is_success
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """SIGKILL to all of it."""
        if self._process is not None:
            kill(self._process.pid, *descendants(self._process.pid))
            self._process.wait()


class Fleet:
    """Workers and pipelines of one test, with a server that others use too and a store of their own."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PREFECT_API_URL": server.url,
            "PREFECT_HOME": str(folder / "prefect"),
            "CAIRN_STORE": str(folder / "store"),
            "CAIRN_CACHE": str(folder / "cache"),
            "CAIRN_LOCKS": str(folder / "locks"),
            "COLUMNS": "250",
            "OMP_NUM_THREADS": "1",
        }
        self.started: list[Process] = []

    def cairn(self, log: str, *arguments: str, **environment: str) -> Process:
        """Starts `cairn`, whose output goes to a file of the folder."""
        with (self.folder / log).open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "flows.cli", *arguments],
                cwd=self.folder,
                env={**self.environment, **environment},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def worker(self, pool: str = "cpu", name: str = "one", **environment: str) -> Process:
        """Starts a worker, and waits until the server knows it."""
        process = self.cairn(f"worker-{name}.log", "worker", pool, "--name", name, **environment)

        def is_online() -> bool:
            assert process.poll() is None, self.text(f"worker-{name}.log")
            with self.client() as client:
                workers = client.read_workers_for_work_pool(pool)
            return any(worker.name == name and worker.status == WorkerStatus.ONLINE for worker in workers)

        wait_for(is_online, what=f"worker {name}")
        return process

    def run(self, *overrides: str, log: str = "run.log", **environment: str) -> Process:
        """Starts a pipeline, whose stage `base` trains on a worker, and long enough to be disturbed."""
        sets = [part for override in (*LONG, "stages.base.worker=cpu", *overrides) for part in ("--set", override)]
        return self.cairn(log, "run", RECIPE, *sets, **environment)

    def text(self, log: str = "run.log") -> str:
        return (self.folder / log).read_text()

    def pipeline_states(self) -> list[str]:
        """The names of the states that the pipeline has been in which made the expressions."""
        store = Store.open(self.environment["CAIRN_STORE"])
        run = store.resolve(f"models/{RECIPE}@expressions").flow_run_id
        assert run is not None
        with self.client() as client:
            return [str(state.name) for state in client.read_flow_run_states(UUID(run))]

    def stage_log(self) -> str:
        """What stage `base` has logged, over all of its attempts."""
        store = Store.open(self.environment["CAIRN_STORE"])
        return store.attachment(store.resolve(f"models/{RECIPE}@base").key, "stage.log").decode()

    def finish(self, process: Process, log: str = "run.log", seconds: float = 300.0) -> str:
        """Waits for a pipeline to succeed; gives what it printed."""
        code = process.wait(seconds)
        assert code == 0, self.text(log)
        return self.text(log)

    def published(self) -> str:
        """The digest of what the pipelines published."""
        return content_digest(describe_files(self.folder / "published" / RECIPE))

    @contextmanager
    def client(self) -> Iterator[SyncPrefectClient]:
        with temporary_settings({PREFECT_API_URL: self.server.url}), get_client(sync_client=True) as client:
            yield client

    def runs(self) -> list[FlowRun]:
        """The runs of stage `base` of this test's pipelines, in the order of their attempts."""
        name = FlowRunFilter.model_validate({"name": {"like_": "base on "}})
        found: list[FlowRun] = []
        with self.client() as client:
            # The server gives 200 at a time.
            while page := client.read_flow_runs(
                flow_run_filter=name, sort=FlowRunSort.START_TIME_ASC, limit=200, offset=len(found)
            ):
                found += page
        return [run for run in found if run.parameters["work"]["store"] == self.environment["CAIRN_STORE"]]

    def states(self) -> list[str | None]:
        """The names of their states."""
        return [run.state_name for run in self.runs()]

    def cancel_stage(self) -> None:
        """Cancels the last run of stage `base`, as a user does."""
        self.prefect("flow-run", "cancel", str(self.runs()[-1].id))

    def prefect(self, *arguments: str) -> None:
        """Gives a command of Prefect's."""
        command = [sys.executable, "-m", "prefect", *arguments]
        subprocess.run(command, env=self.environment, check=True, capture_output=True)

    def training(self) -> None:
        """Waits until stage `base` has written a checkpoint."""
        wait_for(lambda: checkpoints(self.folder / "store"), what="a checkpoint")

    def stage_process(self, worker: Process) -> int:
        """The process in which a worker's stage trains."""

        def found() -> int | None:
            return next((pid for pid in descendants(worker.pid) if runs_module(pid, "tasks.child")), None)

        pid: int = wait_for(found, what="a stage's process")
        return pid

    def close(self) -> None:
        """Ends what is left of it, on the server too, where a run that nobody does would keep its pool's slot."""
        for process in self.started:
            if process.poll() is None:
                kill(process.pid, *descendants(process.pid))
            process.wait()
        with self.client() as client:
            for run in client.read_flow_runs():
                if run.state is None or not run.state.is_final():
                    client.delete_flow_run(run.id)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with Cairn's pools, automations and deployments."""
    # A minute is how often it looks at schedules otherwise.
    server = Server(tmp_path_factory.mktemp("server"), PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS="2")
    server.start()
    deploy_to(server)
    yield server
    server.kill()


def deploy_to(server: Server, **environment: str) -> None:
    """Tells a server of Cairn."""
    places = {"PYTHONPATH": str(ROOT), "PREFECT_API_URL": server.url, "PREFECT_HOME": str(server.home / "client")}
    command = [sys.executable, "-m", "flows.cli", "deploy"]
    subprocess.run(command, env={**os.environ, **places, **environment}, check=True)


@pytest.fixture(scope="session")
def undisturbed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of what a pipeline publishes that nothing befalls, all of it on this machine."""
    fleet = Fleet(server, tmp_path_factory.mktemp("undisturbed"))
    fleet.finish(fleet.run("stages.base.worker=local"))
    return fleet.published()


@pytest.fixture
def fleet(server: Server, tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(server, tmp_path)
    yield fleet
    fleet.close()
