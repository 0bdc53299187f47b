"""Documents that were killed at any moment and gone on with are, byte for byte, those that never were."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tasks.corpus.conftest import json_lines, parquet_bytes, write

ROOT = Path(__file__).parents[3]
KILLS = 8


def source(folder: Path) -> dict[str, Any]:
    """Some megabytes of text in files of both kinds of reading, with duplicates among it."""
    random = np.random.default_rng(0)
    words = [f"word{number}" for number in range(500)]
    for number in range(6):
        rows = [
            {"text": " ".join(words[word] for word in random.integers(0, 500, random.integers(1, 200)))}
            for _ in range(800)
        ]
        rows += [rows[row] for row in random.integers(0, 800, 100)]
        write(folder / "jsonl", f"{number}.jsonl.zst", json_lines(rows))
        write(folder / "parquet", f"{number}.parquet", parquet_bytes({"text": [row["text"] for row in rows]}))
    return {"kind": "files", "path": [str(folder / "jsonl")]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "duplicates"),
    [("jsonl", None), ("parquet", {}), ("jsonl", {"near": {"threshold": 0.8}})],
    ids=["plain", "exact", "near"],
)
def test_killed_at_any_moment(kind: str, duplicates: dict[str, Any] | None, tmp_path: Path) -> None:
    config = {
        "source": {**source(tmp_path), "path": str(tmp_path / kind)},
        "rules": [{"rule": "length", "min_characters": 20}, {"rule": "regex", "pattern": "word11 "}],
        "duplicates": duplicates,
        "split": {"validation": 0.1, "test": 0.05},
        "shard_bytes": 200_000,
    }
    killed = resumed = 0
    # How many kills come before a run has ended depends on the machine.
    for seed in range(1, 8):
        folder = tmp_path / str(seed)
        command = [sys.executable, "-W", "error", "-m", "tests.tasks.corpus.killed_documents"]
        done = subprocess.run(
            [*command, str(folder), str(KILLS), str(seed), json.dumps(config)],
            cwd=ROOT,
            env=dict(os.environ),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["same"]
        killed += found["killed"]
        resumed += found["resumed"]
        if killed >= KILLS and resumed >= KILLS // 2:
            return
    raise AssertionError(f"only {killed} kills came before their run had ended, {resumed} of them after a first shard")
