"""The tokens that a training stage reads, as sources of batches: known by their descriptions alone."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError

from common.config import FrozenModel
from common.errors import UserError
from models.chat import END, START, Template, chat_of
from models.tokenizer import TOKENIZER_CONFIG, read_settings, text_roles
from models.training.batches import Batches
from models.training.config import Portion
from models.training.shards import ShardCounts
from models.training.sources import Source
from models.vocabulary import Vocabulary, extended_vocabulary
from tasks.encoding.conversations import LossOn
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
    template: Template | None = None
    loss_on: LossOn | None = None
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
    template: Template | None
    """The template of conversations; None for texts."""
    pairs: bool
    """Whether its documents are preferences, two to each."""
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
    for one, other in combinations(found, 2):
        _check_fit(one, other)
    return found


def tokenizer_folder(tokens: Sequence[TokensInput], model: Path | None = None) -> Path:
    """The tokenizer of a model that is trained on these: that of conversations where there are some, for it has the
    template; without any, that of a chat model that comes in, which stays one."""
    first = next((one for one in tokens if one.template is not None), None)
    if first is None and model is not None and chat_of(model / "tokenizer") is not None:
        return model / "tokenizer"
    return (first or tokens[0]).folder / "tokenizer"


def vocabulary_of(tokens: Sequence[TokensInput], model: Path) -> Vocabulary:
    """The tokens' vocabulary beside that of the model in a folder. Raises UserError where it is of another tokenizer
    than that which the model was trained with, and where other tokens stand around its texts."""
    try:
        vocabulary = extended_vocabulary(model / "tokenizer", tokenizer_folder(tokens))
    except UserError as error:
        raise UserError(
            f"the tokens '{tokens[0].name}' were made with another tokenizer than the model was trained with "
            f"({error}): make them with the model's own"
        ) from error
    for one in tokens:
        _check_roles(one, model)
    return vocabulary


def _check_roles(tokens: TokensInput, model: Path) -> None:
    """Raises UserError where a text would stand between other tokens than those that the model was trained with."""
    before, after = (text_roles(read_settings(of / "tokenizer" / TOKENIZER_CONFIG)) for of in (model, tokens.folder))
    if before is None or after is None or before == after:
        return
    if before.bos != after.bos:
        begins = "false" if before.bos == before.eos else "true"
        raise UserError(
            f"before the tokens '{tokens.name}' stands {after.bos}, where the model was trained with {before.bos}: set "
            f"bos: {begins} in the stage that makes them"
        )
    raise UserError(
        f"the tokens '{tokens.name}' have {after.eos} and {after.pad} as eos and pad tokens, where the model was "
        f"trained with {before.eos} and {before.pad}: make them with the model's own tokenizer"
    )


def _check_fit(one: TokensInput, other: TokensInput) -> None:
    """Raises UserError where one model could not be trained on both."""
    both = f"the tokens '{one.name}' and '{other.name}'"
    if _tokenizer(one.folder) != _tokenizer(other.folder):
        chatml = "chatml" in (one.template, other.template)
        having = f", which has {START} and {END} among its special_tokens" if chatml else ""
        raise UserError(f"{both} were made with different tokenizers: give both stages the same one{having}")
    if one.pairs != other.pairs:
        raise UserError(f"{both} cannot be blended: only one of them has preferences")
    if one.template and other.template and one.template != other.template:
        raise UserError(f"{both} have different templates ({one.template} and {other.template}): choose one")
    for role, own in one.special_ids.items():
        # A text is closed by <eos>, and a conversation by what its template says.
        if role == "eos" and one.template != other.template:
            continue
        if other.special_ids[role] != own:
            raise UserError(
                f"{both} have different {role} tokens ({own} and {other.special_ids[role]}): make them with the same "
                "tokenizer and the same bos and eos"
            )


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
    pairs = description.loss_on == "pairs"
    return TokensInput(name, folder, portion, special_ids, description.template, pairs, splits)


def blend_rows(tokens: Sequence[TokensInput], batches: Batches, steps: int) -> list[dict[str, Any]]:
    """What was asked for of each source and what `steps` steps have had, for the record.

    Shares are fractions of all tokens; what is cut, dropped and padded is said of one epoch.
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
            "padding": summary.padding,
        }
        for one, summary, had in zip(tokens, batches.sources, drawn, strict=True)
    ]
