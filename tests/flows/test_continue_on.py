"""`--continue-on`: what one engine has begun another one ends, where it is told to and not else."""

import importlib.util
import signal
from pathlib import Path

import pytest

from artifacts.record import Record
from artifacts.store import Store
from common.errors import UserError
from flows.plan import continued, stage_ref, work_for
from flows.recipe import load_recipe
from models.engine import EngineName
from tasks.produce import produce
from tasks.work import Work
from tests.flows.conftest import RECIPE, Cairn, Start
from tests.flows.processes import wait_for_checkpoints

RUN = ("run", RECIPE, "--set", "stages.base.checkpoints.every_seconds=0", "--set", "stages.base.training.steps=300")


def base_work(engine: EngineName) -> Work:
    """The training of the recipe's base; what goes into it is made first."""
    entries = {entry.name: entry for entry in load_recipe(RECIPE, [f"engine={engine}"]).stages}
    store = Store.open()
    records: dict[str, Record] = {}
    for name in ("expressions", "questions", "tokenizer", "tokens"):
        records[name] = produce(store, work_for(entries[name], records, store), lambda event: None).record
    return work_for(entries["base"], records, store)


def test_a_work_is_changed_only_where_no_engine_has_done_it() -> None:
    store, work = Store.open(), base_work("torch")
    changed = continued(work, "mlx", store)
    assert (changed.config["engine"], changed.runtime.continue_on) == ("mlx", True)
    assert changed.checkpoint_key == work.checkpoint_key
    assert changed.key == base_work("mlx").key
    done = produce(store, work.model_copy(), lambda event: None).record
    assert continued(work, "mlx", store).key == done.key
    # Whatever the recipe names: it is there.
    assert continued(base_work("jax"), "mlx", store).key == done.key


def test_the_engine_that_goes_on_has_to_be_there_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jax" else there(name))
    with pytest.raises(UserError, match=r"stages\.base: engine 'jax' is not installed; .* 'cairn\[jax\]'"):
        load_recipe(RECIPE, ["engine=jax"])
    load_recipe(RECIPE, ["engine=jax"], continue_on="torch")
    with pytest.raises(UserError, match="engine 'jax' is not installed"):
        load_recipe(RECIPE, ["engine=torch"], continue_on="jax")
    with pytest.raises(UserError, match="engine 'torch' does not compute in float16"):
        load_recipe(RECIPE, ["engine=mlx", "precision=float16"], continue_on="torch")


def stopped_in_the_middle(start_cairn: Start, store: Path) -> None:
    process = start_cairn(*RUN, "--set", "engine=torch")
    wait_for_checkpoints(process, store)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output


@pytest.mark.slow
def test_a_run_that_one_engine_began_another_ends(start_cairn: Start, cairn: Cairn, tmp_path: Path) -> None:
    stopped_in_the_middle(start_cairn, tmp_path / "store")
    code, output = cairn(*RUN, "--set", "engine=torch", "--continue-on", "mlx")
    assert code == 0, output
    assert "made by engine 'torch'; engine 'mlx' goes on" in output
    store = Store.open(str(tmp_path / "store"))
    records = {name: store.resolve(stage_ref(RECIPE, name)) for name in ("base", "refined", "tuned", "questions-after")}
    assert {record.engine for record in records.values()} == {"mlx"}
    assert "went on from a checkpoint of engine 'torch'" in records["base"].notes
    assert not records["refined"].notes
    again, output = cairn(*RUN, "--set", "engine=torch", "--continue-on", "mlx")
    assert again == 0
    assert store.resolve(stage_ref(RECIPE, "base")) == records["base"]


@pytest.mark.slow
def test_without_being_told_it_starts_anew_and_says_so(start_cairn: Start, cairn: Cairn, tmp_path: Path) -> None:
    stopped_in_the_middle(start_cairn, tmp_path / "store")
    code, output = cairn(*RUN, "--set", "engine=mlx")
    assert code == 0, output
    assert "engine 'torch' made it, and another goes on from it only with `--continue-on`" in output
    assert "going on from the checkpoint" not in output
    record = Store.open(str(tmp_path / "store")).resolve(stage_ref(RECIPE, "base"))
    assert not any("went on" in note for note in record.notes)
