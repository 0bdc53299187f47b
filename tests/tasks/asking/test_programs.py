import textwrap

import pytest

from tasks.asking.answers import Program
from tasks.asking.programs import code_in, works

DOUBLE = Program.model_validate(
    {"function": "double", "cases": [{"arguments": [3], "returns": 6}, {"arguments": [-1], "returns": -2}]}
)
RIGHT = "def double(x):\n    return 2 * x"


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (f"```python\n{RIGHT}\n```", f"{RIGHT}\n"),
        (f"Sure!\n\n```\npip install x\n```\n```Python\n{RIGHT}\n```\nIt doubles.", f"{RIGHT}\n"),
        (f"```\n{RIGHT}\n```\nor\n```js\nx\n```", f"{RIGHT}\n"),
        (f"```python\n{RIGHT}", RIGHT),
        (RIGHT, RIGHT),
        (f"Here it is:\n{RIGHT}\n\nThis function doubles.", f"{RIGHT}\n"),
        (f"import math\n\n# twice\n@cached\n{RIGHT}\nprint(double(3))", f"import math\n\n# twice\n@cached\n{RIGHT}"),
        ("from the sea to the sea", ""),
        ("You define it.", ""),
        ("", ""),
    ],
)
def test_the_code_of_an_answer_is_found(said: str, code: str) -> None:
    assert code_in(said) == code


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (f"```python\n{RIGHT}\n```", True),
        (RIGHT, True),
        ("double = lambda x: 2 * x", False),
        ("```\ndouble = lambda x: 2 * x\n```", True),
        ("def double(x):\n    return x + 3", False),
        ("def double(x):\n    return '6'", False),
        ("def double(x):\n    return x +", False),
        ("def twice(x):\n    return 2 * x", False),
        ("def double(x):\n    print(2 * x)", False),
        ("It is 6.", False),
        ("", False),
    ],
)
def test_every_case_has_to_return_what_it_should(said: str, right: bool) -> None:
    assert works(DOUBLE, said) is right


def test_a_program_cannot_forge_that_it_works() -> None:
    code = """
        class Any(int):
            __eq__ = lambda self, other: True
            __hash__ = int.__hash__
        import re
        system = re.enum.sys
        system.modules["json"].dumps = lambda *_, **__: '{"values": ["true", "true"]}'
        def double(x):
            return Any(0)
    """
    assert not works(DOUBLE, f"```python\n{textwrap.dedent(code)}\n```")
