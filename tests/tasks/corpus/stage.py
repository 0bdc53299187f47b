"""The stage `documents` as tests run it, and what it should make, document by document."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq

from tasks.documents import STAGE
from tasks.stage import Context, Metrics, Runtime

Described = dict[str, Any]


class Run:
    """The stage in a folder of its own: what it is stopped in, another start goes on with."""

    def __init__(self, folder: Path, config: Mapping[str, Any], processes: int = 2) -> None:
        self.config = STAGE.config.model_validate(config)
        self.scratch = folder / "scratch"
        self.said: list[str] = []
        self._folder = folder
        self._processes = processes
        self._starts = 0
        self.output = folder

    def start(self, should_stop: Callable[[], bool] = lambda: False) -> Metrics:
        """Runs the stage with an empty output folder, as every start has one."""
        assert STAGE.resolved is not None
        self.output = self._folder / f"output-{self._starts}"
        self._starts += 1
        self.output.mkdir(parents=True)
        context = Context(
            name="documents",
            output=self.output,
            logs=self._folder,
            scratch=(fsspec.filesystem("file"), str(self.scratch)),
            local_scratch=self.scratch,
            runtime=Runtime(processes=self._processes),
            report=lambda event: self.said.append(str(event.text)),  # type: ignore[attr-defined]
            should_stop=should_stop,
        )
        # As between a recipe and a stage: by JSON.
        resolved = STAGE.resolved(self.config).model_dump_json()
        return STAGE.run(STAGE.config.model_validate_json(resolved), {}, context)

    def described(self) -> Described:
        """What `documents.json` says."""
        described: Described = json.loads((self.output / "documents.json").read_bytes())
        return described

    def texts(self) -> dict[str, list[list[str]]]:
        """The documents by split and shard."""
        shards = {name: split["shards"] for name, split in self.described()["splits"].items()}
        names = {shard["name"] for split in shards.values() for shard in split}
        assert {path.name for path in self.output.iterdir()} == {*names, "documents.json"}
        return {
            split: [pq.read_table(self.output / shard["name"])["text"].to_pylist() for shard in named]
            for split, named in shards.items()
        }


def reference(
    config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> tuple[Described, dict[str, list[list[str]]]]:
    """What the stage should say, but for the source, and the shards that it should make of good rows."""
    drops = [{"rule": rule["rule"], "documents": 0, "bytes": 0} for rule in config.get("rules", ())]
    if config.get("duplicates") is not None:
        drops.append({"rule": "exact_duplicates", "documents": 0, "bytes": 0})
    read = {"documents": 0, "bytes": 0}
    kept = {"documents": 0, "bytes": 0}
    seen: set[str] = set()
    shards: dict[str, list[list[str]]] = {}
    sizes: dict[str, list[int]] = {}
    for row in rows:
        size = len(row["text"].encode())
        broken = [number for number, rule in enumerate(config.get("rules", ())) if not _passes(rule, row)]
        if not broken and config.get("duplicates") is not None and row["text"] in seen:
            broken = [len(drops) - 1]
        if not broken:
            if kept["bytes"] + size > (config.get("max_bytes") or float("inf")):
                break
            seen.add(row["text"])
            _count(kept, size)
            split = _split(config.get("split"), row["text"])
            taken = 16 + size + sum(len(row[name].encode()) for name in config.get("columns", ()))
            place = (shards.setdefault(split, []), sizes.setdefault(split, []))
            _place(*place, row["text"], taken, config["shard_bytes"])
        else:
            _count(drops[broken[0]], size)
        _count(read, size)
        if kept["documents"] == config.get("max_documents"):
            break
    return {"read": read, "dropped": drops}, shards


def _count(count: dict[str, Any], size: int) -> None:
    count["documents"] += 1
    count["bytes"] += size


def _passes(rule: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    if rule["rule"] == "length":
        return len(row["text"]) >= int(rule["min_characters"])
    if rule["rule"] == "column":
        return row[rule["column"]] is not None and bool(row[rule["column"]] >= rule["minimum"])
    return not re.search(rule["pattern"], row["text"])


def _split(split: Any, text: str) -> str:
    if not isinstance(split, Mapping):
        return split or "train"
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") / 2**64
    if number < split.get("validation", 0):
        return "validation"
    return "test" if number >= 1 - split.get("test", 0) else "train"


def _place(shards: list[list[str]], sizes: list[int], text: str, size: int, limit: int) -> None:
    if not shards or sizes[-1] + size > limit:
        shards.append([])
        sizes.append(0)
    shards[-1].append(text)
    sizes[-1] += size
