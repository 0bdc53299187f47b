"""Stage `pretrained`: a model in the layout of `transformers`, from a folder or the Hugging Face hub, as an artifact
that can be evaluated, grown, refined and tuned like one that was trained here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from common.config import FrozenModel
from common.errors import UserError, one_line
from models.chat import chat_of
from models.config import ModelConfig
from models.hub_files import HUB_CONFIG, HUB_INDEX, HUB_WEIGHTS, read_object, read_weights, weight_files
from models.hub_reading import model_config
from models.tokenizer import (
    ADD_BOS_SETTING,
    CHAT_SETTING,
    SENTENCEPIECE_FILE,
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    read_settings,
    write_settings,
)
from models.weights import parameter_count
from tasks.checkpoint import ModelFolder, tokenizer_of, write_model
from tasks.corpus.digests import files_digest
from tasks.hub import folder_named, is_hub_id, local_copy, not_found
from tasks.stage import Context, Kind, Metrics, Stage
from tasks.vocabulary.hub import FILES, puts_bos, write_hub_tokenizer

_SMALL = (HUB_CONFIG, HUB_INDEX, *FILES)
"""What is fetched of a model on the network where its recipe is loaded; the weights are where the stage runs."""


class Config(FrozenModel):
    """Which model is taken in."""

    source: str = Field(min_length=1)
    """A folder with a `config.json`, such as one that was published, or an id on the hub, such as
    `openai-community/gpt2`. Relative paths start where `cairn` is run; ~ is the user's home."""
    revision: str | None = None
    """The commit (40 hexadecimal digits), branch or tag that is fetched from the network; Cairn fills in the commit.
    What lies on this machine is told by its digest."""
    digest: str | None = None
    """SHA-256 over the names and bytes of the files that are read; Cairn fills it in where they are on this machine,
    and refuses files that are not what it says."""


def is_model_source(text: str) -> bool:
    """Whether a text stands for a folder with a model, or may be the id of one on the hub, `owner/name`. What begins
    with `models/` is the name of an artifact, and no id."""
    owner, slash, _ = text.partition("/")
    return folder_named(text) is not None or bool(slash and owner != "models" and is_hub_id(text))


def resolved(config: Config) -> Config:
    """The config with the digest of the files on this machine, or with the commit on the network, from which all but
    the weights is fetched at once.

    Raises UserError where there is no such model, where its files are not what the digest says, and where its
    description or its files are already known to be of no use.
    """
    folder = _local(config)
    if folder is not None:
        return config.model_copy(update={"digest": _digest(folder, config.source)})
    folder = _downloaded(config, _SMALL)
    _check(folder, config.source)
    return config.model_copy(update={"revision": folder.name})


def model_of(config: Config, inputs: Mapping[str, ModelConfig]) -> ModelConfig:
    """The description of the model that comes out."""
    return _described(_here(config) or _downloaded(config, _SMALL))


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes a model artifact: weights as float32, no optimizer's state, and the tokenizer with its roles.

    Its history is empty, for nothing is known of its past. Adapters beside the weights are not read: a published
    folder has them in the weights. Raises UserError where the model is not to be had, and for what cannot be read.
    """
    folder = _here(config)
    if folder is None:
        small = _downloaded(config, _SMALL)
        shards = weight_files(small) if (small / HUB_INDEX).is_file() else ()
        folder = _downloaded(config, (*_SMALL, HUB_WEIGHTS, *shards))
    _check(folder, config.source)
    model = _described(folder)
    notes = _write_tokenizer(folder, context.output / "tokenizer", config.source)
    tokenizer_of(context.output, model)
    write_model(context.output, ModelFolder(model, read_weights(folder, model), None, None, ()))
    parameters = parameter_count(model)
    summary = f"{model.architecture}, {parameters:,} parameters, from {config.source}"
    return {"summary": summary, "parameters": parameters, "notes": notes}


def _here(config: Config) -> Path | None:
    """The folder of a model on this machine, or None for one on the network, by a config that is resolved: a commit
    without a digest is on the network, whatever a worker has under the same name."""
    return None if config.revision and not config.digest else _local(config)


def _local(config: Config) -> Path | None:
    """The folder of a model on this machine; None where it may be on the network. Raises UserError where it has to be
    here, and is not or is not what the digest says."""
    source, digest = config.source, config.digest
    folder = folder_named(source)
    if folder is None:
        folder = local_copy("model", source)
        # A tokenizer may lie there alone.
        folder = folder if folder is not None and (folder / HUB_CONFIG).is_file() else None
    if digest is None or folder is None:
        if digest is not None:
            raise not_found("model", source, "it was not asked, for the recipe has the digest of a local copy")
        return folder
    found = _digest(folder, source)
    if found != digest:
        raise UserError(
            f"digest: the model in {folder} is not what its digest says ({found[:12]}): it has changed; run again, and "
            "take the digest out of the recipe where it was written there"
        )
    return folder


def _digest(folder: Path, source: str) -> str:
    """The digest over all files that are read. Raises UserError where one is missing that has to be there."""
    _check(folder, source)
    names = sorted({HUB_CONFIG, HUB_INDEX, *FILES, *weight_files(folder)})
    return files_digest({name: folder / name for name in names if (folder / name).is_file()})


def _check(folder: Path, source: str) -> None:
    """Raises UserError where a model has no description that can be read, or no tokenizer."""
    if not (folder / HUB_CONFIG).is_file():
        raise UserError(f"there is no model in {source}: it has no {HUB_CONFIG}")
    _described(folder)
    if not any((folder / name).is_file() for name in (TOKENIZER_FILE, SENTENCEPIECE_FILE)):
        raise UserError(
            f"model '{source}' has no tokenizer: neither {TOKENIZER_FILE} nor {SENTENCEPIECE_FILE} is in {folder}"
        )


def _described(folder: Path) -> ModelConfig:
    path = folder / HUB_CONFIG
    return model_config(read_object(path), str(path))


def _write_tokenizer(source: Path, folder: Path, name: str) -> list[str]:
    """Writes the tokenizer of a model with what of its settings Cairn goes by; gives what is to be known of it."""
    folder.mkdir()
    notes = write_hub_tokenizer(source, folder, name, model=read_object(source / HUB_CONFIG))
    path = folder / TOKENIZER_CONFIG
    settings = read_settings(path)
    kept: dict[str, Any] = {ADD_BOS_SETTING: True} if puts_bos(source, settings["bos_token"]) else {}
    if (source / TOKENIZER_CONFIG).is_file():
        own = read_settings(source / TOKENIZER_CONFIG)
        kept |= {CHAT_SETTING: own[CHAT_SETTING]} if CHAT_SETTING in own else {}
    write_settings(path, {**settings, **kept})
    chat_of(folder)  # raises UserError for a template that is none
    return notes


def _downloaded(config: Config, names: tuple[str, ...]) -> Path:
    """The folder in which `huggingface_hub` keeps files at a commit, named after it; fetched unless it has them."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(config.source, revision=config.revision, allow_patterns=[*names]))
    except Exception as error:  # the network has as many errors as libraries
        raise not_found("model", config.source, one_line(error)) from error


STAGE = Stage(
    name="pretrained",
    version=1,
    config=Config,
    output=Kind.MODEL,
    run=run,
    resolved=resolved,
    model_of=model_of,
)
