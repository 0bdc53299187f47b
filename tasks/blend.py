"""The tokens that a training stage reads, as sources of batches: known by their descriptions alone."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError

from common.config import FrozenModel
from common.errors import UserError
from models.training.batches import Batches
from models.training.config import Portion
from models.training.shards import ShardCounts
from models.training.sources import Source
from tasks.stage import Context, gathered

DESCRIPTION = "tokens.json"


class _Described(FrozenModel):
    """A part of the description of tokens, which says more than is read here."""

    model_config = ConfigDict(extra="ignore")


class _Shard(_Described):
    name: str
    tokens: int
    documents: int


class _Split(_Described):
    lengths: tuple[tuple[int, int], ...]
    shards: tuple[_Shard, ...]


class _Description(_Described):
    pad_id: int
    bos_id: int | None
    eos_id: int | None
    loss_on: str | None = None
    splits: dict[str, _Split]


@dataclass(frozen=True)
class TokensInput:
    """One of the tokens artifacts of a stage."""

    name: str
    """What the stage that made it is called."""
    folder: Path
    """The artifact, without the shards."""
    portion: Portion
    """How much is drawn of it."""
    special_ids: Mapping[str, int | None]
    """What stands before and after its documents, and what fills up a batch."""
    loss_on: str | None
    """Which of its tokens are trained on; None in tokens that do not say."""
    splits: Mapping[str, Source]
    """Its splits as sources."""


def tokens_inputs(inputs: Mapping[str, Path], blend: Sequence[Portion], context: Context) -> list[TokensInput]:
    """The tokens artifacts of a stage, in the recipe's order, with their portions: equal ones where `blend` has none.

    Raises UserError where a description is not one, where the tokenizers or what they put around documents differ, and
    where there are not as many portions as artifacts.
    """
    folders = gathered(inputs, "tokens")
    if blend and len(blend) != len(folders):
        raise UserError(f"blend has {len(blend)} portions, and there are {len(folders)} tokens; give each one")
    names = _names(list(folders), context)
    portions = blend or [Portion()] * len(folders)
    found = [
        _tokens_input(name, folder, portion, key, context)
        for name, (key, folder), portion in zip(names, folders.items(), portions, strict=True)
    ]
    for other in found[1:]:
        if _tokenizer(other.folder) != _tokenizer(found[0].folder):
            raise UserError(
                f"the tokens '{found[0].name}' and '{other.name}' were made with different tokenizers: "
                f"give both stages the same one"
            )
        for role, own in found[0].special_ids.items():
            if other.special_ids[role] != own:
                raise UserError(
                    f"the tokens '{found[0].name}' and '{other.name}' have different {role} tokens ({own} and "
                    f"{other.special_ids[role]}): make them with the same tokenizer and the same bos and eos"
                )
    return found


def _names(keys: Sequence[str], context: Context) -> list[str]:
    """What the inputs are called; with a number where the stages of two recipes that made them have the same name."""
    names = [context.labels.get(key, key) for key in keys]
    often = Counter(names)
    return [name if often[name] == 1 else f"{name}-{number}" for number, name in enumerate(names)]


def _tokenizer(folder: Path) -> bytes:
    return (folder / "tokenizer" / "tokenizer.json").read_bytes()


def _tokens_input(name: str, folder: Path, portion: Portion, key: str, context: Context) -> TokensInput:
    path = folder / DESCRIPTION
    try:
        description = _Description.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} does not describe tokens ({reason}); make the tokens '{name}' again") from error
    for split, counts in description.splits.items():
        documents, tokens = (sum(getattr(shard, what) for shard in counts.shards) for what in ("documents", "tokens"))
        lengths = sum(count for _, count in counts.lengths), sum(length * count for length, count in counts.lengths)
        if lengths != (documents, tokens):
            raise UserError(
                f"{path} contradicts itself: the {split} shards have {documents:,} documents and {tokens:,} tokens, "
                f"the lengths {lengths[0]:,} and {lengths[1]:,}; make the tokens '{name}' again"
            )
    splits = {
        split: Source(
            name,
            split,
            [ShardCounts(shard.name, shard.tokens, shard.documents) for shard in counts.shards],
            counts.lengths,
            functools.partial(context.fetch, key),
            portion,
        )
        for split, counts in description.splits.items()
    }
    special_ids = {"bos": description.bos_id, "eos": description.eos_id, "pad": description.pad_id}
    return TokensInput(name, folder, portion, special_ids, description.loss_on, splits)


def blend_rows(tokens: Sequence[TokensInput], batches: Batches, steps: int) -> list[dict[str, Any]]:
    """What was asked for of each source and what `steps` steps have had, for the record.

    Shares are fractions of all tokens; what is cut and dropped is said of one epoch.
    """
    drawn = batches.drawn(steps)
    total = sum(source.tokens for source in drawn)
    return [
        {
            "source": summary.name,
            "weight": one.portion.weight,
            "budget": one.portion.budget,
            "epochs_at_most": one.portion.epochs,
            "share_asked": summary.share,
            "share": had.tokens / total if total else None,
            "tokens": had.tokens,
            "rows": had.rows,
            "epochs": had.epochs,
            "used_up_at_step": had.used_up_at,
            "cut_documents": summary.cut_documents,
            "dropped_tokens": summary.dropped_tokens,
        }
        for one, summary, had in zip(tokens, batches.sources, drawn, strict=True)
    ]
