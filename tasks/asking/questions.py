"""Questions and what answers them, in a YAML file per category.

    category: geography
    kind: knowledge
    questions:
      - ask: What is the capital of France?
        answer: {regex: '\\bParis\\b'}
      - ask: Is Oslo in Norway? Answer yes or no.
        answer: {exact: ['yes']}
        chance: 0.5

What an answer may be, tasks.asking.answers says.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

import yaml
from pydantic import Field, StringConstraints, ValidationError, model_validator

from common.config import FrozenModel
from common.errors import UserError, suggestion
from common.files import sha256_bytes
from common.strict_yaml import StrictLoader
from tasks.asking.answers import SCORERS, Answer
from tasks.corpus.digests import files_digest

PROMPTS = Path(__file__).parent / "prompts"
"""The folder of the category files."""
CategoryKind = Literal[
    "knowledge",
    "mathematics",
    "instruction",
    "reasoning",
    "code",
    "language",
    "explanation",
    "creation",
    "classification",
]
KINDS: tuple[CategoryKind, ...] = get_args(CategoryKind)
"""In the order in which they are shown."""
Chance = Annotated[float, Field(ge=0, lt=1)]
NAME = re.compile(r"[A-Za-z0-9]+(-[A-Za-z0-9]+)*")


class Question(FrozenModel):
    """What a model is asked, and what answers it."""

    ask: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    """The question, white space around it left out."""
    answer: Answer
    """What answers it."""
    chance: Chance | None = None
    """How often a guess among the answers that it offers is right; null for the category's."""

    @property
    def scorer(self) -> str:
        """The kind of its answer."""
        return SCORERS[type(self.answer)]


class Category(FrozenModel):
    """Questions of one sort."""

    category: str
    """Its name, which is that of the file."""
    kind: CategoryKind
    """What it is a part of."""
    chance: Chance = 0.0
    """How often a guess is right where the question does not say; 0 where it offers no answers."""
    questions: tuple[Question, ...] = Field(min_length=1)
    """What is asked."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        places: dict[str, int] = {}
        for number, question in enumerate(self.questions, 1):
            before = places.setdefault(question.ask, number)
            if before != number:
                raise ValueError(f"questions {before} and {number} are the same: {question.ask!r}")
        return self

    def chance_of(self, question: Question) -> float:
        """How often a guess answers a question."""
        return self.chance if question.chance is None else question.chance

    def identity(self, question: Question) -> str:
        """What tells a question from all others, whatever the model: 16 hexadecimal digits."""
        return sha256_bytes(f"{self.category}\n{question.ask}".encode())[:16]


def known_categories() -> dict[str, Path]:
    """The categories that there are, with their files, in alphabetical order."""
    return {path.stem: path for path in sorted(PROMPTS.glob("*.yaml"))}


def chosen_categories(names: Sequence[str]) -> dict[str, Path]:
    """The categories of some names, or all where none is named. Raises UserError where one does not exist."""
    known = known_categories()
    for name in names:
        if name not in known:
            raise UserError(f"there is no category '{name}'{suggestion(name, known)}")
    if not known:
        raise UserError(f"there are no categories in {PROMPTS}; install Cairn with its data files")
    return {name: path for name, path in known.items() if not names or name in names}


def suite_digest(names: Sequence[str]) -> str:
    """The SHA-256 over the files of some categories. Raises UserError as `chosen_categories`."""
    return files_digest({path.name: path for path in chosen_categories(names).values()})


def read_category(path: Path) -> Category:
    """The questions in a file. Raises UserError that names the file and the entry where something is wrong."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no UTF-8, or a date that is none
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    try:
        found = Category.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_problem(error)}") from error
    if not NAME.fullmatch(found.category) or found.category != path.stem:
        raise UserError(
            f"{path}: category is {found.category!r}; it has to be the file's name, of letters, digits and hyphens"
        )
    return found


def _first_problem(error: ValidationError) -> str:
    """The first of pydantic's complaints, as `question 3: answer.regex: what`."""
    problem = error.errors()[0]
    location = list(problem["loc"])
    place = ""
    if location[:1] == ["questions"] and len(location) > 1:
        place = f"question {int(location[1]) + 1}: "
        location = location[2:]
        if location[:1] == ["answer"] and len(location) > 1:
            del location[1]  # the tag of the union, which stands there once more as a key
    where = ".".join(str(part) for part in location)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "string_type":
        message = f"has to be a text, which YAML may need in quotes (given: {problem['input']!r})"
    return f"{place}{where}{': ' if where else ''}{message[:1].lower()}{message[1:]}"
