"""What a worker starts for each run: `python -m flows.engine`, Prefect's engine with time to end.

A worker that is stopped kills its runs' processes at once, and a stage would have no moment to say that it goes on
elsewhere. So the process that the worker knows only starts another one, which outlives it for as long as that takes.
"""

import os
import sys
from pathlib import Path

from flows.supervised import Supervised

RUNS = "CAIRN_RUNS"
"""The environment's name for a folder with an empty file for each run, named by its process, for `cairn worker`."""
FOLDER = "CAIRN_FOLDER"
"""The environment's name for the folder that runs work in: the one that Prefect makes goes with the worker."""


def main() -> int:
    """Runs Prefect's engine to its end; gives its exit code."""
    engine = Supervised("prefect.engine", folder=Path(os.environ.get(FOLDER) or Path.home()), environment=os.environ)
    mark = Path(os.environ[RUNS], str(engine.process.pid)) if RUNS in os.environ else None
    if mark is not None:
        mark.touch()
    code = engine.wait_passing_signals_on()
    if mark is not None:
        # The number may become another process's. The folder goes with its worker.
        mark.unlink(missing_ok=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
