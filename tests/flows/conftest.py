"""What tests of whole runs share: one Prefect server, and `cairn` as a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.flows.processes import descendants, kill

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def prefect_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server that all runs of the session share, as a user's would be; it takes long to start."""
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

    from flows.server import prefect_server

    home = tmp_path_factory.mktemp("prefect")
    with temporary_settings({PREFECT_HOME: home}, restore_defaults={PREFECT_API_URL}), prefect_server():
        yield PREFECT_API_URL.value()


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start_cairn(prefect_url: str, tmp_path: Path) -> Iterator[Start]:
    """Starts `cairn` with some arguments in a folder of its own; what is left of it is killed after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *arguments],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "PREFECT_API_URL": prefect_url,
                "PREFECT_HOME": str(tmp_path / "prefect"),
                # Wide enough that no path is broken over two lines.
                "COLUMNS": "250",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            kill(process.pid, *descendants(process.pid))
        with process:
            """Closes its pipe and waits for it."""


@pytest.fixture
def cairn(start_cairn: Start) -> Callable[..., tuple[int, str]]:
    """Runs `cairn` to its end; gives the exit code and all that it printed."""

    def run(*arguments: str, **environment: str) -> tuple[int, str]:
        process = start_cairn(*arguments, **environment)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    return run
