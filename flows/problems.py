"""What pydantic finds wrong with a config, as a line with the key's path."""

import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from common.config import FrozenModel
from common.errors import suggestion


def first_problem(error: ValidationError, model: type[FrozenModel], others: set[str] | None = None) -> str:
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
