"""Makes documents in processes that are killed and started again, until one start ends by itself.

As a program: `python -m tests.tasks.corpus.killed_documents FOLDER KILLS SEED CONFIG`. It prints what came of it.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from artifacts.identity import content_digest, describe_files
from tasks.corpus import batching, pipeline
from tests.tasks.corpus.stage import Run

# So small that a moment has many batches, commits and shards in it.
batching.BATCH_BYTES = 40_000
batching.ANCHOR_BYTES = 10_000
pipeline.COMMIT_BYTES = 100_000


def start(folder: Path, config: dict[str, Any], seconds: float | None) -> int:
    """One start in a process of its own, killed after some time; gives how it ended as `os.wait` does."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if seconds is not None:
                threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
            run = Run(folder / str(os.getpid()), config)
            run.scratch = folder / "scratch"
            run.start()
            run.output.rename(folder / "made")
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def main(folder: Path, kills: int, seed: int, config: dict[str, Any]) -> dict[str, Any]:
    """Kills so often, at moments that a whole start is long, and then lets it end."""
    choice = random.Random(seed)
    began = time.monotonic()
    whole = folder / "whole"
    if start(whole, config, None):
        raise SystemExit("the stage failed")
    seconds = time.monotonic() - began
    expected = content_digest(describe_files(whole / "made"))
    killed, resumed = 0, 0
    place = folder / "killed"
    while killed < kills:
        ended = start(place, config, choice.random() * seconds)
        if not ended:
            break
        if os.WTERMSIG(ended) != signal.SIGKILL:
            raise SystemExit(f"the stage ended with {ended}")
        killed += 1
        resumed += any((place / "scratch").glob("shards/*.parquet"))
    if not (place / "made").exists() and start(place, config, None):
        raise SystemExit("the stage failed when it was started again")
    return {"killed": killed, "resumed": resumed, "same": content_digest(describe_files(place / "made")) == expected}


if __name__ == "__main__":
    arguments = sys.argv[1:]
    print(json.dumps(main(Path(arguments[0]), int(arguments[1]), int(arguments[2]), json.loads(arguments[3]))))
