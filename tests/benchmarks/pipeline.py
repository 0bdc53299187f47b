"""How long whole commands take, as a user waits for them: `python -m tests.benchmarks.pipeline`.

Prints the time and accuracy of `cairn run arithmetic` on an empty store, what a second run spends beyond Prefect's own
start-up (a flow that does nothing, through the same temporary server), and how quickly `cairn` answers. Medians of
interleaved repeats; run it on a machine that does nothing else.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from flows.recipe import load_recipe

ROOT = Path(__file__).parents[2]
CAIRN = (sys.executable, "-m", "flows.cli")
# What Prefect alone costs: its import, the temporary server, and one empty flow.
EMPTY_FLOW = """
import os
from flows.cli import PREFECT_SETTINGS
os.environ.update(PREFECT_SETTINGS)
from prefect import flow
from flows.server import prefect_server, wait_until_stored
@flow(persist_result=False)
def empty() -> None:
    pass
with prefect_server():
    wait_until_stored(empty(return_state=True))
"""


def timed(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> float:
    """Seconds that a command takes; its output goes to this program's own if it fails."""
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return seconds


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="arithmetic")
    parser.add_argument("--repeats", type=int, default=5, help="of the short commands")
    parser.add_argument("--runs", type=int, default=1, help="of the whole recipe, each on an empty store")
    arguments = parser.parse_args()
    evaluations = [entry.name for entry in load_recipe(arguments.recipe).stages if entry.stage == "evaluate"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "CAIRN_STORE": str(folder / "store"),
            "PREFECT_HOME": str(folder / "prefect"),
        }
        print(f"load before: {os.getloadavg()[0]:.2f}, {os.cpu_count()} cores")
        for number in range(arguments.runs):
            own = {**environment, "CAIRN_STORE": str(folder / f"store-{number}")}
            seconds = timed([*CAIRN, "run", arguments.recipe], own, folder)
            print(f"run {arguments.recipe}: {seconds:.1f} s")
            for evaluation in evaluations:
                show = [*CAIRN, "show", f"models/{arguments.recipe}@{evaluation}", "--json"]
                shown = subprocess.run(show, env=own, capture_output=True, text=True, check=True)
                metrics = json.loads(shown.stdout)["metrics"]
                print(f"  {evaluation}: exact match {metrics['exact_match']:.4%} of {metrics['n']}")
            environment["CAIRN_STORE"] = own["CAIRN_STORE"]
        commands: dict[str, Sequence[str]] = {
            "run again": [*CAIRN, "run", arguments.recipe],
            "Prefect alone": [sys.executable, "-c", EMPTY_FLOW],
            "plan": [*CAIRN, "plan", arguments.recipe],
            "--help": [*CAIRN, "--help"],
            "recipes": [*CAIRN, "recipes"],
            "show": [*CAIRN, "show", f"models/{arguments.recipe}"],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(arguments.repeats):
            for name, command in commands.items():
                times[name].append(timed(command, environment, folder))
        for name, values in times.items():
            print(f"{name:<14} median {statistics.median(values):6.2f} s  ({min(values):.2f} to {max(values):.2f})")
        beyond = [again - alone for again, alone in zip(times["run again"], times["Prefect alone"], strict=True)]
        print(f"run again beyond Prefect alone: median {statistics.median(beyond):.2f} s")


if __name__ == "__main__":
    main()
