"""Pipelines on a worker of their own: stopped, cancelled, out of time; each is taken up again."""

from hashlib import sha256

import pytest

from artifacts.store import Store
from tests.deployment.conftest import RECIPE, Fleet
from tests.deployment.launched import Launched


@pytest.mark.parametrize("where", ["cpu", "local"])
def test_the_worker_of_a_pipeline_is_stopped(fleet: Fleet, where: str) -> None:
    first = fleet.worker("pipeline", name="first")
    if where == "cpu":
        fleet.worker("cpu")
    run = Launched(fleet, workers={"pretrain": where})
    fleet.training()
    first.terminate()
    assert first.wait(60) == 0
    assert run.state().name == "AwaitingRetry"
    if where == "cpu":
        assert fleet.states() == ["Running"]
    fleet.worker("pipeline", name="second")
    assert run.ended().name == "Completed", run.state()
    assert run.states()[:2] == ["Running", "AwaitingRetry"]
    assert run.states().count("Running") == 2
    if where == "cpu":
        # The stage's worker knew nothing of it.
        assert fleet.states() == ["Completed"]
    else:
        assert "going on from the checkpoint of step" in fleet.stage_log()


def test_its_stage_is_cancelled(fleet: Fleet) -> None:
    fleet.worker("pipeline", name="pipelines")
    fleet.worker("cpu")
    run = Launched(fleet, workers={"pretrain": "cpu"})
    fleet.training()
    fleet.cancel_stage()
    assert run.ended(60).name == "Cancelled"
    again = Launched(fleet, workers={"pretrain": "cpu"})
    assert again.ended().name == "Completed", again.state()
    assert fleet.states() == ["Cancelled", "Completed"]
    assert "going on from the checkpoint of step" in fleet.stage_log()


def test_a_budget_that_is_used_up(fleet: Fleet) -> None:
    fleet.worker("pipeline", name="pipelines")
    run = Launched(fleet, workers={"pretrain": "local"}, budget_hours=0.0005)
    state = run.ended()
    assert (state.name, state.message) == ("Cancelled", "its 0.0005 hours are used up; run again to go on from here")
    again = Launched(fleet, workers={"pretrain": "local"})
    assert again.ended().name == "Completed", again.state()


def test_what_the_user_has_to_mend_is_said_in_a_line(fleet: Fleet) -> None:
    fleet.worker("pipeline", name="pipelines")
    run = Launched(fleet, overrides=["stages.base.training.stepps=5"])
    state = run.ended(60)
    assert state.name == "Refused"
    assert "there is no such key; did you mean 'steps'?" in str(state.message)


def test_a_damaged_input_is_made_anew(fleet: Fleet) -> None:
    fleet.worker("pipeline", name="pipelines")
    workers = {"pretrain": "local"}
    first = Launched(fleet, workers=workers, overrides=[])
    assert first.ended().name == "Completed", first.state()
    base = Store.open(fleet.environment["CAIRN_STORE"]).resolve(f"models/{RECIPE}@base")
    weights = fleet.folder / "store" / "objects" / base.output / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(content)
    second = Launched(fleet, workers=workers, overrides=["stages.stacked.method=interleave"])
    assert second.ended().name == "Completed", second.state()
    assert "going through the recipe once more" in fleet.text("worker-pipelines.log")
    assert sha256(weights.read_bytes()).hexdigest() == base.files["model.safetensors"].sha256
