"""The base of every configuration."""

import typing
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

_NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # how pydantic writes what JSON has no numbers for


class FrozenModel(BaseModel):
    """A config that cannot change and refuses unknown keys.

    The docstring under a field is its description.
    """

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_types_as_numbers(cls, values: Any) -> Any:
        """`true` is no number and neither is `"100"`, though pydantic would take both for one."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool | str) and field is not None:
                allowed = {field.annotation, *typing.get_args(field.annotation)}
                if allowed & {int, float} and type(value) not in allowed and value not in _NOT_FINITE:
                    raise ValueError(f"{name}: input should be a number (given: {value!r})")
        return values

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)
