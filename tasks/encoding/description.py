"""What is said of tokens: in `tokens.json`, and in the record."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from models.tokenizer import Tokenizer
from tasks.encoding.choice import Choice
from tasks.encoding.units import EncodedUnit, Job, Unit
from tasks.encoding.writer import TokenShard

NOTES_AT_MOST = 20
_COUNTS = (
    "documents",
    "tokens",
    "counted_tokens",
    "bytes",
    "longest_document",
    "cut_conversations",
    "dropped_conversations",
)


def describe(
    job: Job,
    tokenizer: Tokenizer,
    source: str,
    units: Sequence[tuple[Unit, EncodedUnit]],
    lengths: Mapping[str, Mapping[int, int]],
    shards: Mapping[str, Sequence[TokenShard]],
) -> dict[str, Any]:
    """What `tokens.json` holds. `lengths`: how many documents of a split have a length in tokens."""
    splits = {}
    for split, of_split in shards.items():
        encoded = [one for unit, one in units if unit.split == split]
        splits[split] = {
            "documents": sum(shard.documents for shard in of_split),
            "tokens": sum(shard.tokens for shard in of_split),
            "counted_tokens": sum(shard.counted_tokens for shard in of_split),
            "bytes": sum(one.bytes for one in encoded),
            "longest_document": max(lengths[split]),
            "lengths": sorted(lengths[split].items()),
            **_left_out(job, encoded),
            "shards": [
                shard.model_dump(include={"name", "tokens", "documents", "counted_tokens"}) for shard in of_split
            ],
        }
    return {
        "vocab_size": job.vocab_size,
        "pad_id": tokenizer.pad_id,
        "bos_id": job.bos_id,
        "eos_id": job.eos_id,
        "dtype": job.dtype,
        "source": source,
        "splits": splits,
        **({} if job.template is None else {"template": job.template, "loss_on": job.loss_on}),
    }


def _left_out(job: Job, units: Sequence[EncodedUnit]) -> dict[str, int]:
    """Conversations that did not fit, of the units of a split; nothing of texts, which all do."""
    if job.template is None:
        return {}
    return {
        "cut_conversations": sum(one.cut for one in units),
        "dropped_conversations": sum(one.dropped for one in units),
    }


def measured(
    tokens: Mapping[str, Any],
    units: Sequence[tuple[Unit, EncodedUnit]],
    choice: Choice | None,
    reused: int,
    seconds: float,
) -> dict[str, Any]:
    """What the record says: the metrics of the stage. `reused`: units that were found finished."""
    splits = {
        split: {
            **{key: one[key] for key in _COUNTS if key in one},
            "bytes_per_token": one["bytes"] / one["tokens"] if one["tokens"] else None,
            "shards": len(one["shards"]),
        }
        for split, one in tokens["splits"].items()
    }
    counted, documents = (sum(one[key] for one in splits.values()) for key in ("tokens", "documents"))
    return {
        "summary": f"{counted:,} tokens in {documents:,} documents",
        "tokens": counted,
        "documents": documents,
        "dtype": tokens["dtype"],
        "splits": splits,
        "encoder": None if choice is None else choice.model_dump(),
        "encoded_by": Counter(encoded.library for _, encoded in units),
        "seconds": seconds,
        "units": {"encoded": len(units) - reused, "found_finished": reused},
        "notes": [
            *_shortened([encoded.note for _, encoded in units if encoded.note is not None]),
            *(_fitting(split, one) for split, one in splits.items() if _fitting(split, one)),
        ],
    }


def _fitting(split: str, counts: Mapping[str, Any]) -> str:
    """Says how many conversations of a split did not fit; nothing where all did."""
    cut, dropped = counts.get("cut_conversations", 0), counts.get("dropped_conversations", 0)
    return f"{split}: {cut:,} conversations were cut, and {dropped:,} left out, to fit" if cut or dropped else ""


def _shortened(notes: Sequence[str]) -> list[str]:
    """The first notes, and how many more there are: a library that a cluster lacks has one for every shard."""
    if len(notes) <= NOTES_AT_MOST:
        return list(notes)
    return [*notes[:NOTES_AT_MOST], f"and {len(notes) - NOTES_AT_MOST:,} more such notes"]
