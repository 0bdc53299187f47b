"""Anonymous memory of processes, as Linux tells it."""

import subprocess
import time
from pathlib import Path

_LOOK_SECONDS = 0.005


def anonymous_megabytes(pid: int) -> float:
    """RssAnon of a process; 0 for one that has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith("RssAnon:")), 0.0)


def watched_peak(process: "subprocess.Popen[str]") -> float:
    """Waits for a process to end; the most anonymous megabytes that it and all that it started had at a moment, looked
    at 200 times a second."""
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, sum(map(anonymous_megabytes, _tree(process.pid))))
        time.sleep(_LOOK_SECONDS)
    return peak


def _tree(pid: int) -> list[int]:
    """A process and those that it started, and those that they have."""
    found = [pid]
    for one in found:
        try:
            for path in Path(f"/proc/{one}/task").glob("*/children"):
                found += map(int, path.read_text().split())
        except OSError:
            continue
    return found
