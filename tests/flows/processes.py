"""Processes as the tests find and kill them."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from subprocess import Popen


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError, ValueError):
                # The command's name, in brackets, may hold anything.
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        new = children.get(waiting.pop(), [])
        found += new
        waiting += new
    return found


def stage_process(pid: int) -> int | None:
    """The child in which a run's stages train."""
    return next((child for child in descendants(pid) if runs_module(child, "tasks.child")), None)


def runs_module(pid: int, module: str) -> bool:
    """Whether a process is a Python that was started on a module."""
    try:
        return module.encode() in (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def kill(*pids: int) -> None:
    """SIGKILL to some processes; those that have gone already are left in peace."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_until_gone(pid: int, seconds: float = 30.0) -> bool:
    """Whether a process ends within some time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            state = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def files(folder: Path) -> list[Path]:
    """The files below a folder that is being written to: what vanishes meanwhile is left out, which glob raises for."""
    return [Path(place) / name for place, _, names in os.walk(folder) for name in names]


def checkpoints(store: Path) -> list[Path]:
    """The folders of whole checkpoints in a store, the newest of a stage last."""
    return sorted(path.parent for path in files(store / "checkpoints") if path.name == "state.json")


def wait_for_checkpoints(process: "Popen[str]", store: Path, count: int = 1) -> None:
    """Waits until a run has written some checkpoints, or has ended."""
    while process.poll() is None and len(checkpoints(store)) < count:
        time.sleep(0.01)
