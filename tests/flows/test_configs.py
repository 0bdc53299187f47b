"""Every configuration is frozen, refuses unknown keys, and describes each of its fields."""

import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from common.config import FrozenModel
from flows.controls import Control
from flows.recipe import RecipeFile
from flows.written import Rounds
from tasks.registry import STAGES
from tasks.stage import Runtime


def configs() -> Iterator[type[FrozenModel]]:
    seen: set[type[FrozenModel]] = set()
    waiting: list[Any] = [RecipeFile, Rounds, Control, Runtime, *(stage.config for stage in STAGES.values())]
    while waiting:
        annotation = waiting.pop()
        if isinstance(annotation, type) and issubclass(annotation, FrozenModel):
            if annotation not in seen:
                seen.add(annotation)
                yield annotation
                waiting += [field.annotation for field in annotation.model_fields.values()]
        elif typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, list, dict):
            waiting += typing.get_args(annotation)


@pytest.mark.parametrize("config", list(configs()), ids=lambda config: f"{config.__module__}.{config.__name__}")
def test_every_field_is_described(config: type[FrozenModel]) -> None:
    assert config.__doc__
    for name, field in config.model_fields.items():
        assert field.description, f"{config.__name__}.{name} has no description"
    assert config.model_config["frozen"]
    assert config.model_config["extra"] == "forbid"


def test_a_config_cannot_change() -> None:
    runtime = Runtime()
    with pytest.raises(ValidationError, match="frozen"):
        runtime.retries = 3  # type: ignore[misc]
