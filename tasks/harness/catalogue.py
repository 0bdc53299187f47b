"""The tasks of lm-eval by name, without its index, which takes 20 seconds to build: the lines of its YAML files that
name tasks, groups and tags are read as text, and of a task that is asked for its own files alone are parsed.
"""

import difflib
import functools
import importlib.metadata
import importlib.util
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from common.errors import UserError

GROUPS: Mapping[str, tuple[str, ...]] = {
    "seed": (
        *("winogrande", "copa", "boolq", "wsc273", "truthfulqa_mc1", "truthfulqa_mc2", "arc_easy", "arc_challenge"),
        *("openbookqa", "hellaswag", "agieval_aqua_rat", "commonsense_qa"),
    )
}
"""Groups of Cairn's own: `seed` has the benchmarks of the cards of the projects that it began with."""
NEAREST = 3
_KEY = re.compile(
    r"""^["']?(task|group|tag|include|class)["']?[ \t]*:[ \t]*(.*)((?:\n[ \t]*-[ \t].*)*)""", re.MULTILINE
)


class Leaf(NamedTuple):
    """A task that is no group."""

    name: str
    num_fewshot: int | None = None
    """Examples before each question, where the group that it stands in says so."""


class _Named(NamedTuple):
    """What a YAML file says of names, includes unresolved."""

    tasks: list[str]
    """One name, or the members of a group as far as they are plain names."""
    group: str | None
    tags: list[str] | None
    """None where it says nothing of tags."""
    includes: list[str]


def harness_version() -> str:
    """The version of lm-eval that is installed. Raises UserError where none is."""
    try:
        return importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError("benchmarks need lm-eval; run: pip install 'cairn[eval]'") from error


def leaves(names: Sequence[str]) -> list[Leaf]:
    """The tasks that names stand for, each once: a task for itself, a group or tag for all of its members.

    Raises UserError with the nearest names for one that does not exist.
    """
    found: dict[str, Leaf] = {}
    for name in names:
        for leaf in _members(name, ()):
            found.setdefault(leaf.name, leaf)
    return list(found.values())


def task_path(name: str) -> Path:
    """The YAML file of a task. Raises UserError with the nearest names where there is none."""
    path = _find(name, is_group=False)
    if path is None:
        raise _unknown(name)
    return path


def group_definition(name: str) -> dict[str, Any] | None:
    """What lm-eval's file of a group says; None for what is no group of its: tasks, tags, and Cairn's own groups."""
    path = None if name in GROUPS or _find(name, is_group=False) else _find(name, is_group=True)
    return None if path is None else definition(path)


def definition(path: Path) -> dict[str, Any]:
    """What a YAML file and those that it includes say; functions that they name are left as text, and not imported."""
    return _definition(path.resolve(), ())


def _definition(path: Path, within: tuple[Path, ...]) -> dict[str, Any]:
    if path in within:
        raise UserError(f"{path} includes itself")
    own = yaml.load(path.read_bytes(), Loader=_Loader)  # which is a safe one
    if not isinstance(own, dict):
        raise UserError(f"{path} defines no task")
    included = own.pop("include", ())
    merged: dict[str, Any] = {}
    for name in [included] if isinstance(included, str) else included:
        merged |= _definition((path.parent / name).resolve(), (*within, path))
    merged.pop("task_list", None)
    return merged | own


class _Loader(yaml.SafeLoader):
    """Takes `!function` for text."""


def _as_text(loader: _Loader, node: yaml.Node) -> str:
    assert isinstance(node, yaml.ScalarNode)
    return str(loader.construct_scalar(node))


_Loader.add_constructor("!function", _as_text)


def _members(name: str, within: tuple[str, ...]) -> Iterator[Leaf]:
    if name in within:
        raise UserError(f"the group '{name}' is a member of itself")
    if name in GROUPS:
        yield from (Leaf(member) for member in GROUPS[name])
        return
    if _find(name, is_group=False) is not None:
        yield Leaf(name)
        return
    group = _find(name, is_group=True)
    if group is not None:
        for member in definition(group).get("task") or ():
            yield from _member(member, (*within, name))
        return
    tagged = sorted(_tagged(name))
    if not tagged:
        raise _unknown(name)
    yield from map(Leaf, tagged)


def _member(member: str | Mapping[str, Any], within: tuple[str, ...]) -> Iterator[Leaf]:
    """What an entry of a group's list stands for. Raises UserError for one that changes more of a task than its
    examples: its score is that of no task that has a name."""
    if isinstance(member, str):
        yield from _members(member, within)
        return
    changed = member.keys() - {"task", "group", "task_alias", "group_alias", "num_fewshot", "aggregate_metric_list"}
    inner = member.get("task") if isinstance(member.get("task"), str) else None
    if isinstance(member.get("task"), list):
        for one in member["task"]:
            yield from _member(one, within)
        return
    name = inner or str(member.get("group"))
    if changed:
        raise UserError(
            f"the group '{within[-1]}' changes {', '.join(sorted(changed))} of '{name}'; name the tasks that are meant "
            "one by one"
        )
    for leaf in _members(name, within):
        yield leaf._replace(num_fewshot=member.get("num_fewshot", leaf.num_fewshot))


def _unknown(name: str) -> UserError:
    known = {*GROUPS, *_all_names()}
    near = difflib.get_close_matches(name, known, n=NEAREST, cutoff=0.0)
    return UserError(
        f"lm-eval {harness_version()} has no task '{name}'; the nearest names are: {', '.join(sorted(near))}"
    )


@functools.cache
def tasks_folder() -> Path:
    """The folder of lm-eval's own tasks. Raises UserError where lm-eval is not installed."""
    harness_version()
    found = importlib.util.find_spec("lm_eval")
    assert found is not None
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "tasks"


@functools.cache
def _paths() -> tuple[str, ...]:
    """Every YAML file, from the folder of tasks on, in lm-eval's order."""
    root = str(tasks_folder())
    found = []
    for folder, _, files in os.walk(root):
        found += [f"{folder[len(root) :]}/{file}" for file in files if file.endswith(".yaml")]
    return tuple(sorted(found))


def _find(name: str, *, is_group: bool) -> Path | None:
    """The first file, in lm-eval's order, that defines a name; those that look like it are read first."""
    own, like = f"/{name}.yaml", f"/{name[:4]}"
    for path in sorted(_paths(), key=lambda path: 0 if path.endswith(own) else 1 if like in path else 2):
        named = _named(path)
        if (named.group if is_group else None if named.group else next(iter(named.tasks), None)) == name:
            return _place(path)
    return None


def _place(path: str) -> Path:
    return Path(f"{tasks_folder()}{path}")


@functools.cache
def _named(path: str) -> _Named:
    found: dict[str, list[str]] = {}
    for key, value, items in _KEY.findall(_place(path).read_text(encoding="utf-8")):
        found[key] = [_plain(value)] if _plain(value) else [_plain(item.strip()[1:]) for item in items.split("\n")[1:]]
    # A task that is written in Python may name a group that it belongs to, and is none.
    group = None if "class" in found else next(iter(found.get("group", ())), None)
    return _Named(found.get("task", []), group, found.get("tag"), found.get("include", []))


def _plain(value: str) -> str:
    """A scalar of YAML without its quotes and what is said behind it."""
    text = value.strip()
    if text[:1] in ("'", '"'):
        return text[1:].partition(text[0])[0]
    return text.partition(" #")[0].strip()


def _tags(path: str) -> Iterable[str]:
    named = _named(path)
    if named.tags is not None:
        return named.tags
    included = [posixpath.normpath(posixpath.join(posixpath.dirname(path), name)) for name in named.includes]
    return [tag for name in included if _place(name).is_file() for tag in _tags(name)]


def _tagged(tag: str) -> set[str]:
    return {
        named.tasks[0]
        for path in _paths()
        if (named := _named(path)).tasks and named.group is None and tag in _tags(path)
    }


def _all_names() -> set[str]:
    found: set[str] = set()
    for path in _paths():
        named = _named(path)
        found |= {named.group} if named.group else set(named.tasks[:1])
        found |= set(_tags(path)) if named.tasks else set()
    return found
