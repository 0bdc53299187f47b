"""Locks on devices: two runs never share one, whatever becomes of the process that took it."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from common.errors import StageInterrupted, UserError
from flows.devices import LOCKS, hold_devices
from tasks.stage import Runtime, Worker
from tasks.work import Work


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(LOCKS, str(tmp_path / "locks"))
    return tmp_path / "locks"


def work(stage: str = "pretrain", worker: Worker = "cpu") -> Work:
    return Work(name="base", stage=stage, config={}, inputs={}, runtime=Runtime(worker=worker), store="nowhere")


def test_a_second_run_waits_until_the_first_is_done() -> None:
    order = []
    entered = threading.Event()

    def second() -> None:
        entered.set()
        with hold_devices(work(), lambda: False):
            order.append("second")

    with hold_devices(work(), lambda: False) as locks:
        assert len(locks) == 1
        thread = threading.Thread(target=second)
        thread.start()
        entered.wait()
        thread.join(1.0)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_whoever_waits_may_be_told_to_stop() -> None:
    with (
        hold_devices(work(), lambda: False),
        pytest.raises(StageInterrupted, match="while it waited for cpu"),
        hold_devices(work(), lambda: True),
    ):
        raise AssertionError("the device is held twice")


def test_a_process_that_computes_holds_the_device_after_the_one_that_took_it() -> None:
    with hold_devices(work(), lambda: False) as locks:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=locks)
    with pytest.raises(StageInterrupted), hold_devices(work(), lambda: True):
        raise AssertionError("the device is held twice")
    child.communicate(b"\n")
    with hold_devices(work(), lambda: True) as locks:
        assert locks


@pytest.mark.parametrize(("stage", "worker"), [("tokenizer", "cpu"), ("pretrain", "local")])
def test_stages_without_an_engine_and_those_of_a_terminal_take_none(stage: str, worker: Worker, folder: Path) -> None:
    with hold_devices(work(stage, worker), lambda: False) as locks:
        assert locks == ()
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_is_said(folder: Path) -> None:
    folder.write_text("in the way")
    with pytest.raises(UserError, match=f"set {LOCKS} to a folder"), hold_devices(work(), lambda: False):
        raise AssertionError("there is no lock")


def test_each_gpu_that_is_visible_has_a_lock(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0, 3")
    with hold_devices(work(worker="cuda"), lambda: False) as locks:
        assert len(locks) == 2
        assert sorted(path.name for path in folder.iterdir()) == ["cuda-0.lock", "cuda-3.lock"]
