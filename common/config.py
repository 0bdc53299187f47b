"""The base of every configuration."""

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """A config that cannot change and refuses unknown keys.

    The docstring under a field is its description.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)
