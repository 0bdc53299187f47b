"""Tokenizers of the Hugging Face hub: below `CAIRN_HUB`, else from the network."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import canonical_json, sha256_bytes, sha256_file
from models.tokenizer import (
    SENTENCEPIECE_FILE,
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    Roles,
    read_backend,
    read_roles,
    write_tokenizer,
)
from tasks.hub import local_copy, not_found
from tasks.vocabulary.config import Hub
from tasks.vocabulary.sentencepiece_conversion import convert, read_model

SPECIAL_TOKENS_FILE, CHAT_TEMPLATE_FILE = "special_tokens_map.json", "chat_template.jinja"
FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG, SPECIAL_TOKENS_FILE, CHAT_TEMPLATE_FILE, SENTENCEPIECE_FILE)
"""All that is read of a tokenizer; no code."""
SECONDS = 20.0
_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolved(config: Hub) -> Hub:
    """The config with the digest of the tokenizer's files below `CAIRN_HUB`, or the commit on the network.

    Raises UserError where the tokenizer is in neither place, and where its files are not what the digest says.
    """
    folder = local_copy("tokenizer", config.id)
    if folder is not None:
        digest = _digest(folder, config.id)
        if config.digest not in (None, digest):
            raise UserError(
                f"vocabulary.digest: tokenizer '{config.id}' in {folder} is not what its digest says ({digest[:12]}): "
                "it has changed; take the digest out of the recipe where it was written there"
            )
        return config.model_copy(update={"digest": digest})
    if config.digest is not None:
        raise not_found("tokenizer", config.id, "it was not asked, for the recipe has the digest of a local copy")
    return config.model_copy(update={"revision": _commit(config.id, config.revision)})


def files_of(config: Hub) -> Path:
    """A folder with the tokenizer's files. Raises UserError where they are nowhere to be had."""
    folder = local_copy("tokenizer", config.id)
    return _downloaded(config.id, config.revision) if folder is None else folder


def write_hub_tokenizer(source: Path, folder: Path, name: str, chat_template: str | None = None) -> None:
    """Writes the tokenizer of a hub folder with its ids, its roles, and its chat template unless another is given.

    A `tokenizer.model` is converted where there is no `tokenizer.json`, and kept. Raises UserError where neither can
    be read, and where no token closes a text.
    """
    settings = _settings(source)
    if (source / TOKENIZER_FILE).is_file():
        backend, roles = read_backend(source / TOKENIZER_FILE), None
    elif (source / SENTENCEPIECE_FILE).is_file():
        model = source / SENTENCEPIECE_FILE
        backend, roles = convert(read_model(model.read_bytes(), str(model)), str(model))
        shutil.copyfile(model, folder / SENTENCEPIECE_FILE)
    else:
        raise UserError(f"tokenizer '{name}' has neither {TOKENIZER_FILE} nor {SENTENCEPIECE_FILE} in {source}")
    roles = read_roles(settings) or roles
    if roles is None:
        raise UserError(f"tokenizer '{name}' names no eos_token; every tokenizer needs one")
    write_tokenizer(folder, backend, Roles(*roles), chat_template or settings.get("chat_template"))


def _settings(folder: Path) -> dict[str, Any]:
    """What the files beside the vocabulary say: the roles of tokens, and the chat template."""
    found: dict[str, Any] = {}
    for name in (SPECIAL_TOKENS_FILE, TOKENIZER_CONFIG):
        path = folder / name
        if not path.is_file():
            continue
        try:
            read = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error})") from error
        if not isinstance(read, dict):
            raise UserError(f"{path} cannot be read: it is no JSON object")
        found |= {key: value for key, value in read.items() if value is not None}
    template = folder / CHAT_TEMPLATE_FILE
    if template.is_file():
        found["chat_template"] = template.read_text(encoding="utf-8")
    return found


def _digest(folder: Path, name: str) -> str:
    paths = [folder / file for file in FILES if (folder / file).is_file()]
    if not paths:
        raise UserError(f"tokenizer '{name}' has none of {', '.join(FILES)} in {folder}")
    return sha256_bytes(canonical_json([[path.name, sha256_file(path)] for path in paths]))


def _commit(name: str, revision: str | None) -> str:
    """The commit that a revision is now. Raises UserError where the network does not say, and no cache has it."""
    import huggingface_hub

    if revision is not None and _COMMIT.fullmatch(revision) and _cached(name, revision):
        return revision
    try:
        return str(huggingface_hub.HfApi().model_info(name, revision=revision, timeout=SECONDS).sha)
    except Exception as error:  # the network has as many errors as libraries
        cached = _cached(name, revision)
        if cached is None:
            raise not_found("tokenizer", name, _one_line(error)) from error
        return cached.name


def _cached(name: str, revision: str | None) -> Path | None:
    """The folder in which `huggingface_hub` keeps a commit that was fetched before, named after the commit."""
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=[*FILES], local_files_only=True
        )
    except Exception:  # it raises several for what it has not
        return None
    return Path(folder)


def _downloaded(name: str, revision: str | None) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=[*FILES]))
    except Exception as error:
        raise not_found("tokenizer", name, _one_line(error)) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
