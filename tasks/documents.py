"""Stage `documents`: rows of text from a source, each in the split that it belongs to, as Parquet."""

from collections.abc import Mapping
from pathlib import Path

from common.config import FrozenModel
from common.files import canonical_json
from tasks.arithmetic import SPLITS, ArithmeticSource, generate, rows
from tasks.stage import Context, Kind, Metrics, Stage


class Config(FrozenModel):
    """Where the documents come from."""

    source: ArithmeticSource
    """The source and how much is taken of it."""


def shard_name(split: str, index: int, suffix: str) -> str:
    """The file name of one shard of a split, in documents and tokens alike."""
    return f"{split}-{index:05d}.{suffix}"


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes `<split>-00000.parquet` with the columns prompt, target and text (strings), and `documents.json`."""
    # Imported here because it takes a third of a second, and planning needs only the configs.
    import pyarrow as pa
    import pyarrow.parquet as pq

    counts = {}
    for split in SPLITS:
        table = pa.Table.from_pylist(list(rows(config.source, generate(config.source, split))))
        pq.write_table(table, context.output / shard_name(split, 0, "parquet"), compression="zstd")
        counts[split] = table.num_rows
    (context.output / "documents.json").write_bytes(canonical_json({"source": config.source.kind, "rows": counts}))
    described = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    return {"summary": f"{described} documents", "rows": counts}


STAGE = Stage(name="documents", version=1, config=Config, output=Kind.DOCUMENTS, run=run)
