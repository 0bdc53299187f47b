"""Tokenizers of the Hugging Face hub: in a folder, below `CAIRN_HUB`, else from the network."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from common.errors import UserError, one_line
from common.files import canonical_json, sha256_bytes, sha256_file
from models.tokenizer import (
    ADD_BOS_SETTING,
    SENTENCEPIECE_FILE,
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    Roles,
    read_backend,
    read_roles,
    write_tokenizer,
)
from tasks.hub import folder_named, local_copy, not_found
from tasks.vocabulary.config import Hub
from tasks.vocabulary.sentencepiece_conversion import convert, read_model
from tasks.vocabulary.written import byte_characters

SPECIAL_TOKENS_FILE, CHAT_TEMPLATE_FILE = "special_tokens_map.json", "chat_template.jinja"
FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG, SPECIAL_TOKENS_FILE, CHAT_TEMPLATE_FILE, SENTENCEPIECE_FILE)
"""All that is read of a tokenizer; no code."""


def resolved(config: Hub) -> Hub:
    """The config with the digest of the tokenizer's files below `CAIRN_HUB`, or the commit on the network, from which
    they are fetched at once: they are small, and then the run needs no network.

    Raises UserError where the tokenizer is in neither place, and where its files are not what the digest says.
    """
    folder = _local(config)
    if folder is not None:
        return config.model_copy(update={"digest": _digest(folder, config.id)})
    return config.model_copy(update={"revision": _downloaded(config.id, config.revision).name})


def files_of(config: Hub) -> Path:
    """A folder with the files of a tokenizer whose config is resolved.

    Raises UserError where they are nowhere to be had, or have changed since.
    """
    # A commit without a digest is on the network, whatever lies below a worker's own CAIRN_HUB.
    folder = None if config.revision and not config.digest else _local(config)
    return _downloaded(config.id, config.revision) if folder is None else folder


def _local(config: Hub) -> Path | None:
    folder = folder_named(config.id) or local_copy("tokenizer", config.id)
    if config.digest is None:
        return folder
    if folder is None:
        raise not_found("tokenizer", config.id, "it was not asked, for the recipe has the digest of a local copy")
    digest = _digest(folder, config.id)
    if config.digest != digest:
        raise UserError(
            f"vocabulary.digest: tokenizer '{config.id}' in {folder} is not what its digest says ({digest[:12]}): it "
            "has changed; run again, and take the digest out of the recipe where it was written there"
        )
    return folder


def write_hub_tokenizer(
    source: Path,
    folder: Path,
    name: str,
    chat_template: str | None = None,
    model: Mapping[str, Any] | None = None,
) -> list[str]:
    """Writes the tokenizer of a hub folder with its ids, its roles, and its chat template unless another is given;
    gives what is to be known of it.

    `model`: the `config.json` of its model, whose ids name the roles where the tokenizer's own files name none, as
    those of GPT-2 do. A `tokenizer.model` is converted where there is no `tokenizer.json`, and kept. Raises UserError
    where neither can be read, and where no token closes a text.
    """
    settings = _settings(source)
    roles, notes = read_roles(settings), list[str]()
    if (source / TOKENIZER_FILE).is_file():
        backend = read_backend(source / TOKENIZER_FILE)
    elif (source / SENTENCEPIECE_FILE).is_file():
        sentencepiece = source / SENTENCEPIECE_FILE
        parsed = read_model(sentencepiece.read_bytes(), str(sentencepiece))
        backend, own_roles, notes = convert(parsed, str(sentencepiece))
        roles = roles or own_roles
        shutil.copyfile(sentencepiece, folder / SENTENCEPIECE_FILE)
    else:
        raise UserError(f"tokenizer '{name}' has neither {TOKENIZER_FILE} nor {SENTENCEPIECE_FILE} in {source}")
    roles = roles or _roles_of(backend, model or {})
    if roles is None:
        raise UserError(f"tokenizer '{name}' names no eos_token; every tokenizer needs one")
    write_tokenizer(folder, backend, roles, chat_template or settings.get("chat_template"))
    return [*notes, *_lacking(backend)]


def _roles_of(backend: Backend, model: Mapping[str, Any]) -> Roles | None:
    """The roles that a model's description gives by their ids."""
    tokens: dict[str, Any] = {}
    for role in Roles._fields:
        found = model.get(f"{role}_token_id")
        # Several may end a text; the first is the one that is written.
        first = found[0] if isinstance(found, list) and found else found
        if type(first) is int and 0 <= first < 1 << 32:
            tokens[f"{role}_token"] = backend.id_to_token(first)
    return read_roles(tokens)


def puts_bos(folder: Path, bos: str) -> bool:
    """Whether the tokenizer of a hub folder, of which `bos` is the bos token, puts it before a text by itself: by the
    post-processor of its `tokenizer.json`, or as its settings say; a `tokenizer.model` alone does unless they say
    otherwise, as LlamaTokenizer has it.

    Raises UserError where its files cannot be read.
    """
    whole = folder / TOKENIZER_FILE
    said = _settings(folder).get(ADD_BOS_SETTING)
    if not whole.is_file():
        return said is not False
    return said is True or _opens_with(json.loads(read_backend(whole).to_str())["post_processor"], bos)


def _opens_with(processor: Any, token: str) -> bool:
    """Whether a post-processor, as the library writes it, puts a token before a text."""
    kind = processor.get("type") if isinstance(processor, dict) else None
    if kind == "Sequence":
        return any(_opens_with(part, token) for part in processor["processors"])
    if kind == "TemplateProcessing":
        pieces, special = processor["single"], processor["special_tokens"]
        first = pieces[0].get("SpecialToken", {}).get("id") if pieces else None
        return first in special and bool(special[first]["tokens"][0] == token)
    return kind in ("BertProcessing", "RobertaProcessing") and bool(processor["cls"][0] == token)


def _lacking(backend: Backend) -> list[str]:
    """Says which bytes of UTF-8 a byte-level vocabulary has no tokens for: they are left out of a text."""
    if not isinstance(backend.decoder, decoders.ByteLevel):
        return []
    known = backend.get_vocab()
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}
    lacking = [byte for byte, name in enumerate(byte_characters()) if name not in known and byte not in never]
    listed = " ".join(f"{byte:02X}" for byte in lacking)
    return [f"the vocabulary has no tokens for the bytes {listed}, which are left out of texts"] if lacking else []


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
        try:
            found["chat_template"] = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{template} cannot be read ({error})") from error
    return found


def _digest(folder: Path, name: str) -> str:
    paths = [folder / file for file in FILES if (folder / file).is_file()]
    if not paths:
        raise UserError(f"tokenizer '{name}' has none of {', '.join(FILES)} in {folder}")
    return sha256_bytes(canonical_json([[path.name, sha256_file(path)] for path in paths]))


def _downloaded(name: str, revision: str | None) -> Path:
    """The folder in which `huggingface_hub` keeps the files at a commit, named after it; fetched unless it has them."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=[*FILES]))
    except Exception as error:  # the network has as many errors as libraries
        raise not_found("tokenizer", name, one_line(error)) from error
