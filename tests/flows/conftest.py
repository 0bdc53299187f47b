"""What tests of whole runs share: one Prefect server, `cairn` as a process of its own, and a store that it made."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from artifacts.identity import content_digest, describe_files
from flows.recipe import load_recipe
from tests.artifacts.conftest import s3_address, s3_url
from tests.flows.processes import descendants, kill

__all__ = ["s3_address", "s3_url"]

ROOT = Path(__file__).parents[2]
RECIPE = "arithmetic-tiny"
ENTRIES = load_recipe(RECIPE).stages
STAGES = [entry.name for entry in ENTRIES]
DATA = {"expressions", "questions", "tokenizer", "tokens", "answers"}
"""The stages that make what the recipe trains on."""


def after(*stages: str) -> list[str]:
    """The stages that read what some make, or what those make that do, in their order."""
    found = set(stages)
    for entry in ENTRIES:
        if found & set(entry.inputs.values()):
            found.add(entry.name)
    return [stage for stage in STAGES if stage in found - set(stages)]


@pytest.fixture(scope="session")
def prefect_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server that all runs of the session share, as a user's would be; it takes long to start."""
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_HOME,
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
        temporary_settings,
    )

    from flows.server import prefect_server

    # Prefect's own 20 seconds are too few on a busy machine.
    settings = {
        PREFECT_HOME: tmp_path_factory.mktemp("prefect"),
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 120,
    }
    with temporary_settings(settings, restore_defaults={PREFECT_API_URL}), prefect_server():
        yield PREFECT_API_URL.value()


def cairn_process(folder: Path, arguments: tuple[str, ...], environment: dict[str, str]) -> "subprocess.Popen[str]":
    """Starts `cairn` in a folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PREFECT_HOME": str(folder / "prefect"),
            # Wide enough that no path is broken over two lines.
            "COLUMNS": "250",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


Start = Callable[..., "subprocess.Popen[str]"]
Cairn = Callable[..., tuple[int, str]]


@pytest.fixture
def start_cairn(prefect_url: str, tmp_path: Path) -> Iterator[Start]:
    """Starts `cairn` with some arguments in a folder of its own; what is left of it is killed after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
        process = cairn_process(tmp_path, arguments, {"PREFECT_API_URL": prefect_url, **environment})
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            kill(process.pid, *descendants(process.pid))
        with process:
            """Closes its pipe and waits for it."""


@pytest.fixture
def cairn(start_cairn: Start) -> Cairn:
    """Runs `cairn` to its end; gives the exit code and all that it printed."""

    def run(*arguments: str, **environment: str) -> tuple[int, str]:
        process = start_cairn(*arguments, **environment)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    return run


class Made(NamedTuple):
    """What an undisturbed run of the recipe has left."""

    folder: Path
    """Where it was run."""
    store: Path
    output: str
    """What it printed."""
    digest: str
    """Of the published folder."""


def published(folder: Path, recipe: str = RECIPE) -> str:
    """The digest of what a recipe published in a folder."""
    return content_digest(describe_files(folder / "published" / recipe))


@pytest.fixture(scope="session")
def made(prefect_url: str, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A whole run, made once; nobody writes to its folder."""
    folder = tmp_path_factory.mktemp("made")
    places = {"CAIRN_STORE": str(folder / "store"), "CAIRN_CACHE": str(folder / "cache")}
    process = cairn_process(folder, ("run", RECIPE), {"PREFECT_API_URL": prefect_url, **places})
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return Made(folder, folder / "store", output, published(folder))


@pytest.fixture
def own_store(made: Made, tmp_path: Path) -> Path:
    """The store of that run as a copy of the test's own, at CAIRN_STORE."""
    return Path(shutil.copytree(made.store, tmp_path / "store"))


def assert_one_line(output: str, *parts: str) -> None:
    """Whether an error was told in one line that holds all of `parts`, and without a traceback."""
    assert "Traceback" not in output
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, output
    for part in parts:
        assert part in lines[0]


def spoil(path: Path) -> None:
    """Turns over one bit in the middle of a file, whose size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
