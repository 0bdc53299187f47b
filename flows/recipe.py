"""Recipes: one YAML file describes a whole run, and is checked whole before anything runs."""

import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, SerializeAsAny, ValidationError

from common.config import FrozenModel
from common.errors import UserError, suggestion
from models.config import ModelConfig
from models.engine import EngineName, Precision, check_abilities, check_engine
from models.machine import default_engine, engine_for
from tasks.registry import STAGES, stage_named
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
    of its config, and those of Runtime."""


class StageEntry(FrozenModel):
    """One stage of a recipe."""

    name: str
    """Its name in the recipe."""
    stage: str
    """Its kind."""
    inputs: dict[str, str]
    """The stages whose output it reads, by the input's name."""
    config: SerializeAsAny[FrozenModel]
    """Its config, of the class that its kind has."""
    runtime: Runtime
    """Where and how carefully it runs."""
    model: ModelConfig | None
    """The model that it makes, where it makes one."""

    @property
    def definition(self) -> Stage:
        """The kind of stage."""
        return stage_named(self.stage)


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
        raise UserError(f"recipe {path}: {_first_problem(error, RecipeFile)}") from error
    stages: list[StageEntry] = []
    for name, keys in file.stages.items():
        try:
            stages.append(_stage(name, keys, file, {stage.name: stage for stage in stages}, resolve, continue_on))
        except UserError as error:
            raise UserError(f"recipe {path}: {error}") from error
    return Recipe(name=path.stem, source=name_or_path, description=file.description, stages=tuple(stages))


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
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no UTF-8, or a date that is none
        where = " ".join(str(error).split())
        raise UserError(f"recipe {path} cannot be read: {where}") from error
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} is no mapping of keys; see `cairn recipes` for examples")
    try:
        return {key: _unshared(value) for key, value in content.items()}
    except RecursionError:
        raise UserError(f"recipe {path} cannot be read: one of its values contains itself") from None


class _Loader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice, of which YAML keeps only the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key '{key.value}' stands twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


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
    place = content
    for depth, key in enumerate(parents):
        inner = place.get(key)
        if inner is None and depth != 1:
            # A key that the file leaves to its default; the models refuse it if it does not exist.
            inner = place[key] = {}
        if not isinstance(inner, dict):
            wrong = ".".join(parents[: depth + 1])
            if inner is not None:
                what = "a list" if isinstance(inner, list) else "a value"
                raise UserError(f"--set {override!r}: '{wrong}' is {what}, which has no keys; give it whole")
            raise UserError(f"--set {override!r}: there is no key '{wrong}'{suggestion(key, map(str, place))}")
        place = inner
    place[last] = value


def _stage(
    name: str,
    keys: Mapping[str, Any],
    file: RecipeFile,
    before: Mapping[str, StageEntry],
    resolve: bool,
    continue_on: EngineName | None,
) -> StageEntry:
    where = f"stages.{name}"
    if not _STAGE_NAME.fullmatch(name):
        raise UserError(f"{where}: a stage's name has letters, digits, - and _ alone")
    kind = keys.get("stage")
    if not isinstance(kind, str) or kind not in STAGES:
        raise UserError(f"{where}.stage: {kind!r} is no stage{suggestion(str(kind), STAGES)}")
    stage = STAGES[kind]
    known_inputs = {**stage.inputs, **stage.optional_inputs}
    inputs, portions = _inputs(where, stage, keys)
    _check_inputs(where, stage, inputs, before)
    runtime_keys = {"worker": file.worker} | {key: value for key, value in keys.items() if key in Runtime.model_fields}
    config_keys = {
        key: value
        for key, value in keys.items()
        if key != "stage" and key not in known_inputs and key not in Runtime.model_fields
    }
    for key in portions.keys() & config_keys.keys():
        raise UserError(f"{where}.{key}: the shares are written where the artifacts are named, not apart from them")
    config_keys |= portions
    try:
        runtime = Runtime.model_validate(runtime_keys)
    except ValidationError as error:
        raise UserError(f"{where}.{_first_problem(error, Runtime)}") from error
    if stage.has_engine:
        config_keys.setdefault("engine", file.engine or continue_on or _engine_on(runtime.worker))
    if "precision" in stage.config.model_fields:
        config_keys.setdefault("precision", file.precision)
    try:
        config = stage.config.model_validate(config_keys)
        config = stage.resolved(config) if stage.resolved and resolve else config
    except ValidationError as error:
        others = {"stage", *known_inputs, *Runtime.model_fields}
        problem = _as_written(_first_problem(error, stage.config, others), stage, keys)
        raise UserError(f"{where}.{problem}") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    models = {key: model for key, value in inputs.items() if (model := before[value].model) is not None}
    try:
        if stage.has_engine:
            # Whether a worker has an engine is its own to say.
            check = check_engine if runtime.worker == "local" else check_abilities
            precision, bits = config_keys.get("precision", "float32"), getattr(config, "bits", None)
            check(continue_on or config_keys["engine"], precision, bits)
        model = stage.model_of(config, models) if stage.model_of else None
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return StageEntry(name=name, stage=kind, inputs=inputs, config=config, runtime=runtime, model=model)


def _engine_on(worker: Worker) -> EngineName:
    return default_engine() if worker == "local" else engine_for(worker)


def _inputs(where: str, stage: Stage, keys: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The artifacts that a stage reads, by input, and the portions of inputs that are several, by config field.

    Several are written as a list of stages, or as a mapping from each to its weight or its portion.
    """
    inputs: dict[str, Any] = {}
    portions: dict[str, list[Any]] = {}
    for key in {**stage.inputs, **stage.optional_inputs}:
        value = keys.get(key)
        if value is None:
            continue
        if key not in stage.many or not isinstance(value, list | dict):
            inputs[key] = value
            continue
        if not value:
            raise UserError(f"{where}.{key} names no stage")
        if isinstance(value, list) and len(set(map(str, value))) != len(value):
            raise UserError(f"{where}.{key} names a stage twice")
        inputs |= {f"{key}.{number}": source for number, source in enumerate(value)}
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


def _check_inputs(where: str, stage: Stage, inputs: Mapping[str, Any], before: Mapping[str, StageEntry]) -> None:
    for key, kind in {**stage.inputs, **stage.optional_inputs}.items():
        named = [value for name, value in inputs.items() if name.partition(".")[0] == key]
        if not named and key in stage.inputs:
            raise UserError(f"{where}.{key} is missing: name the stage before it that makes the {kind}")
        for source in named:
            _check_input(f"{where}.{key}", kind, source, before)
    scored = before[inputs["evaluation"]].inputs["model"] if "evaluation" in inputs else None
    if scored is not None and scored != inputs["model"]:
        raise UserError(
            f"{where}.evaluation: '{inputs['evaluation']}' is of the model '{scored}', not of '{inputs['model']}'"
        )


def _check_input(where: str, kind: str, source: Any, before: Mapping[str, StageEntry]) -> None:
    if not isinstance(source, str) or source not in before:
        stage = where.split(".")[1]
        raise UserError(f"{where}: there is no stage '{source}' before '{stage}'{suggestion(str(source), before)}")
    made = before[source].definition.output
    if made != kind:
        fitting = [name for name, entry in before.items() if entry.definition.output == kind]
        raise UserError(
            f"{where}: stage '{source}' makes {made}, not {kind}; use {' or '.join(fitting) or 'a stage that does'}"
        )


def _first_problem(error: ValidationError, model: type[FrozenModel], others: set[str] | None = None) -> str:
    """The first of pydantic's complaints as `key.path: what; did you mean …?`."""
    problem = error.errors()[0]
    path, place = _walk(model, problem["loc"])
    where = ".".join(path) or "config"
    if problem["type"] == "extra_forbidden":
        known = (set(place.model_fields) if place else set()) | ((others or set()) if len(path) == 1 else set())
        return f"{where}: there is no such key{suggestion(path[-1], known)}"
    if problem["type"] == "missing":
        return f"{where} is missing"
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        context = problem["ctx"]
        tag = str(context["discriminator"]).strip("'")
        known_tags = [name.strip("' ") for name in context.get("expected_tags", "").split(",")]
        wrong = context.get("tag")
        return f"{where}.{tag}: " + (f"there is no {wrong!r}{suggestion(wrong, known_tags)}" if wrong else "is missing")
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if isinstance(problem["input"], dict) else f" (given: {problem['input']!r})"
    return f"{where}: {message[:1].lower()}{message[1:]}{given}"


def _walk(model: type[FrozenModel], location: Sequence[int | str]) -> tuple[list[str], type[FrozenModel] | None]:
    """The keys that lead to where pydantic found a problem, without the tags of unions, and the config that holds the
    last of them."""
    path: list[str] = []
    place: type[FrozenModel] | None = model
    choices: list[type[FrozenModel]] = []
    for part in location:
        tagged = [choice for choice in choices if len(choices) > 1 and part in _tags(choice)]
        if tagged:
            place, choices = tagged[0], []
            continue
        path.append(str(part))
        if isinstance(part, int):
            continue
        if len(choices) == 1:
            place, choices = choices[0], []
        field = place.model_fields.get(part) if place else None
        if field is not None:
            choices = list(_models_in(field.annotation))
    return path, place


def _tags(model: type[FrozenModel]) -> set[Any]:
    """The literals that tell a config from the others of its union."""
    return {
        tag
        for field in model.model_fields.values()
        if typing.get_origin(field.annotation) is typing.Literal
        for tag in typing.get_args(field.annotation)
    }


def _models_in(annotation: Any) -> Iterator[type[FrozenModel]]:
    """The configs that an annotation speaks of, in unions, tuples and mappings."""
    if isinstance(annotation, type) and issubclass(annotation, FrozenModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models_in(inner)
