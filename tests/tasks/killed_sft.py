"""Runs the stage `sft` with a checkpoint after every step; as a program, it is killed in the middle of one.

`python -m tests.tasks.killed_sft PLACE MODEL TOKENS`.
"""

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import fsspec

from models.training.config import CheckpointConfig
from models.training.events import Note
from tasks import sft
from tasks.stage import Context, Runtime
from tests.models.training.killed_runs import kill_at_flush
from tests.tasks.conversations import training

_FLUSHES = 20


class Run(NamedTuple):
    """What a run came to."""

    output: Path
    went_on: bool
    """Whether it began with the checkpoint of another."""


def run(place: Path, model: Path, tokens: Path) -> Run:
    """One start, in a folder that keeps its checkpoints."""
    shutil.rmtree(place / "output", ignore_errors=True)
    for name in ("output", "logs"):
        (place / name).mkdir(parents=True, exist_ok=True)
    events: list[object] = []
    context = Context(
        name="sft",
        output=place / "output",
        logs=place / "logs",
        scratch=(fsspec.filesystem("file"), str(place / "scratch")),
        local_scratch=place / "scratch",
        runtime=Runtime(checkpoints=CheckpointConfig(every_seconds=0)),
        report=events.append,
        fetch=lambda _, name: tokens / name,
    )
    run_config = training(steps=12, validation={"every": 5, "rows": 2, "exact_match_rows": 1, "samples": 1})
    sft.run(sft.Config.model_validate({"training": run_config}), {"model": model, "tokens": tokens}, context)
    return Run(context.output, any(isinstance(one, Note) and "going on from" in one.text for one in events))


if __name__ == "__main__":
    kill_at_flush(_FLUSHES)
    run(*map(Path, sys.argv[1:]))
