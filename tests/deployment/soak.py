"""Many flow runs through three workers against PostgreSQL: none lost, none run twice.

    python -m tests.deployment.soak --runs 200

Every run is a stage of a recipe with nothing else in it, a tokenizer of its own characters, dispatched as a pipeline
does. At the end each has one flow run, which ran once, and one record.
"""

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prefect.settings import PREFECT_API_URL, temporary_settings

from artifacts.store import Store
from tasks.remote import run_on_worker
from tests.benchmarks.dispatch import tokenizer_work
from tests.deployment.conftest import Fleet, Server, deploy_to
from tests.deployment.postgres import postgres

WORKERS = 3
AT_A_TIME = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, postgres() as database:
        home = Path(folder, "server")
        home.mkdir()
        server = Server(home, PREFECT_SERVER_DATABASE_CONNECTION_URL=database)
        fleet = Fleet(server, Path(folder))
        server.start()
        try:
            deploy_to(server)
            fleet.prefect("work-pool", "update", "cpu", "--concurrency-limit", str(WORKERS))
            for number in range(WORKERS):
                fleet.worker(name=f"worker-{number}")
            check(fleet, given.runs)
        finally:
            fleet.close()
            server.kill()


def check(fleet: Fleet, runs: int) -> None:
    """Dispatches so many stages, and looks at what became of each."""
    started = time.monotonic()

    def one(number: int) -> str:
        with temporary_settings({PREFECT_API_URL: fleet.server.url}):
            work = tokenizer_work(fleet.environment["CAIRN_STORE"], number)
            return run_on_worker(work, lambda event: None, lambda: False, lambda: False).record.key

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        keys = list(pool.map(one, range(runs)))
    seconds = time.monotonic() - started
    assert len(set(keys)) == runs
    records = {record.key for record in Store.open(fleet.environment["CAIRN_STORE"]).records()}
    assert records == set(keys), "a record is missing, or there is one too many"
    found = fleet.runs()
    assert len(found) == runs, f"{len(found)} flow runs for {runs} stages"
    assert {(run.state_name, run.run_count) for run in found} == {("Completed", 1)}
    for log in fleet.folder.rglob("*.log"):
        assert b"database is locked" not in log.read_bytes(), log
    print(f"{runs} runs through {WORKERS} workers in {seconds:.0f} s, {runs / seconds:.2f} a second: all once")


if __name__ == "__main__":
    main()
