"""Stage `documents`: rows of text from a source, filtered, each in the split that it belongs to, as Parquet."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files import canonical_json
from tasks.corpus.config import Config
from tasks.corpus.pipeline import Pipeline
from tasks.corpus.shards import shard_name
from tasks.stage import Context, Kind, Metrics, Stage

__all__ = ["STAGE", "Config", "data_of", "run", "shard_name"]
DESCRIPTION = "documents.json"


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes `<split>-<n>.parquet` and `documents.json`, which has the counts of what was read, kept and dropped.

    The Parquet files have the column `text` (strings, without any special tokens), those of conversations where such
    are read, and others where the source always has them or the config keeps them. Raises UserError for bad input and
    where no document is left.
    """
    described = Pipeline(config, context).run()
    (context.output / DESCRIPTION).write_bytes(canonical_json(described))
    return {"summary": _summary(described), **_measured(described)}


def data_of(documents: Path) -> dict[str, str | None]:
    """What documents were made of: its name, and its digest or the commit that was read, or null where it is generated.
    Nothing where the folder does not say."""
    path = documents / DESCRIPTION
    if not path.is_file():
        return {}
    source = json.loads(path.read_bytes())["source"]
    return {source["name"]: source.get("digest") or source.get("revision")}


def _summary(described: Mapping[str, Any]) -> str:
    splits = ", ".join(f"{split['documents']:,} {name}" for name, split in described["splits"].items())
    dropped = sum(entry["documents"] for entry in described["dropped"])
    return f"{splits} documents" + (f"; {dropped:,} dropped" if dropped else "")


def _measured(described: Mapping[str, Any]) -> Metrics:
    """The counts for the record: without the shards, and what was dropped by its rule's name."""
    dropped: dict[str, Any] = {}
    for entry in described["dropped"]:
        again = sum(name.partition(" ")[0] == entry["rule"] for name in dropped)
        name = f"{entry['rule']} {again + 1}" if again else entry["rule"]
        dropped[name] = {key: entry[key] for key in ("documents", "bytes")}
    splits = {
        name: {"documents": split["documents"], "bytes": split["bytes"], "shards": len(split["shards"])}
        for name, split in described["splits"].items()
    }
    return {
        "source": described["source"],
        "read": described["read"],
        "splits": splits,
        "dropped": dropped,
        "compared_with": described.get("compared_with", []),
        "notes": list(described.get("damaged", [])),
    }


STAGE = Stage(
    name="documents",
    version=4,
    config=Config,
    output=Kind.DOCUMENTS,
    run=run,
    resolved=Config.resolved,
)
