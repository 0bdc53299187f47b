"""Tests in several processes: started as a stage starts them, waited for, and what process 0 has written."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.engine import EngineName
from models.processes import start_processes
from tests.models.tiny import Arrays

ROOT = Path(__file__).parents[2]
Found = tuple[dict[str, Any], Arrays]
"""What a work came to, as JSON and as arrays."""


def number() -> int:
    """This process's among those of the run."""
    return int(next((os.environ[key] for key in ("RANK", "JAX_PROCESS_ID", "MLX_RANK") if key in os.environ), "0"))


def run_all(
    engine: EngineName, command: Sequence[str], count: int, environment: Mapping[str, str], folder: Path
) -> None:
    """Runs `python -m COMMAND` in so many processes to its end; fails with what one of them has left in `explained`."""
    whole = [sys.executable, "-W", "error", "-m", *command]
    processes = start_processes(engine, [whole] * count, {"PYTHONPATH": str(ROOT), **environment}, folder)
    try:
        until = time.monotonic() + 500
        while processes.running() and not processes.failed():
            assert time.monotonic() < until, "the processes did not end"
            time.sleep(0.05)
        assert not processes.failed(), "\n".join(path.read_text() for path in folder.glob("error-*"))
    finally:
        processes.kill()


def explained(folder: Path, work: Callable[[], None]) -> None:
    """Does a process's work, and leaves a traceback in the folder where it fails."""
    try:
        work()
    except BaseException:
        (folder / f"error-{number()}").write_text(traceback.format_exc())
        raise


def together(
    engine: EngineName, module: str, folder: Path, count: int, names: Sequence[str], environment: Mapping[str, str]
) -> dict[str, Found]:
    """What the named works come to in several processes of a module whose program is `main`."""
    folder.mkdir()
    run_all(engine, [module, str(folder), *names], count, environment, folder)
    found = json.loads((folder / "found.json").read_text())
    return {name: (found[name], dict(np.load(folder / f"{place}.npz"))) for place, name in enumerate(names)}


def main(do: Callable[[str], Found]) -> None:
    """The program `MODULE FOLDER NAME…`: does the named works in turn; process 0 writes what they came to."""
    folder, names = Path(sys.argv[1]), sys.argv[2:]

    def work() -> None:
        results = {name: do(name) for name in names}
        if number() == 0:
            for place, (_, arrays) in enumerate(results.values()):
                np.savez(folder / f"{place}.npz", **arrays)  # type: ignore[arg-type]  # no array is called allow_pickle
            (folder / "found.json").write_text(json.dumps({name: found for name, (found, _) in results.items()}))

    explained(folder, work)
