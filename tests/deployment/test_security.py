"""Who may ask the server, and what must never be written down."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.deployment.conftest import ROOT, Fleet, Server, deploy_to

SECRETS = {
    "PREFECT_API_AUTH_STRING": "cairn:planted-password-5f1c",
    "HF_TOKEN": "hf_planted-token-77aa",
    "AWS_SECRET_ACCESS_KEY": "planted-key-93be",
    "WANDB_API_KEY": "planted-wandb-01d4",
}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a password."""
    server = Server(
        tmp_path_factory.mktemp("guarded"), PREFECT_SERVER_API_AUTH_STRING=SECRETS["PREFECT_API_AUTH_STRING"]
    )
    server.start()
    deploy_to(server, **SECRETS)
    yield server
    server.kill()


def test_only_who_has_the_password_is_answered(guarded: Server) -> None:
    assert httpx.get(f"{guarded.url}/admin/version").status_code == 401
    name, _, password = SECRETS["PREFECT_API_AUTH_STRING"].partition(":")
    assert httpx.get(f"{guarded.url}/admin/version", auth=(name, password)).is_success


def test_pages_of_other_sites_may_not_use_the_server(server: Server) -> None:
    origin = {"Origin": "https://elsewhere.example"}
    token = httpx.get(f"{server.url}/csrf-token?client=a-page", headers=origin)
    assert "access-control-allow-origin" not in token.headers
    asked = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "prefect-csrf-token"}
    assert not httpx.options(f"{server.url}/flow_runs/filter", headers=asked).is_success
    assert httpx.post(f"{server.url}/flows/", json={"name": "planted"}, headers=origin).status_code == 403


@pytest.mark.parametrize("password", ["", "cairn:wrong"])
@pytest.mark.parametrize("command", [("deploy",), ("worker", "cpu"), ("run", "arithmetic-tiny")])
def test_a_wrong_password_is_a_line(guarded: Server, tmp_path: Path, command: tuple[str, ...], password: str) -> None:
    fleet = Fleet(guarded, tmp_path)
    process = fleet.cairn("it.log", *command, PREFECT_API_AUTH_STRING=password)
    assert process.wait(60) == 1
    assert "refuses this machine (401): set PREFECT_API_AUTH_STRING" in fleet.text("it.log")
    assert "Traceback" not in fleet.text("it.log")


def test_planted_secrets_are_written_nowhere(guarded: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", SECRETS["PREFECT_API_AUTH_STRING"])
    fleet = Fleet(guarded, tmp_path)
    fleet.environment |= SECRETS
    try:
        fleet.worker()
        fleet.finish(fleet.run("worker=cpu"))
    finally:
        fleet.close()
    files = [path for folder in (tmp_path, guarded.home) for path in folder.rglob("*") if path.is_file()]
    # The server's database is among them, with every parameter, log line and event.
    assert any(path.suffix == ".db" for path in files)
    for path in files:
        data = path.read_bytes()
        for name, secret in SECRETS.items():
            assert secret.encode() not in data, f"{name} is in {path}"


def test_a_server_for_others_needs_a_password(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flows.cli", "server", "--host", "0.0.0.0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path), "COLUMNS": "250"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "is open to all who reach this machine: set PREFECT_SERVER_API_AUTH_STRING" in done.stderr
    assert "Traceback" not in done.stderr
