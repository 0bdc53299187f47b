"""`cairn worker`: a Prefect worker for one of the pools, on a machine that is what the pool is for."""

import os
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

from artifacts.store import Store
from common.errors import UserError
from flows.engine import FOLDER, RUNS
from flows.server import check_answers
from flows.stage import WORKER
from flows.supervised import Supervised
from models.engine import is_installed
from models.machine import Hardware, accelerators, engine_for

Pool = Literal["pipeline", Hardware]
_GRACE_SECONDS = 300.0
"""Seconds that runs may take to write their checkpoints when the worker is stopped."""
_AGAIN_SECONDS = 10.0
_SETTINGS = {
    "PREFECT_WORKER_QUERY_SECONDS": "2",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "cairn",
    # What a thread outside of a run says stays on this machine.
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}
"""What a worker and its runs are started with; variables that a user has set go before."""


def run_worker(pool: Pool, server: str, store: Store, name: str | None, limit: int) -> int:
    """Works for a pool until it is told to stop, and then until its runs have written their checkpoints.

    Gives the exit code. Raises UserError where the machine is not what the pool is for, and where the server or the
    store cannot be reached.
    """
    # A shell that starts it in the background has it ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _check_machine(pool)
    check_answers(server)
    store.names()  # raises where the store cannot be reached
    with tempfile.TemporaryDirectory(prefix="cairn-worker-") as runs:
        places = {WORKER: pool, FOLDER: str(Path.cwd()), RUNS: runs, "CAIRN_STORE": store.url}
        # A deployment says `python` for every worker: here it is the one with Cairn.
        places["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        arguments = ["worker", "start", "--pool", pool, "--type", "process", "--limit", str(limit)]
        arguments += ["--name", name or f"{platform.node()}-{pool}-{os.getpid()}"]
        environment = {**_SETTINGS, **os.environ, **places}
        while True:
            worker = Supervised("prefect", *arguments, folder=Path.cwd(), environment=environment)
            code = worker.wait_passing_signals_on()
            if worker.told_to_end or not code:
                break
            # It gives up on a server that is away for a quarter of an hour.
            _say(f"Prefect's worker ended with {code}; it is started again in {_AGAIN_SECONDS:.0f} s")
            time.sleep(_AGAIN_SECONDS)
        _wait_for_runs(Path(runs))
    return code


def _check_machine(pool: Pool) -> None:
    if pool == "pipeline":
        return
    if not accelerators(pool):
        raise UserError(f"this machine has nothing that pool '{pool}' is for; `cairn worker cpu` works everywhere")
    engine = engine_for(pool)
    if not is_installed(engine):
        raise UserError(f"a worker of pool '{pool}' needs engine '{engine}'; run: pip install 'cairn[{engine}]'")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _wait_for_runs(folder: Path) -> None:
    """Waits until the runs have ended; they know that the worker has."""
    until = time.monotonic() + _GRACE_SECONDS
    running = [pid for path in folder.iterdir() if _is_alive(pid := int(path.name))]
    if running:
        _say("waiting for checkpoints to be written; Ctrl-C again leaves that to the runs themselves")
    while time.monotonic() < until and (running := [pid for pid in running if _is_alive(pid)]):
        time.sleep(0.1)


def _is_alive(pid: int) -> bool:
    try:
        # In a container, this process is the one that inherits what others leave.
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, PermissionError):  # another user's has taken the number
            return False
        return True
