"""What befalls a run on a worker: whatever it is, the published weights are bitwise those of an undisturbed run."""

import os
import signal
import time
from pathlib import Path

from tests.deployment.conftest import ROOT, Fleet, Server, wait_for
from tests.flows.processes import descendants, kill


def test_the_stage_process_is_killed(fleet: Fleet, undisturbed: str) -> None:
    worker = fleet.worker()
    run = fleet.run()
    fleet.training()
    kill(fleet.stage_process(worker))
    killed = time.monotonic()
    wait_for(lambda: fleet.states()[1:] == ["Running"], 20, what="the retry")
    print(f"on a worker again after {time.monotonic() - killed:.1f} s")
    fleet.finish(run)
    assert fleet.states() == ["Failed", "Completed"]
    assert "killed by signal 9" in str(fleet.runs()[0].state)
    assert "going on from the checkpoint" in fleet.stage_log()
    assert fleet.published() == undisturbed


def test_the_worker_is_killed_with_its_children(fleet: Fleet, undisturbed: str) -> None:
    worker = fleet.worker()
    run = fleet.run()
    fleet.training()
    kill(worker.pid, *descendants(worker.pid))
    killed = time.monotonic()
    fleet.worker(name="two")
    wait_for(lambda: fleet.states()[0] == "Crashed", 120, what="the crash to be seen")
    print(f"seen as crashed after {time.monotonic() - killed:.1f} s")
    fleet.finish(run)
    assert fleet.states() == ["Crashed", "Completed"]
    # The pipeline was alive all the time, for longer than a silent run is.
    assert "Crashed" not in fleet.pipeline_states()
    assert "going on from the checkpoint" in fleet.stage_log()
    assert fleet.published() == undisturbed


def test_the_pipeline_is_killed(fleet: Fleet, undisturbed: str) -> None:
    fleet.worker()
    run = fleet.run()
    fleet.training()
    kill(run.pid, *descendants(run.pid))
    fleet.finish(fleet.run(log="again.log"), log="again.log")
    assert fleet.states() == ["Completed"]
    assert fleet.published() == undisturbed


def test_the_worker_is_stopped(fleet: Fleet, undisturbed: str) -> None:
    worker = fleet.worker()
    # Going on elsewhere is no failure, so no retry is needed for it.
    run = fleet.run("stages.base.retries=0")
    fleet.training()
    worker.terminate()
    assert worker.wait(60) == 0
    assert fleet.states()[0] == "Stopped"
    fleet.worker(name="two")
    fleet.finish(run)
    assert fleet.states() == ["Stopped", "Completed"]
    assert "going on from the checkpoint" in fleet.stage_log()
    assert fleet.published() == undisturbed


def test_the_worker_is_told_twice_to_stop(fleet: Fleet, undisturbed: str) -> None:
    worker = fleet.worker()
    run = fleet.run("stages.base.retries=0")
    fleet.training()
    stage = fleet.stage_process(worker)
    os.kill(stage, signal.SIGSTOP)
    worker.terminate()
    wait_for(lambda: "Ctrl-C again" in fleet.text("worker-one.log"), 30, what="the worker's wait")
    worker.send_signal(signal.SIGINT)
    assert worker.wait(10) == 130
    assert "Traceback" not in fleet.text("worker-one.log")
    assert fleet.states() == ["Running"]
    os.kill(stage, signal.SIGCONT)
    wait_for(lambda: fleet.states()[0] == "Stopped", 30, what="the stage's end")
    fleet.worker(name="two")
    fleet.finish(run)
    assert "going on from the checkpoint" in fleet.stage_log()
    assert fleet.published() == undisturbed


def test_the_pipeline_is_stopped(fleet: Fleet, undisturbed: str) -> None:
    fleet.worker()
    run = fleet.run()
    fleet.training()
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130, fleet.text()
    assert fleet.states() == ["Cancelled"]
    fleet.finish(fleet.run(log="again.log"), log="again.log")
    assert fleet.states() == ["Cancelled", "Completed"]
    assert "going on from the checkpoint" in fleet.stage_log()
    assert fleet.published() == undisturbed


def test_the_stage_is_cancelled_by_command(fleet: Fleet, undisturbed: str) -> None:
    fleet.worker()
    run = fleet.run()
    fleet.training()
    fleet.cancel_stage()
    assert run.wait(60) == 130, fleet.text()
    assert fleet.states() == ["Cancelled"]
    fleet.finish(fleet.run(log="again.log"), log="again.log")
    assert "going on from the checkpoint" in fleet.stage_log()
    assert fleet.published() == undisturbed


def test_two_pipelines_share_one_run(fleet: Fleet, undisturbed: str) -> None:
    fleet.worker()
    one, other = fleet.run(log="one.log"), fleet.run(log="other.log")
    fleet.finish(one, log="one.log")
    fleet.finish(other, log="other.log")
    assert fleet.states() == ["Completed"]
    assert fleet.published() == undisturbed


def test_one_of_two_pipelines_that_share_a_run_is_stopped(fleet: Fleet, undisturbed: str) -> None:
    fleet.worker()
    one, other = fleet.run(log="one.log"), fleet.run(log="other.log")
    fleet.training()
    one.send_signal(signal.SIGINT)
    assert one.wait(60) == 130, fleet.text("one.log")
    fleet.finish(other, log="other.log")
    assert fleet.states() == ["Cancelled", "Completed"]
    assert "going on from the checkpoint" in fleet.stage_log()
    assert fleet.published() == undisturbed


def test_the_server_is_killed_and_comes_back(fleet: Fleet, server: Server, undisturbed: str) -> None:
    fleet.worker()
    run = fleet.run()
    fleet.training()
    server.kill()
    time.sleep(5)
    server.start()
    fleet.finish(run)
    assert fleet.states() == ["Completed"]
    assert fleet.published() == undisturbed


def test_a_worker_without_the_engine_refuses(fleet: Fleet, tmp_path: Path) -> None:
    # An environment without JAX, as far as Python's import system can tell.
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "sitecustomize.py").write_text(_WITHOUT_JAX)
    fleet.worker(PYTHONPATH=f"{tmp_path / 'without'}:{ROOT}")
    run = fleet.run("stages.base.engine=jax")
    assert run.wait(120) == 1
    assert "engine 'jax' is not installed; run: pip install 'cairn[jax]'" in fleet.text()
    assert "Traceback" not in fleet.text()
    assert fleet.states() == ["Refused"]


_WITHOUT_JAX = """
from importlib.machinery import PathFinder

found = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] == "jax" else found(name, *rest)
"""


def test_a_stage_without_a_worker_waits_and_says_for_what(fleet: Fleet) -> None:
    run = fleet.run("stages.base.worker=cuda")
    wait_for(lambda: "no worker of pool 'cuda' is online; start one on such a machine" in fleet.text(), what="the hint")
    assert fleet.states()[0] in ("Scheduled", "Late")
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130, fleet.text()
    assert fleet.states() == ["Cancelled"]


def test_a_worker_of_another_kind_does_not_start(fleet: Fleet) -> None:
    worker = fleet.cairn("worker.log", "worker", "tpu")
    assert worker.wait(60) == 1
    assert "this machine has nothing that pool 'tpu' is for" in fleet.text("worker.log")


def test_a_worker_that_does_not_reach_the_store_does_not_start(fleet: Fleet) -> None:
    (fleet.folder / "store").write_text("in the way")
    worker = fleet.cairn("worker.log", "worker", "cpu")
    assert worker.wait(60) == 1
    assert "is a file, not a folder" in fleet.text("worker.log")
