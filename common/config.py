"""The base of every configuration."""

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """A config that cannot change and refuses unknown keys.

    The docstring under a field is its description, shown by `cairn recipes --schema` and in error messages.
    Types are strict in the direction that loses information: `"3"` is no integer and `1.5` neither.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, strict=False
    )
