"""Starting and ending processes through torchrun's interface."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from common.errors import UserError
from models.engine import Layout
from models.training.signals import StopSignals

torch = pytest.importorskip("torch")

from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler  # noqa: E402

from models.torch_engine import processes, world  # noqa: E402  # only where torch is

ASLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def two(tmp_path: Path) -> Iterator[processes.TorchProcesses]:
    started = processes.start([ASLEEP] * 2, {}, tmp_path)
    yield started
    started.kill()


def wait_until_gone(pid: int) -> None:
    """Without taking its exit code, which is its parent's to take."""
    until = time.monotonic() + 30
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("killed_first", [False, True])
def test_the_code_is_that_of_the_process_that_ended_by_itself(
    two: processes.TorchProcesses, number: signal.Signals, killed_first: bool
) -> None:
    assert two.failed() == {}
    os.kill(two.pids[1], number)
    wait_until_gone(two.pids[1])
    if killed_first:
        two.kill()
    assert two.failed() == {1: -number}
    assert not two.running()


def test_a_stop_while_processes_are_started_is_noted_and_leaves_them_in_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    popen = SubprocessHandler._popen

    def stopped(self: Any, *arguments: Any) -> Popen[bytes]:
        child: Popen[bytes] = popen(self, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        return child

    monkeypatch.setattr(SubprocessHandler, "_popen", stopped)
    with StopSignals() as signals:
        handler = signal.getsignal(signal.SIGTERM)
        started = processes.start([ASLEEP] * 2, {}, tmp_path)
        try:
            assert signals.received == "SIGTERM"
            assert signal.getsignal(signal.SIGTERM) == handler
            assert started.running()
            assert len(started.pids) == 2
        finally:
            started.kill()


def test_apples_gpu_is_not_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(world, "default_device", lambda: torch.device("mps", 0))
    with pytest.raises(UserError, match=r"layout\.processes 2: Apple's GPU is one device.* set layout\.processes to"):
        world.World.joined(Layout(processes=2))
