"""Where data sets, tokenizers and models are found: below the folder `CAIRN_HUB`, laid out as on the Hugging Face hub,
before the network is asked."""

import os
import re
from pathlib import Path
from typing import Literal

from common.errors import UserError

HUB_VARIABLE = "CAIRN_HUB"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?")
What = Literal["dataset", "tokenizer", "model"]


def hub_folder() -> Path | None:
    """The folder that `CAIRN_HUB` names, or None where it is not set. Raises UserError where it does not exist."""
    named = os.environ.get(HUB_VARIABLE)
    if not named:
        return None
    folder = Path(named).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"{HUB_VARIABLE} is {named}, and there is no such folder")
    return folder


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of an id on the hub."""
    return bool(_ID.fullmatch(text)) and ".." not in text


def folder_named(text: str) -> Path | None:
    """The folder that a text stands for where an id may stand too: one that begins as a path does, whether or not it
    is there, or that is there; None for what can only be an id. ~ is the user's home."""
    path = Path(text).expanduser()
    return path if text.startswith((".", "~", "/")) or path.is_dir() else None


def local_copy(what: What, hub_id: str) -> Path | None:
    """The folder of what has an id below `CAIRN_HUB`; None where it is not there or the variable is not set.

    Raises UserError for an id that is none, such as one that leads out of the folder.
    """
    if not is_hub_id(hub_id):
        raise UserError(f"{hub_id!r} is no id of a {what} on the hub: it has the form owner/name")
    hub = hub_folder()
    if hub is None:
        return None
    places = {
        "dataset": [hub / hub_id],
        "tokenizer": [hub / "models" / hub_id, hub / hub_id],
        "model": [hub / "models" / hub_id],
    }[what]
    return next((place for place in places if place.is_dir()), None)


def not_found(what: What, hub_id: str, why: str) -> UserError:
    """The error for an id that is in neither place; `why` is what the network answered."""
    hub = hub_folder()
    here = f"not below {HUB_VARIABLE}={hub}" if hub else f"{HUB_VARIABLE} is not set"
    return UserError(f"{what} '{hub_id}' was not found: {here}, and the Hugging Face hub answered: {why}")
