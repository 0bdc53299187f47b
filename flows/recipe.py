"""Recipes: one YAML file describes a whole run, and is checked whole before anything runs."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from common.config import FrozenModel
from common.errors import UserError, suggestion
from common.strict_yaml import StrictLoader
from flows.controls import CONTROL, CONTROLLED, controls
from flows.entry import StageEntry
from flows.problems import first_problem
from flows.written import GROW, Written, written
from models.engine import EngineName, Precision, check_abilities, check_engine
from models.machine import default_engine, engine_for
from tasks.registry import STAGES
from tasks.stage import Runtime, Stage, Worker

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
RECIPES = Path(__file__).parent / "recipes"


class RecipeFile(FrozenModel):
    """A recipe as it is written."""

    description: str = Field(min_length=1)
    """What the run is for, in a line."""
    engine: EngineName | None = None
    """The engine of every stage that names none; null for the one that suits its worker: MLX on Apple Silicon, JAX on
    a TPU, else PyTorch; on the machine where the recipe is loaded, of those that are installed."""
    precision: Precision = "float32"
    """The precision of every stage that names none."""
    worker: Worker = "local"
    """Where every stage runs that does not say."""
    stages: dict[str, dict[str, Any]] = Field(min_length=1)
    """The stages by name, in order. Each has `stage` (its kind), its inputs by name (an earlier stage each), the keys
    of its config, and those of Runtime. Two are shorthand: `stage: grow` for several rounds of growth, see
    `flows.written`, and the key `control` of a refinement for a model from scratch, see `flows.controls`."""


class Recipe(FrozenModel):
    """A whole run: an ordered list of named stages."""

    name: str
    """The recipe's name: its file's, without the ending."""
    source: str
    """The name or path that it was loaded by."""
    description: str
    """What the run is for."""
    stages: tuple[StageEntry, ...]
    """The stages; each reads only from those before it."""


def known_recipes() -> dict[str, Path]:
    """The recipes that come with Cairn, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def load_recipe(
    name_or_path: str, overrides: Sequence[str] = (), resolve: bool = True, continue_on: EngineName | None = None
) -> Recipe:
    """Reads and checks a recipe; `overrides` are `key.path=value`.

    `resolve`: whether what its configs point at (data sets, files) is looked for and made fast; a recipe that was
    loaded without can be looked at and not be run. `continue_on`: the engine that goes on with what is not done yet,
    and so has to be there in place of those that the recipe names.

    Raises UserError that names the file, the key's path, what is wrong with it, and the nearest known key.
    """
    path = _find(name_or_path)
    content = _read_yaml(path)
    for override in overrides:
        _override(content, override)
    try:
        file = RecipeFile.model_validate(content)
    except ValidationError as error:
        raise UserError(f"recipe {path}: {first_problem(error, RecipeFile)}") from error
    stages: dict[str, StageEntry] = {}
    try:
        for one in written(file.stages, stages):
            stages[one.name] = _stage(one, file, stages, resolve, continue_on)
            for more in controls(one, stages[one.name], stages) if one.keys.get("stage") == CONTROLLED else ():
                if more.name in file.stages or more.name in stages:
                    raise UserError(f"{more.where} makes a stage '{more.name}', which is there already; rename that")
                stages[more.name] = _stage(more, file, stages, resolve, continue_on)
    except UserError as error:
        raise UserError(f"recipe {path}: {error}") from error
    return Recipe(name=path.stem, source=name_or_path, description=file.description, stages=tuple(stages.values()))


def _find(name_or_path: str) -> Path:
    known = known_recipes()
    if name_or_path in known:
        return known[name_or_path]
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"there is no recipe file {path}")
        if not _NAME.fullmatch(path.stem):
            raise UserError(f"recipe {path}: the name of its file has letters, digits, -, _ and . alone")
        return path
    raise UserError(f"there is no recipe '{name_or_path}'{suggestion(name_or_path, known)}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no UTF-8, or a date that is none
        where = " ".join(str(error).split())
        raise UserError(f"recipe {path} cannot be read: {where}") from error
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} is no mapping of keys; see `cairn recipes` for examples")
    try:
        return {key: _unshared(value) for key, value in content.items()}
    except RecursionError:
        raise UserError(f"recipe {path} cannot be read: one of its values contains itself") from None


def _unshared(value: Any) -> Any:
    """A copy in which no part stands twice: an override of one stage would else reach those that share an anchor."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def _override(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"--set {override!r} is not of the form key.path=value")
    try:
        value = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"--set {override!r}: the value is no YAML ({' '.join(str(error).split())})") from error
    *parents, last = path.split(".")
    place: dict[str, Any] | list[Any] = content
    for depth, key in enumerate(parents):
        inner = _at(place, key, override)
        wrong = ".".join(parents[: depth + 1])
        if inner is None and isinstance(place, dict) and depth != 1:
            # A key that the file leaves to its default; the models refuse it if it does not exist.
            inner = place[key] = {}
        if inner is None:
            raise UserError(f"--set {override!r}: there is no key '{wrong}'{suggestion(key, map(str, place))}")
        if isinstance(inner, list) and not [*parents, last][depth + 1].isdecimal():
            raise UserError(f"--set {override!r}: '{wrong}' is a list, which has numbers from 0 and no keys")
        if not isinstance(inner, dict | list):
            raise UserError(f"--set {override!r}: '{wrong}' is a value, which has no keys; give it whole")
        place = inner
    if isinstance(place, list):
        _at(place, last, override)
        place[int(last)] = value
    else:
        place[last] = value


def _at(place: dict[str, Any] | list[Any], key: str, override: str) -> Any:
    """What stands under a key, or None, or at a place of a list."""
    if isinstance(place, dict):
        return place.get(key)
    if int(key) >= len(place):
        raise UserError(f"--set {override!r}: there is no place {key} in a list of {len(place)}, counted from 0")
    return place[int(key)]


def _stage(
    one: Written,
    file: RecipeFile,
    before: Mapping[str, StageEntry],
    resolve: bool,
    continue_on: EngineName | None,
) -> StageEntry:
    if not _STAGE_NAME.fullmatch(one.name):
        raise UserError(f"{one.where}: a stage's name has letters, digits, - and _ alone")
    kind = one.keys.get("stage")
    if not isinstance(kind, str) or kind not in STAGES:
        raise UserError(f"{one.where}.stage: {kind!r} is no stage{suggestion(str(kind), {*STAGES, GROW})}")
    stage = STAGES[kind]
    inputs, portions = _inputs(one, stage)
    _check_inputs(one, stage, inputs, before)
    runtime_keys = {key: value for key, value in one.keys.items() if key in Runtime.model_fields}
    others = {"stage", *stage.inputs, *stage.optional_inputs, *Runtime.model_fields}
    if kind == CONTROLLED:
        others.add(CONTROL)
    config_keys = {key: value for key, value in one.keys.items() if key not in others}
    for key in portions.keys() & config_keys.keys():
        what = "names" if key in stage.named.values() else "shares"
        raise UserError(one.place(f"{key}: the {what} are written where the artifacts are named, not apart from them"))
    config_keys |= portions
    try:
        runtime = Runtime.model_validate({"worker": file.worker} | runtime_keys)
    except ValidationError as error:
        raise UserError(one.place(first_problem(error, Runtime))) from error
    if stage.has_engine:
        config_keys.setdefault("engine", file.engine or continue_on or _engine_on(runtime.worker))
    if "precision" in stage.config.model_fields:
        config_keys.setdefault("precision", file.precision)
    try:
        config_keys = stage.with_defaults(config_keys, inputs)
        config = stage.config.model_validate(config_keys)
        config = stage.resolved(config) if stage.resolved and resolve else config
    except ValidationError as error:
        problem = _as_written(first_problem(error, stage.config, others), stage, one.keys)
        raise UserError(one.place(problem)) from error
    except UserError as error:
        raise UserError(f"{one.where}: {error}") from error
    models = {key: model for key, value in inputs.items() if (model := before[value].model) is not None}
    try:
        if stage.has_engine:
            # Whether a worker has an engine is its own to say.
            check = check_engine if runtime.worker == "local" else check_abilities
            precision, bits = config_keys.get("precision", "float32"), getattr(config, "bits", None)
            check(continue_on or config_keys["engine"], precision, bits)
        model = stage.model_of(config, models) if stage.model_of else None
    except UserError as error:
        raise UserError(f"{one.where}: {error}") from error
    return StageEntry(name=one.name, stage=kind, inputs=inputs, config=config, runtime=runtime, model=model)


def _engine_on(worker: Worker) -> EngineName:
    return default_engine() if worker == "local" else engine_for(worker)


def _inputs(one: Written, stage: Stage) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The artifacts that a stage reads, by input, and what is said of inputs that are several, by config field.

    Several are written as a list of stages, or as a mapping from each to its weight or its portion.
    """
    inputs: dict[str, Any] = {}
    portions: dict[str, list[Any]] = {}
    for key in {**stage.inputs, **stage.optional_inputs}:
        value = one.keys.get(key)
        if value is None:
            continue
        if key in stage.named:
            portions[stage.named[key]] = list(value) if isinstance(value, list) else [value]
        several = (dict, list) if key in stage.many else (list,) if key in stage.named else ()
        if not isinstance(value, several):
            inputs[key] = value
            continue
        if not value:
            raise UserError(one.place(f"{key} names no stage"))
        if isinstance(value, list) and len(set(map(str, value))) != len(value):
            raise UserError(one.place(f"{key} names a stage twice"))
        inputs |= {f"{key}.{number}": source for number, source in enumerate(value)}
        if key in stage.many:
            shares = value.values() if isinstance(value, dict) else [{}] * len(value)
            portions[stage.many[key]] = [share if isinstance(share, dict) else {"weight": share} for share in shares]
    return inputs, portions


def _as_written(problem: str, stage: Stage, keys: Mapping[str, Any]) -> str:
    """A problem with the portion of an input, told by the names that the recipe has for it."""
    for key, field in stage.many.items():
        value = keys.get(key)
        for number, name in enumerate(value if isinstance(value, list | dict) else ()):
            if problem.startswith(f"{field}.{number}"):
                return f"{key}.{name}{problem.removeprefix(f'{field}.{number}')}"
    return problem


def _check_inputs(one: Written, stage: Stage, inputs: Mapping[str, Any], before: Mapping[str, StageEntry]) -> None:
    for key, kind in {**stage.inputs, **stage.optional_inputs}.items():
        named = [value for name, value in inputs.items() if name.partition(".")[0] == key]
        if not named and key in stage.inputs:
            raise UserError(one.place(f"{key} is missing: name the stage before it that makes the {kind}"))
        for source in named:
            _check_input(one, key, kind, source, before)
    scored = before[inputs["evaluation"]].inputs["model"] if "evaluation" in inputs else None
    if scored is not None and scored != inputs["model"]:
        raise UserError(
            f"{one.where}.evaluation: '{inputs['evaluation']}' is of the model '{scored}', not of '{inputs['model']}'"
        )


def _check_input(one: Written, key: str, kind: str, source: Any, before: Mapping[str, StageEntry]) -> None:
    where = one.place(key)
    if not isinstance(source, str) or source not in before:
        written_in = where.split(".")[1]
        raise UserError(f"{where}: there is no stage '{source}' before '{written_in}'{suggestion(str(source), before)}")
    made = before[source].definition.output
    if made != kind:
        fitting = [name for name, entry in before.items() if entry.definition.output == kind]
        raise UserError(
            f"{where}: stage '{source}' makes {made}, not {kind}; use {' or '.join(fitting) or 'a stage that does'}"
        )
