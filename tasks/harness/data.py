"""The data sets of lm-eval's tasks: from below `CAIRN_HUB` where they are there, else from the network at a commit."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UserError, one_line
from tasks.corpus.digests import files_digest
from tasks.corpus.file_source import names_below
from tasks.hub import local_copy, not_found

_COMMIT = re.compile(r"[0-9a-f]{40}")


def data_sets(definition: Mapping[str, Any]) -> list[str]:
    """The ids of the data sets that a task's definition names; none where only its code does."""
    named = definition.get("dataset_path")
    # Without an owner it is one of `datasets`' own readers of files, or a data set of the time before owners.
    return [named] if isinstance(named, str) and "/" in named and not Path(named).is_absolute() else []


def identities(names: list[str]) -> dict[str, str]:
    """What tells the contents of data sets: the digest of a local copy, or the commit on the network.

    Raises UserError where one is in neither place.
    """
    return {name: _digest(name) or _commit(name) for name in names}


def check_unchanged(data: Mapping[str, str]) -> None:
    """Raises UserError where a data set is not what it was when it was looked at."""
    for name, identity in data.items():
        if not _COMMIT.fullmatch(identity) and _digest(name) != identity:
            raise UserError(f"data set '{name}' below CAIRN_HUB is not what it was ({identity[:12]}): run again")


@contextmanager
def offline_first(data: Mapping[str, str], cache: Path | None = None) -> Iterator[None]:
    """Within the block, `datasets.load_dataset` gives the local copy of a data set where there is one, and others at
    their commits. lm-eval's tasks know no other way to their data, and nothing else is changed.

    `cache`: the folder for what `datasets` makes of the files; None for its own.
    """
    import datasets

    original = datasets.load_dataset

    def load_dataset(path: str, *arguments: Any, **options: Any) -> Any:
        options.pop("trust_remote_code", None)
        if cache is not None:
            options["cache_dir"] = str(cache)
        folder = local_copy("dataset", path) if "/" in path and not Path(path).is_absolute() else None
        if folder is None:
            commit = data.get(path, "")
            if _COMMIT.fullmatch(commit):
                options["revision"] = commit
            place = path
        else:
            options.pop("revision", None)
            place = str(folder)
        try:
            return original(place, *arguments, **options)
        except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
            if folder is None and "/" in path:
                raise not_found("dataset", path, one_line(error)) from error
            raise UserError(f"data set '{path}' cannot be read from {place}: {one_line(error)}") from error

    datasets.load_dataset = load_dataset
    try:
        yield
    finally:
        datasets.load_dataset = original


def _digest(name: str) -> str | None:
    folder = local_copy("dataset", name)
    return None if folder is None else files_digest({name: folder / name for name in sorted(names_below(folder))})


def _commit(name: str) -> str:
    import huggingface_hub

    try:
        return str(huggingface_hub.HfApi().dataset_info(name).sha)
    except Exception as error:  # the network has as many errors as libraries
        raise not_found("dataset", name, one_line(error)) from error
