"""Whole runs: what Prefect knows of them, what a second one does, branches, and the server of a run's own."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter
from prefect.client.schemas.objects import Artifact
from prefect.settings import PREFECT_API_URL, temporary_settings

from artifacts.store import Store
from flows.recipe import known_recipes
from tests.flows.conftest import RECIPE, STAGES, Cairn, Made, Start, published
from tests.flows.processes import descendants, kill, runs_module, wait_until_gone

TOKENS = ("tokens", "answers")


@contextmanager
def client_of(url: str) -> Iterator[SyncPrefectClient]:
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def flow_run(made: Made) -> UUID:
    """The Prefect run that made the store."""
    ids = {record.flow_run_id for record in Store.open(str(made.store)).records()}
    assert len(ids) == 1
    return UUID(ids.pop())


def artifacts_of(client: SyncPrefectClient, run: UUID) -> dict[str, Artifact]:
    found = client.read_artifacts(
        artifact_filter=ArtifactFilter.model_validate({"flow_run_id": {"any_": [run]}}),
        limit=100,
    )
    return {artifact.key or "": artifact for artifact in found}


def test_prefect_knows_every_stage(prefect_url: str, flow_run: UUID) -> None:
    with client_of(prefect_url) as client:
        run = client.read_flow_run(flow_run)
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [flow_run]}}))
    assert run.name == RECIPE
    assert run.state_name == "Completed"
    assert run.parameters["recipe"] == RECIPE
    assert sorted(task.name for task in tasks) == sorted(STAGES)
    assert {task.state_name for task in tasks} == {"Completed"}
    assert {task.run_count for task in tasks} == {1}


def test_prefect_shows_what_was_made(prefect_url: str, flow_run: UUID) -> None:
    with client_of(prefect_url) as client:
        found = artifacts_of(client, flow_run)
    trained = ("base", "refined", "tuned")
    pictures = {f"{RECIPE}-{stage}-loss" for stage in trained} | {f"{RECIPE}-{stage}-lengths" for stage in TOKENS}
    everywhere = {f"{RECIPE}-{stage}{kind}" for stage in STAGES for kind in ("", "-lineage")}
    cards = {f"{RECIPE}-{stage}-card" for stage in TOKENS}
    assert set(found) == everywhere | pictures | cards | {f"{stage}-progress" for stage in trained}
    progress = found["base-progress"]
    assert progress.type == "progress"
    assert progress.data == 100
    assert str(progress.description).startswith("step 40/40 · loss ")
    table = found[f"{RECIPE}-base"]
    assert table.type == "table"
    assert '"parameters"' in str(table.data)
    lineage = found[f"{RECIPE}-published-lineage"]
    assert lineage.type == "markdown"
    assert "tokenizer" in str(lineage.data)
    card = found[f"{RECIPE}-tokens-card"]
    assert card.type == "markdown"
    assert str(card.data).startswith("# Data card of `tokens`: arithmetic")
    inline = "](data:image/png;base64,iVBORw0KGgo"
    assert inline in str(card.data)
    for name in pictures:
        assert found[name].type == "markdown"
        assert str(found[name].data).startswith(f"![{found[name].description}{inline}")


def test_a_second_run_reuses_everything_and_publishes_again(
    made: Made, own_store: Path, cairn: Cairn, tmp_path: Path
) -> None:
    def states() -> dict[Path, int]:
        return {
            path: path.stat().st_mtime_ns
            for folder in ("records", "objects", "attachments", "checkpoints")
            for path in (own_store / folder).rglob("*")
        }

    before = states()
    code, output = cairn("run", RECIPE)
    assert code == 0, output
    assert all(line_of(output, stage).startswith("= ") for stage in STAGES)
    assert output.count("reused") == len(STAGES)
    assert states() == before
    assert published(tmp_path) == made.digest
    # What lies there is replaced whole, and nothing is left beside it.
    (tmp_path / "published" / RECIPE / "stray").write_text("")
    assert cairn("run", RECIPE)[0] == 0
    assert published(tmp_path) == made.digest
    assert [path.name for path in (tmp_path / "published").iterdir()] == [RECIPE]


def line_of(output: str, stage: str) -> str:
    """The line in which a run says that a stage is done."""
    (line,) = (line for line in output.splitlines() if line[:2] in ("= ", "✓ ") and line.split()[1] == stage)
    return line


def test_branches_and_a_second_publication(made: Made, own_store: Path, cairn: Cairn, tmp_path: Path) -> None:
    content: Any = yaml.safe_load(known_recipes()[RECIPE].read_text())
    stages = content["stages"]
    final = stages.pop("published")
    stages["scores-of-base"] = {"stage": "evaluate", "model": "base", "documents": "expressions"}
    stages["control"] = {"stage": "publish", "model": "base", "evaluation": "scores-of-base", "title": "Control"}
    stages["published"] = final
    recipe = tmp_path / "branches.yaml"
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    code, output = cairn("run", str(recipe))
    assert code == 0, output
    for stage in stages:
        assert line_of(output, stage).startswith("✓ " if stage in ("scores-of-base", "control") else "= ")
    assert output.count("Exact match on the test split") == 2
    assert published(tmp_path, "branches") == made.digest
    assert "# Control" in (tmp_path / "published" / "branches@control" / "README.md").read_text()
    store = Store.open()
    assert store.resolve("models/branches@refined") == store.resolve(f"models/{RECIPE}@refined")
    assert store.resolve("models/branches") == store.resolve(f"models/{RECIPE}")
    control = store.resolve("models/branches@control")
    assert control.inputs["model"].digest == store.resolve(f"models/{RECIPE}@base").output


def server_process(pid: int) -> int:
    """The temporary server of a run, once it has started it."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        for child in descendants(pid):
            if runs_module(child, "flows.temporary_server"):
                return child
        time.sleep(0.05)
    raise AssertionError("the run has started no server")


@pytest.mark.slow
def test_a_run_with_no_server_has_one_of_its_own(
    made: Made, own_store: Path, start_cairn: Start, tmp_path: Path
) -> None:
    process = start_cairn("run", RECIPE, PREFECT_API_URL="")
    server = server_process(process.pid)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert published(tmp_path) == made.digest
    assert wait_until_gone(server, 1)
    # It was not stopped before it had stored how everything ended.
    with closing(sqlite3.connect(tmp_path / "prefect" / "prefect.db")) as database:
        stored = database.execute("select name, state_name from task_run").fetchall()
        (flow_state,) = database.execute("select state_name from flow_run").fetchall()
    assert sorted(stored) == sorted((stage, "Completed") for stage in STAGES)
    assert flow_state == ("Completed",)


@pytest.mark.slow
def test_a_killed_run_leaves_no_server(start_cairn: Start, tmp_path: Path) -> None:
    process = start_cairn("run", RECIPE, PREFECT_API_URL="")
    server = server_process(process.pid)
    # Past its start, so that it is the server that serves the run.
    while process.poll() is None and not list((tmp_path / "store").glob("records/*.json")):
        time.sleep(0.01)
    everything = [process.pid, *descendants(process.pid)]
    assert server in everything
    kill(process.pid)
    process.communicate(timeout=60)
    assert all(wait_until_gone(pid) for pid in everything)


def test_a_server_that_does_not_answer(cairn: Cairn) -> None:
    code, output = cairn("run", RECIPE, PREFECT_API_URL="http://127.0.0.1:9/api")
    assert code == 1
    assert "Traceback" not in output
    assert output.startswith("error: no Prefect server answers at http://127.0.0.1:9/api")
    assert "unset PREFECT_API_URL" in output
