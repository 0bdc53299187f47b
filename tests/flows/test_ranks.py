"""A whole run whose training stages have several processes, stopped by Ctrl-C."""

import signal
from pathlib import Path

import pytest

from artifacts.store import Store
from flows.plan import stage_ref
from tests.flows.conftest import RECIPE, Cairn, Start
from tests.flows.processes import descendants, runs_module, wait_for_checkpoints, wait_until_gone

RUN = (
    "run",
    RECIPE,
    *("--set", "stages.base.layout.processes=2"),
    *("--set", "stages.refined.layout={processes: 2, fsdp: 2, rematerialize: true}"),
    *("--set", "stages.base.checkpoints.every_seconds=0"),
    *("--set", "stages.base.training.steps=80"),
)


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_and_the_same_command_goes_on(
    start_cairn: Start, cairn: Cairn, tmp_path: Path
) -> None:
    process = start_cairn(*RUN)
    wait_for_checkpoints(process, tmp_path / "store")
    ranks = [pid for pid in descendants(process.pid) if runs_module(pid, "tasks.rank")]
    assert len(ranks) == 2
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "run the same command again to go on" in output
    assert "Traceback" not in output
    assert all(wait_until_gone(pid, 5) for pid in ranks)
    code, output = cairn(*RUN)
    assert code == 0, output
    assert "going on from the checkpoint of step" in output
    store = Store.open(str(tmp_path / "store"))
    assert [store.resolve(stage_ref(RECIPE, name)).metrics["device"] for name in ("base", "refined")] == ["2 × cpu"] * 2
