"""The Prefect server of a run: the one that the user configured, or a temporary one."""

import fcntl
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import State
from prefect.events.worker import EventsWorker
from prefect.exceptions import PrefectHTTPStatusError
from prefect.logging.handlers import APILogWorker
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_HOME,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    temporary_settings,
)

from common.errors import UserError

STOP_SECONDS = 8.0
LOG_BYTES = 1 << 20
DRAIN_SECONDS = 2.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SERVER_SETTINGS = {
    # Nothing calls out: neither the server nor, with `flows.serving`, a page of its UI.
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_V2_ENABLED": "false",
    "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
    # Else pages ask for the API at this machine's port 4200, whatever they were loaded from.
    "PREFECT_SERVER_UI_API_URL": "/api",
    # Several clients may share the database, and SQLite lets one write at a time.
    "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
}
"""What a server is started with; variables that a user has set go before."""


@contextmanager
def prefect_server() -> Iterator[None]:
    """Within the block, Prefect has a server. Raises UserError where the configured one does not answer, or the
    temporary one does not start."""
    if url := PREFECT_API_URL.value():
        check_answers(url)
        yield
        return
    with _temporary_server() as port:
        settings = {
            PREFECT_API_URL: f"http://127.0.0.1:{port}/api",
            # Nothing watches heartbeats here, and their thread holds up the end of every flow for a second.
            PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
        }
        with temporary_settings(settings):
            yield


def check_answers(url: str) -> None:
    """Raises UserError where no Prefect server answers at a URL, or none that takes the password."""
    with get_client(sync_client=True) as client:
        error = client.api_healthcheck()
        try:
            # Anybody may ask for its health.
            if error is None:
                client.api_version()
        except PrefectHTTPStatusError as refused:
            raise UserError(
                f"the Prefect server at {url} refuses this machine ({refused.response.status_code}): set "
                f"PREFECT_API_AUTH_STRING to its password"
            ) from refused
    if error is not None:
        raise UserError(
            f"no Prefect server answers at {url} ({error}): start it, or unset PREFECT_API_URL, and the run has one "
            f"of its own"
        )


def serve(host: str, port: int) -> None:
    """Becomes Prefect's server on an address. Raises UserError for one that others reach, without a password."""
    if host not in LOOPBACK and not os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
        raise UserError(
            f"a server on {host} is open to all who reach this machine: set PREFECT_SERVER_API_AUTH_STRING to "
            f"user:password for it, and PREFECT_API_AUTH_STRING to the same for workers and pipelines"
        )
    own = {
        # Prefect lets pages of any other site use the API; those of its UI come from here.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port}",
        # It copies its UI before it serves it, and may not write where it is installed.
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(Path(PREFECT_HOME.value()) / "ui"),
    }
    environment = {**SERVER_SETTINGS, **own, **os.environ}
    command = [sys.executable, "-P", "-m", "flows.serving", "server", "start", "--host", host, "--port", str(port)]
    os.execve(sys.executable, command, environment)


@contextmanager
def _temporary_server() -> Iterator[int]:
    home = Path(PREFECT_HOME.value())
    log_path = home / "temporary-server.log"
    try:
        home.mkdir(parents=True, exist_ok=True)
        # Another run's server may be writing to it, so it is begun anew only when it has grown.
        grown = log_path.exists() and log_path.stat().st_size > LOG_BYTES
        log_file = log_path.open("wb" if grown else "ab")
    except OSError as error:
        raise UserError(
            f"Prefect's folder {home} cannot be written ({error}); give PREFECT_HOME another place"
        ) from error
    with log_file as log:
        # Two servers that start at once on a new database would both create its tables.
        with (home / "temporary-server.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "flows.temporary_server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(),
                # A Ctrl-C is for the run, which still needs the server to say how it ended.
                start_new_session=True,
            )
            port = _read_port(process)
        try:
            if port is None:
                raise UserError(f"Prefect's temporary server did not start; {log_path} says why")
            yield port
        finally:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _environment() -> dict[str, str]:
    defaults = {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_UI_ENABLED": "false",
        # Several runs may share the database, and SQLite lets one write at a time.
        "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
    }
    fixed = {
        # What Prefect sets for its own temporary server: no scheduler and no other service that one run has no use for.
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
    }
    return {**defaults, **os.environ, **fixed}


def _read_port(process: "subprocess.Popen[bytes]") -> int | None:
    assert process.stdout is not None
    timeout = PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
    ready, _, _ = select.select([process.stdout], [], [], timeout)
    line = process.stdout.readline().strip() if ready else b""
    return int(line) if line.isdigit() else None


def wait_until_stored(state: State[Any]) -> None:
    """Sends what is queued and waits until the server has stored how the tasks of a flow run ended.

    A server that is stopped before drops the last of them, and they would stay Running for ever.
    """
    APILogWorker.drain_all(timeout=DRAIN_SECONDS)
    EventsWorker.drain_all(timeout=DRAIN_SECONDS)
    run = FlowRunFilter.model_validate({"id": {"any_": [state.state_details.flow_run_id]}})
    unfinished = TaskRunFilter.model_validate({"state": {"type": {"any_": ["PENDING", "RUNNING", "SCHEDULED"]}}})
    until = time.monotonic() + DRAIN_SECONDS
    # How a run is listed afterwards must not decide whether it succeeded.
    with suppress(Exception), get_client(sync_client=True) as client:
        while time.monotonic() < until and client.read_task_runs(
            flow_run_filter=run, task_run_filter=unfinished, limit=1
        ):
            time.sleep(0.05)
