"""Whether an answer holds a function in Python that works."""

import re

from tasks.asking.answers import Program
from tasks.asking.sandbox import run, same

_FENCED = re.compile(r"^[ \t]*```(?P<language>[^\n`]*)\n(?P<code>.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_BEGINS = re.compile(r"^(?:(?:async )?def |class |@|import \w|from \w[\w.]* import )", re.MULTILINE)
_GOES_ON = re.compile(r"\s|$|#|[)\]}]|@|(?:async )?def |class |import \w|from \w[\w.]* import ")


def code_in(said: str) -> str:
    """The code of an answer: its first block marked ```python, else its first block, else its lines from the first
    definition or import on, up to a line that is part of neither.

    Empty where there is none. A block that is not closed goes to the end.
    """
    blocks = list(_FENCED.finditer(said))
    marked = [block for block in blocks if block["language"].strip().lower() in ("python", "py", "python3")]
    if blocks:
        return (marked or blocks)[0]["code"]
    begin = _BEGINS.search(said)
    if begin is None:
        return ""
    lines = said[begin.start() :].splitlines()
    ends = next((number for number, line in enumerate(lines) if not _GOES_ON.match(line)), len(lines))
    return "\n".join(lines[:ends])


def works(program: Program, said: str) -> bool:
    """Whether the code of an answer defines the function, and every case returns what it should; run in the sandbox.

    Raises UserError where the machine has no sandbox.
    """
    code = code_in(said)
    if not code:
        return False
    found = run(code, program.function, [case.arguments for case in program.cases]).values
    wanted = [case.returns for case in program.cases]
    return found is not None and same(found, wanted)
