"""A real PostgreSQL server from the system's packages, for one session of tests."""

import getpass
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.deployment.conftest import free_port


def _programs() -> Path:
    """The folder with PostgreSQL's programs; skips where there is none of version 15 or later."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found or int(found[-1].parts[-3]) < 15:
        pytest.skip("there is no PostgreSQL 15 or later on this system: apt-get install postgresql")
    return found[-1].parent


@contextmanager
def postgres() -> Iterator[str]:
    """A server with an empty database `prefect`; gives its URL as Prefect has it."""
    programs = _programs()
    # It refuses to run as root, and then has a folder of its own user's.
    user = "postgres" if os.getuid() == 0 else getpass.getuser()
    folder = Path(tempfile.mkdtemp(prefix="cairn-postgres-"))
    shutil.chown(folder, user)
    port = free_port()

    def run(program: str, *arguments: str) -> None:
        command = [str(programs / program), *arguments]
        subprocess.run(command, user=user if os.getuid() == 0 else None, cwd=folder, check=True, capture_output=True)

    try:
        run("initdb", "--pgdata", str(folder / "data"), "--auth", "trust", "--username", "prefect", "--no-sync")
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        run("pg_ctl", "start", "--wait", "--pgdata", str(folder / "data"), "-o", options, "-l", str(folder / "log"))
        try:
            run("createdb", "--host", "127.0.0.1", "--port", str(port), "--username", "prefect", "prefect")
            yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect"
        finally:
            run("pg_ctl", "stop", "--pgdata", str(folder / "data"), "--mode", "immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
