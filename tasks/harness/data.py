"""The data sets of lm-eval's tasks: from below `CAIRN_HUB` where they are there, else from the network at a commit."""

import ast
import posixpath
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError, one_line
from tasks.corpus.digests import files_digest
from tasks.corpus.file_source import names_below
from tasks.hub import is_hub_id, local_copy, not_found

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_FILE = re.compile(
    r"(?:hf://datasets/(?P<of>[^/@:]+/[^/@:]+)(?:@(?P<at>refs/\w+/\w+|[^/:]+))?"
    r"|https://huggingface\.co/datasets/(?P<from>[^/:]+/[^/:]+)/resolve/(?P<revision>refs/\w+/\w+|[^/:]+))"
    r"/(?P<file>[^:]+)"
)
"""A file of a data set on the hub as `data_files` name it, alone or inside an archive's address."""
_LIBRARIES = frozenset(
    ("datasets", "huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp", "fsspec")
)
"""Those that say of data that they cannot be had or read by errors of their own, or by ValueErrors that they raise."""


def data_sets(definition: Mapping[str, Any], folder: Path) -> dict[str, str | None]:
    """The ids of the data sets that a task's definition names, each with the revision that it asks for; none where only
    its code does. `folder`: where its modules are, which are read and not run."""
    options = definition.get("dataset_kwargs") or {}
    named = definition.get("dataset_path") or _path_of_class(definition.get("class"), folder)
    found: dict[str, str | None] = {}
    # With files, what has no owner is one of `datasets`' own readers; else a data set of the time before owners.
    if (
        isinstance(named, str)
        and is_hub_id(named)
        and ("/" in named or not options.keys() & {"data_files", "data_dir"})
    ):
        found[named] = options.get("revision")
    for text in _texts(options.get("data_files")):
        found |= {file.name: file.revision for file in map(_HubFile.of, _HUB_FILE.finditer(text))}
    return found


def identities(names: Mapping[str, str | None]) -> dict[str, str]:
    """What tells the contents of data sets, by id with the revision that is asked for: the digest of a local copy, or
    the commit on the network.

    Raises UserError where one is in neither place.
    """
    return {name: _digest(name) or _commit(name, revision) for name, revision in names.items()}


def check_unchanged(data: Mapping[str, str]) -> None:
    """Raises UserError where a data set is not what it was when it was looked at."""
    for name, identity in data.items():
        found = _digest(name)
        if found != identity and not (found is None and _COMMIT.fullmatch(identity)):
            raise UserError(f"data set '{name}' below CAIRN_HUB is not what it was ({identity[:12]}): run again")


@contextmanager
def offline_first(data: Mapping[str, str], cache: Path) -> Iterator[list[str]]:
    """Within the block, `datasets` reads the local copy of a data set where there is one, and others at their commits.
    lm-eval's tasks know no other way to their data, and nothing else is changed.

    `cache`: the folder for what `datasets` makes of the files.

    Yields what has been asked for so far: ids, and other files and readers as they were named. Raises UserError where
    data cannot be had or read; other errors pass.
    """
    import datasets

    # `load_dataset` itself, which some of lm-eval's modules keep from their first import on, asks it at each call.
    original = datasets.load.load_dataset_builder
    asked: list[str] = []
    places: dict[str, Path | None] = {}

    def load_dataset_builder(path: str, *arguments: Any, **options: Any) -> Any:
        options["cache_dir"] = str(cache)
        files = list(_texts(options.get("data_files")))
        named = dict.fromkeys(file.name for text in files for file in map(_HubFile.of, _HUB_FILE.finditer(text)))
        if _is_id(path, options):
            named = {path: None, **named}
        places.update({name: local_copy("dataset", name) for name in named})
        asked.extend(named or files or [path])
        options["data_files"] = _mapped(options.get("data_files"), data)
        if path not in named:
            return original(path, *arguments, **options)
        if (folder := places[path]) is not None:
            return original(str(folder), *arguments, **{**options, "revision": None})
        if _COMMIT.fullmatch(data.get(path, "")):
            options["revision"] = data[path]
        return original(path, *arguments, **options)

    datasets.load.load_dataset_builder = load_dataset_builder
    try:
        yield asked
    except Exception as error:
        if not _is_of_data(error):
            raise
        raise _unreadable(asked[-1] if asked else None, places, error) from error
    finally:
        datasets.load.load_dataset_builder = original


def _is_id(path: str, options: Mapping[str, Any]) -> bool:
    """Whether a path is a data set's id. With files, what has no owner is one of `datasets`' own readers; else it is a
    data set of the time before owners."""
    return is_hub_id(path) and ("/" in path or not (options.get("data_files") or options.get("data_dir")))


class _HubFile(NamedTuple):
    """A file of a data set on the hub."""

    name: str
    """The data set's id."""
    revision: str | None
    file: str

    @classmethod
    def of(cls, found: re.Match[str]) -> "_HubFile":
        revision = found["at"] or found["revision"]
        return cls(found["of"] or found["from"], None if revision == "main" else revision, found["file"])


def _mapped(files: Any, data: Mapping[str, str]) -> Any:
    """What `data_files` are with each file on the hub as a local one, or at its commit."""
    if isinstance(files, str):
        return _HUB_FILE.sub(lambda found: _place(found, data), files)
    if isinstance(files, Mapping):
        return {split: _mapped(some, data) for split, some in files.items()}
    return [_mapped(one, data) for one in files] if isinstance(files, list | tuple) else files


def _place(found: re.Match[str], data: Mapping[str, str]) -> str:
    """Raises UserError for a file that would be outside its data set's folder."""
    wanted = _HubFile.of(found)
    file = posixpath.normpath(wanted.file)
    if file.startswith(("../", "/")) or file == "..":
        raise UserError(f"{found[0]} leads out of the data set '{wanted.name}'")
    folder = local_copy("dataset", wanted.name)
    if folder is not None:
        return str(folder / file)
    commit = data.get(wanted.name, "")
    if not _COMMIT.fullmatch(commit):
        return found[0]
    if found["of"]:
        return f"hf://datasets/{wanted.name}@{commit}/{file}"
    return f"https://huggingface.co/datasets/{wanted.name}/resolve/{commit}/{file}"


def _texts(files: Any) -> Iterator[str]:
    """All that `data_files` name: one, several, or those of each split."""
    if isinstance(files, str):
        yield files
    elif isinstance(files, Mapping | list | tuple):
        for some in files.values() if isinstance(files, Mapping) else files:
            yield from _texts(some)


def _path_of_class(named: Any, folder: Path) -> Any:
    """The `DATASET_PATH` of a task that is written in Python, from `module.Class`, or one of its bases in the module;
    None where none says so."""
    module, _, name = str(named or "").rpartition(".")
    source = folder / f"{module.replace('.', '/')}.py"
    if not module or not source.is_file():
        return None
    classes = {node.name: node for node in ast.parse(source.read_bytes()).body if isinstance(node, ast.ClassDef)}
    waiting, seen = [name], set()
    while waiting:
        found = classes.get(waiting.pop(0))
        if found is None or found.name in seen:
            continue
        seen.add(found.name)
        for node in found.body:
            if isinstance(node, ast.Assign) and any(ast.unparse(one) == "DATASET_PATH" for one in node.targets):
                return node.value.value if isinstance(node.value, ast.Constant) else None
        waiting += [base.id for base in found.bases if isinstance(base, ast.Name)]
    return None


def _is_of_data(error: Exception) -> bool:
    """Whether an error says that data cannot be had or read, and is no defect."""
    if isinstance(error, ValueError):
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        kinds = [str(frame.f_globals.get("__name__"))]
    else:
        kinds = [kind.__module__ for kind in type(error).__mro__]
    return isinstance(error, OSError) or any(kind.partition(".")[0] in _LIBRARIES for kind in kinds)


def _unreadable(name: str | None, places: Mapping[str, Path | None], error: Exception) -> UserError:
    if name is None:
        return UserError(f"what lm-eval's code asks for cannot be had: {one_line(error)}")
    place = places.get(name)
    if place is None and name in places:
        return not_found("dataset", name, one_line(error))
    return UserError(f"data set '{name}' cannot be read{f' from {place}' if place else ''}: {one_line(error)}")


def _digest(name: str) -> str | None:
    folder = local_copy("dataset", name)
    return None if folder is None else files_digest({name: folder / name for name in sorted(names_below(folder))})


def _commit(name: str, revision: str | None) -> str:
    import huggingface_hub

    try:
        return str(huggingface_hub.HfApi().dataset_info(name, revision=revision).sha)
    except Exception as error:
        if not _is_of_data(error):
            raise
        raise not_found("dataset", name, one_line(error)) from error
