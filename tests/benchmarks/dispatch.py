"""How long it takes from the dispatch of a stage to its first line on a worker of this machine, and whose time that is.

    python -m tests.benchmarks.dispatch --runs 10

A real server with SQLite and one worker of pool `cpu`; the stage makes a tokenizer of characters, which needs no
engine. Prefect's share is until its flow function is called: polling, and starting a Python with Prefect in it. The
rest is importing Cairn, looking at the store and taking the lease.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.remote import run_on_worker
from tasks.stage import Runtime
from tasks.tokenizer import Config
from tasks.work import Work
from tests.deployment.conftest import Fleet, Server, deploy_to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder, "server")
        home.mkdir()
        server = Server(home)
        server.start()
        fleet = Fleet(server, Path(folder))
        try:
            deploy_to(server)
            fleet.worker()
            with temporary_settings({PREFECT_API_URL: server.url}):
                found = np.array([measure(fleet, number) for number in range(given.runs)])
        finally:
            fleet.close()
            server.kill()
    for name, column in zip(("to the first line", "of these Prefect's"), found.T, strict=True):
        print(f"{name}: median {np.median(column):.2f} s, {column.min():.2f} to {column.max():.2f} s")


def measure(fleet: Fleet, number: int) -> tuple[float, float]:
    """Seconds from the dispatch to the stage's first line, and to the call of its flow."""
    work = tokenizer_work(fleet.environment["CAIRN_STORE"], number)
    time.sleep(1 + number * 0.37 % 2)  # nobody dispatches in step with a worker's polling
    dispatched = time.time()
    record = run_on_worker(work, lambda event: None, lambda: False, lambda: False).record
    run = fleet.runs()[-1]
    assert record.started is not None
    assert run.start_time is not None
    return record.started.timestamp() - dispatched, run.start_time.timestamp() - dispatched


def tokenizer_work(store: str, number: int) -> Work:
    """The work of a stage that takes next to no time, another one for each number."""
    characters = "0123456789" + chr(ord("一") + number)
    config = Config.model_validate({"vocabulary": {"kind": "characters", "characters": characters}})
    return Work(
        name="base",
        stage="tokenizer",
        config=config.model_dump(mode="json"),
        inputs={},
        runtime=Runtime(worker="cpu"),
        store=store,
    )


if __name__ == "__main__":
    main()
