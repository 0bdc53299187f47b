import pytest
import yaml

from common.strict_yaml import StrictLoader


def test_a_key_that_stands_twice_is_refused() -> None:
    assert yaml.load("a: {b: 1, c: [x, {b: 2}]}", StrictLoader) == {"a": {"b": 1, "c": ["x", {"b": 2}]}}
    for text in ("a: 1\nb: 2\na: 3", "- {b: 1, b: 1}"):
        with pytest.raises(yaml.YAMLError, match=r"the key '[ab]' stands twice"):
            yaml.load(text, StrictLoader)


def test_only_data_is_read() -> None:
    with pytest.raises(yaml.YAMLError, match="python/object"):
        yaml.load("!!python/object/apply:os.system ['true']", StrictLoader)
