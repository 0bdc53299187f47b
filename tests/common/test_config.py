import pytest
from pydantic import ValidationError

from common.config import FrozenModel


class Example(FrozenModel):
    """An example."""

    size: int = 1
    """How large it is."""


def test_a_config_cannot_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Example().size = 2  # type: ignore[misc]


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Example.model_validate({"sise": 1})


def test_a_number_with_a_fraction_is_no_integer() -> None:
    with pytest.raises(ValidationError, match="valid integer"):
        Example.model_validate({"size": 1.5})


def test_the_docstring_under_a_field_is_its_description() -> None:
    assert Example.model_fields["size"].description == "How large it is."


def test_defaults_are_checked_too() -> None:
    class Wrong(FrozenModel):
        size: int = "many"  # type: ignore[assignment]

    with pytest.raises(ValidationError, match="valid integer"):
        Wrong()
