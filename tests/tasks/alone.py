"""Starts `open_published.py`, the process that has no Cairn."""

import os
import subprocess
import sys
from pathlib import Path

OPEN = Path(__file__).parent / "open_published.py"


def run_alone(root: Path, place: Path) -> None:
    """Runs `open_published.py` on a folder of models, with no path to this repository."""
    kept = ("PATH", "HOME", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "LD_LIBRARY_PATH")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "home"), "HF_MODULES_CACHE": str(place / "code")}
    command = [sys.executable, "-I", "-W", "error", str(OPEN), str(root)]
    # Without an input, so that a question whether code may run is an error instead of a wait for the answer.
    done = subprocess.run(
        command, cwd=place, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
