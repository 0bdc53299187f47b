"""The files of deployment/: what reads them accepts them, and they agree with each other and with the code."""

import importlib
import json
import os
import plistlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from configparser import RawConfigParser
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
import yaml
from docker.utils import exclude_paths
from dockerfile_parse import DockerfileParser
from prefect import Flow
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.events.schemas.automations import AutomationCore, EventTrigger
from prefect.exceptions import ParameterTypeError
from prefect.settings import Settings
from prefect_kubernetes.settings import KubernetesSettings
from pydantic import ValidationError

from flows import worker
from flows.cli import app
from flows.deploy import DEPLOYMENTS, POOLS, automations
from flows.evaluation import REGRESSED, evaluation
from flows.launch import launch
from flows.server import SERVER_SETTINGS
from models.machine import Hardware
from tasks.registry import STAGES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deployment"
COMPOSE = FOLDER / "compose.yaml"
WORKERS = FOLDER / "kubernetes" / "workers.yaml"
UNITS = ("cairn-worker@.service", "cairn-server.service")


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return loaded


def code_packages() -> list[str]:
    """The packages that Cairn's code is in."""
    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    return [pattern.removesuffix("*") for pattern in find["include"] if pattern.endswith("*")]


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(WORKERS.read_text()))


def unit(name: str) -> RawConfigParser:
    parser = RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string((FOLDER / "systemd" / name).read_text())
    return parser


# compose.yaml


def complaints_of_schema(path: Path) -> str:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_compose_has_the_form_of_the_specification(tmp_path: Path) -> None:
    assert complaints_of_schema(COMPOSE) == ""
    spoilt = compose()
    spoilt["services"]["cpu"]["stop_grace_periods"] = "6m"
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(spoilt))
    assert "stop_grace_periods" in complaints_of_schema(tmp_path / "compose.yaml")


def test_docker_compose_reads_it_and_wants_passwords(tmp_path: Path) -> None:
    found = [command for command in (["docker", "compose"], ["docker-compose"]) if shutil.which(command[0])]
    command = next(
        (one for one in found if subprocess.run([*one, "version"], capture_output=True).returncode == 0), None
    )
    if command is None:
        pytest.skip("needs Docker Compose")
    (tmp_path / "deployment").mkdir()
    file = shutil.copy(COMPOSE, tmp_path / "deployment")
    config = [*command, "--file", str(file), "--profile", "*", "config"]
    bare = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    refused = subprocess.run(config, capture_output=True, text=True, env=bare)
    assert refused.returncode
    assert "POSTGRES_PASSWORD is missing a value" in refused.stderr
    (tmp_path / "deployment" / ".env").write_text(
        "PREFECT_API_AUTH_STRING=a:b\nPOSTGRES_PASSWORD=c\nCAIRN_LISTEN=\nAWS_ENDPOINT_URL=http://192.168.1.10:9000\n"
    )
    done = subprocess.run(config, capture_output=True, text=True, env=bare, check=True)
    services = yaml.safe_load(done.stdout)["services"]
    assert set(services) == set(compose()["services"])
    assert services["cuda"]["environment"]["AWS_ENDPOINT_URL"] == "http://192.168.1.10:9000"
    assert services["server"]["ports"][0]["host_ip"] == "127.0.0.1"


def test_compose_keeps_what_it_promises() -> None:
    services, volumes = compose()["services"], compose()["volumes"]
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= set(services), name
        assert {volume.partition(":")[0] for volume in service.get("volumes", [])} <= set(volumes), name
        # An init of Docker's would be the process that inherits what workers wait for.
        assert not service.get("init"), name
        assert all(port.startswith("${CAIRN_LISTEN:-127.0.0.1}:") for port in service.get("ports", [])), name
        assert ":latest" not in service["image"], name
        assert ":" in service["image"], name
    assert int(services["postgres"]["image"].partition(":")[2].split(".")[0]) >= 15
    assert all("healthcheck" in services[name] for name in ("postgres", "server", "minio"))
    workers = {name: service for name, service in services.items() if service.get("command", [])[1:2] == ["worker"]}
    assert set(workers) == {"pipeline", "cpu", "cuda"} <= set(POOLS)
    for name, service in workers.items():
        assert service["command"] == ["cairn", "worker", name]
        assert int(service["stop_grace_period"].removesuffix("m")) * 60 > worker._GRACE_SECONDS
        assert service["environment"]["CAIRN_STORE"] == "${CAIRN_STORE:-/store}"
        assert service["depends_on"] == {"deploy": {"condition": "service_completed_successfully"}}
    assert {name for name, service in services.items() if "profiles" in service} == {"cuda", "minio"}
    device = services["cuda"]["deploy"]["resources"]["reservations"]["devices"][0]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_the_server_of_compose_is_closed_and_calls_nobody() -> None:
    server = compose()["services"]["server"]
    assert server["command"][:2] == ["cairn", "server"]
    settings = {**SERVER_SETTINGS, **server["environment"]}
    assert settings["PREFECT_SERVER_API_AUTH_STRING"].startswith("${PREFECT_API_AUTH_STRING:?")
    assert settings["PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED"] == "true"
    assert settings["PREFECT_SERVER_ANALYTICS_ENABLED"] == settings["PREFECT_SERVER_UI_V2_ENABLED"] == "false"
    assert (settings["DO_NOT_TRACK"], settings["PREFECT_SERVER_DATABASE_DRIVER"]) == ("1", "postgresql+asyncpg")


# Commands


def commands() -> Iterator[tuple[str, list[str]]]:
    """Where a command `cairn …` is written, and its arguments."""
    for name, service in compose()["services"].items():
        if service.get("command", [])[:1] == ["cairn"]:
            yield f"compose: {name}", service["command"][1:]
    for manifest in manifests():
        if manifest["kind"] == "Deployment":
            arguments = manifest["spec"]["template"]["spec"]["containers"][0]["args"]
            if arguments[0] == "cairn":
                yield manifest["metadata"]["name"], arguments[1:]
    for pool in POOLS:
        line = unit(UNITS[0])["Service"]["ExecStart"].replace("%i", pool)
        yield UNITS[0], line.split()[1:]
    yield UNITS[1], unit(UNITS[1])["Service"]["ExecStart"].replace("${CAIRN_LISTEN}", "127.0.0.1").split()[1:]
    for block in re.findall(r"^```\n(.*?)^```", (FOLDER / "README.md").read_text(), re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            if line.startswith("cairn "):
                yield f"README.md: {line}", line.split()[1:]


def parse(arguments: list[str]) -> None:
    """Raises what the command line's parser raises; runs nothing."""
    group: Any = typer.main.get_command(app)
    with group.make_context("cairn", arguments) as context:
        name, command, rest = group.resolve_command(context, arguments)
        command.make_context(name, rest, parent=context)


def test_every_command_is_one_that_cairn_has() -> None:
    found = dict(commands())
    assert len(found) >= 15
    for place, arguments in found.items():
        try:
            parse(list(arguments))
        except Exception as error:
            raise AssertionError(f"{place}: {error}") from error
    for wrong in (["worker", "gpu"], ["server", "--address", "0.0.0.0"], ["deployy"]):
        with pytest.raises(Exception, match=r"gpu|address|deployy"):
            parse(wrong)


# Pools and deployments


def test_prefect_reads_the_deployments_and_finds_their_flows() -> None:
    text = DEPLOYMENTS.read_text()
    read = PrefectYamlModel.model_validate(yaml.safe_load(text))
    found = [one.model_dump(exclude_unset=True) for one in read.deployments]
    assert found == yaml.safe_load(text)["deployments"], "Prefect leaves out keys that it does not know"
    assert {one["work_pool"]["name"] for one in found} == set(POOLS)
    assert {one["name"] for one in found} == {"cairn", *get_args(Hardware)}
    for one in found:
        module, _, name = one["entrypoint"].rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), name), Flow)
        assert one["work_pool"]["job_variables"]["command"] == "python -m flows.engine"
    with pytest.raises(ValidationError, match="job_variables"):
        PrefectYamlModel.model_validate(yaml.safe_load(text.replace("job_variables: *engine", "job_variables: [5]")))


# systemd and launchd


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_its_units(tmp_path: Path) -> None:
    def complaints(name: str, text: str) -> str:
        # Where nothing is installed in /opt/cairn, the program would be all that it complains about.
        (tmp_path / name).write_text(text.replace("/opt/cairn/.venv/bin/cairn", "/bin/true"))
        command = ["systemd-analyze", "verify", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout + done.stderr

    for name in UNITS:
        text = (FOLDER / "systemd" / name).read_text()
        instance = name.replace("@", "@cuda")
        assert complaints(instance, text) == ""
        assert "KillMod" in complaints(instance, text.replace("[Install]", "KillMod=mixed\n[Install]"))


def test_service_managers_leave_workers_time_for_checkpoints() -> None:
    service = unit(UNITS[0])["Service"]
    # A second SIGTERM, which every process of the unit would have by another mode, ends a stage at once.
    assert service["KillMode"] == "mixed"
    assert int(service["TimeoutStopSec"]) > worker._GRACE_SECONDS
    with (FOLDER / "launchd" / "dev.cairn.worker.plist").open("rb") as file:
        agent = plistlib.load(file)
    assert agent["ExitTimeOut"] > worker._GRACE_SECONDS
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    with pytest.raises(ValueError, match="unexpected key"):
        plistlib.loads((FOLDER / "launchd" / "dev.cairn.worker.plist").read_bytes().replace(b"<true/>", b""))


@pytest.mark.skipif(sys.platform == "darwin", reason="would start a worker")
def test_the_agents_command_starts_a_worker_with_its_environment(tmp_path: Path) -> None:
    with (FOLDER / "launchd" / "dev.cairn.worker.plist").open("rb") as file:
        command = plistlib.load(file)["ProgramArguments"]
    for folder in (".cairn", "Library/Logs", "cairn/.venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    program = tmp_path / "cairn" / ".venv" / "bin" / "cairn"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m flows.cli "$@"\n')
    program.chmod(0o755)
    (tmp_path / ".cairn" / "environment").write_text("PREFECT_API_URL=http://127.0.0.1:9/api\nCOLUMNS=200\n")
    done = subprocess.run(command, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    # It has read the environment: without, there would be no server to work for.
    assert "has nothing that pool 'apple' is for" in (tmp_path / "Library" / "Logs" / "cairn-worker.log").read_text()


# Images


def test_the_image_is_small_pinned_and_not_roots(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text((FOLDER / "Dockerfile").read_text())
    steps = [(one["instruction"], one["value"]) for one in DockerfileParser(str(tmp_path)).structure]
    stages = [value for instruction, value in steps if instruction == "FROM"]
    assert re.fullmatch(r"python:3\.\d+-slim-\w+ AS base", stages[0])
    assert stages[1:] == ["base AS cpu", "base AS cuda", "base AS tpu", "${HARDWARE} AS cairn"]
    installs = [value for instruction, value in steps if instruction == "RUN" and "pip install" in value]
    assert len(installs) == 5
    assert all("--constraint constraints.txt" in value for value in installs)
    packages = re.search(r"for package in ([\w ]+); do", " ".join(value for _, value in steps))
    assert packages
    assert packages[1].split() == code_packages()
    # The code comes last, after the layers with packages, and belongs to root.
    last = [(instruction, value) for instruction, value in steps[steps.index(("FROM", stages[-1])) :]]
    order = [instruction for instruction, _ in last if instruction != "COMMENT"]
    assert order == ["FROM", "COPY", "ARG", "ENV", "USER", "WORKDIR", "CMD"]
    assert dict(last)["USER"] == "1000:1000"
    # With no entry point in front of it, the process with the number 1 is the one that compose names.
    assert not any(instruction in ("ENTRYPOINT", "ADD") for instruction, _ in steps)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = [value.removeprefix("EXTRAS=").split(",") for _, value in steps if value.startswith("EXTRAS=")]
    assert len(wanted) == 3
    assert {name for names in wanted for name in names} <= set(extras)


def test_an_image_holds_the_code_and_no_secret(tmp_path: Path) -> None:
    modules = [f"{name}/{file}" for name in code_packages() for file in ("__init__.py", "part/__init__.py")]
    needed = [*modules, "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "deployment/prefect.yaml"]
    unwanted = ["deployment/.env", ".git/config", ".env", "store/records/a.json", ".venv/bin/python", "tests/a.py"]
    for name in [*needed, *unwanted, "flows/__pycache__/cli.cpython-311.pyc"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    held = {name for name in exclude_paths(str(tmp_path), patterns) if (tmp_path / name).is_file()}
    assert held - {"Dockerfile", ".dockerignore"} == set(needed)


# Names and secrets


def supported(schema: Any) -> Iterator[str]:
    """The variables that settings of Prefect's are read from."""
    if isinstance(schema, dict):
        yield from schema.get("supported_environment_variables", [])
        for value in schema.values():
            yield from supported(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from supported(value)


def test_every_variable_is_one_that_somebody_reads() -> None:
    sources = [
        path.read_text()
        for name in ("artifacts", "common", "flows", "models", "tasks")
        for path in (ROOT / name).rglob("*.py")
    ]
    known = {name for text in sources for name in re.findall(r"\bCAIRN_[A-Z_]+\b", text)}
    known |= set(supported(Settings.model_json_schema())) | set(supported(KubernetesSettings.model_json_schema()))
    known |= {"PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"}  # prefect/cli/flow_run.py reads it by itself
    # What compose.yaml puts into its own places, and the server's unit into its command.
    known |= {"CAIRN_LISTEN", "CAIRN_SERVER"}
    paths = [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix not in (".png", ".md")]
    named = {
        (path.name, name) for path in paths for name in re.findall(r"\b(?:CAIRN|PREFECT)_[A-Z_]+\b", path.read_text())
    }
    assert {name for _, name in named} > {"CAIRN_WORKER", "CAIRN_STORE", "PREFECT_API_URL"}
    assert [(file, name) for file, name in named if name not in known] == []
    assert "PREFECT_SERVER_DATABASE_DRIVER" in known
    assert not {"PREFECT_SERVER_DATABASE_DRIVERS", "CAIRN_STORES"} & known


SECRET = re.compile(
    r'\b(?P<name>[A-Z_]*(?:PASSWORD|SECRET|TOKEN|AUTH_STRING|ACCESS_KEY)[A-Z_]*)"?'
    r'[ \t]*[:=][ \t]*"?(?P<value>[^\s"},]+)'
)


def secrets(text: str) -> list[str]:
    """Values that are written after the names of secrets, and neither point at the environment nor end in `…`."""
    found = SECRET.finditer(re.sub(r"\$\{[^}]*\}", "…", text))
    return [f"{match['name']}={match['value']}" for match in found if not match["value"].endswith("…")]


def test_no_secret_is_written_anywhere() -> None:
    for path in FOLDER.rglob("*"):
        if path.is_file() and path.suffix != ".png" and path.name != ".env":
            assert secrets(path.read_text()) == [], path
    assert secrets("POSTGRES_PASSWORD: hunter2") == ["POSTGRES_PASSWORD=hunter2"]
    assert secrets('"AWS_SECRET_ACCESS_KEY": "abc"') == ["AWS_SECRET_ACCESS_KEY=abc"]
    assert secrets("PREFECT_API_AUTH_STRING=me:secret") == ["PREFECT_API_AUTH_STRING=me:secret"]


def test_the_guides_launches_have_parameters_that_the_pipeline_takes() -> None:
    text = (FOLDER / "README.md").read_text()
    launches = re.findall(r"prefect deployment run pipeline/cairn --param(s?) (?:'(.*)'|(\S+))", text)
    assert len(launches) >= 3
    for several, parameters, one in launches:
        name, _, value = one.partition("=")
        given = json.loads(parameters) if several else {name: value}
        launch.validate_parameters(given)
        assert set(given.get("workers", {})) <= set(STAGES)
    with pytest.raises(ParameterTypeError, match="workers"):
        launch.validate_parameters({"recipe": "arithmetic", "workers": {"pretrain": "gpu"}})


def test_the_guides_evaluation_and_automation_are_what_prefect_takes() -> None:
    text = (FOLDER / "README.md").read_text()
    (parameters,) = re.findall(r"prefect deployment run evaluation/cairn --params '(.*)'", text)
    evaluation.validate_parameters(json.loads(parameters))
    with pytest.raises(ParameterTypeError, match="limit"):
        evaluation.validate_parameters({"limit": -1})
    (block,) = re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    told = AutomationCore.model_validate(yaml.safe_load(block))
    assert isinstance(told.trigger, EventTrigger)
    (worse,) = [action for one in automations() for action in one.actions if action.model_dump().get("force")]
    assert f"prefect.flow-run.{worse.model_dump()['name']}" in told.trigger.expect
    assert REGRESSED in text
    with pytest.raises(ValidationError):
        AutomationCore.model_validate(yaml.safe_load(block.replace("send-notification", "send-notice")))


def test_the_guides_links_lead_somewhere() -> None:
    text = (FOLDER / "README.md").read_text()
    headings = {
        re.sub(r"[^\w -]", "", line[3:].lower()).replace(" ", "-") for line in text.splitlines() if line[:3] == "## "
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        place, _, heading = target.partition("#")
        assert heading in headings if not place else (FOLDER / place).is_file(), target
    for name in re.findall(r"deployment/[\w./@-]+[\w]", text):
        assert name.endswith("/.env") or (ROOT / name).exists(), name
