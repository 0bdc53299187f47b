from pathlib import Path

import pytest

from common.errors import UserError
from tasks.asking import questions
from tasks.asking.answers import Form, Numeric, Program, Python, Regex, Set
from tasks.asking.questions import chosen_categories, known_categories, read_category, suite_digest
from tests.tasks.asking.suite import SUITE, write_suite


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_suite(tmp_path / "prompts")
    monkeypatch.setattr(questions, "PROMPTS", folder)
    return folder


def test_a_file_is_read_as_it_is_written(prompts: Path) -> None:
    geography, code, poetry = (read_category(prompts / f"{name}.yaml") for name in SUITE)
    assert (geography.category, geography.kind) == ("geography", "knowledge")
    assert [question.scorer for question in geography.questions] == ["regex", "exact", "set"]
    assert geography.questions[0].answer == Regex(regex=r"\bParis\b")
    assert geography.questions[2].answer == Set(set=("Norway", "Sweden", "Denmark"), others=("Germany",), at_least=2)
    answer = code.questions[0].answer
    assert isinstance(answer, Python)
    assert answer.python == Program.model_validate(
        {"function": "double", "cases": [{"arguments": [3], "returns": 6}, {"arguments": [-1], "returns": -2}]}
    )
    poem, number = poetry.questions
    assert isinstance(poem.answer, Form)
    assert poem.answer.form.contains == ("sea", "wave")
    assert poem.ask == "Write a short poem about the sea."
    assert number.answer == Numeric(numeric=42)
    described = [question.answer.described for category in (geography, code) for question in category.questions]
    assert described == [
        r"/\bParis\b/",
        "the Pacific Ocean / Pacific",
        "2 of Norway, Sweden, Denmark, not Germany",
        "double(3) == 6, 2 cases in all",
    ]
    assert number.answer.described == "42"
    assert poem.answer.described.startswith("min_lines: 3, max_lines: 20, min_words: 12")


def test_a_question_keeps_its_identity(prompts: Path) -> None:
    category = read_category(prompts / "geography.yaml")
    found = {category.identity(question) for question in category.questions}
    assert len(found) == 3
    assert all(len(one) == 16 and set(one) <= set("0123456789abcdef") for one in found)
    again = read_category(write_suite(prompts.parent / "again") / "geography.yaml")
    assert {again.identity(question) for question in again.questions} == found


def test_a_question_has_its_own_chance_or_the_categorys(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    path.write_text(entry("{exact: [a]}\n    chance: 0.5"))
    category = read_category(path)
    assert [category.chance_of(question) for question in category.questions] == [0.0, 0.5]
    path.write_text(entry("{exact: [a]}\n    chance: 0").replace("questions:", "chance: 0.25\nquestions:"))
    category = read_category(path)
    assert [category.chance_of(question) for question in category.questions] == [0.25, 0.0]


def test_the_digest_is_of_the_files_that_are_used(prompts: Path) -> None:
    one, two, whole = suite_digest(["geography"]), suite_digest(["geography", "poetry"]), suite_digest([])
    assert len({one, two, whole}) == 3
    assert suite_digest(["poetry", "geography"]) == two
    assert suite_digest(list(SUITE)) == whole
    write_suite(prompts, poetry=SUITE["poetry"].replace("17 + 25", "20 + 22"))
    assert suite_digest(["geography"]) == one
    assert suite_digest(["geography", "poetry"]) != two


def test_the_nearest_category_is_named(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(known_categories()) == ["code-function", "geography", "poetry"]
    assert list(chosen_categories(["poetry", "geography"])) == ["geography", "poetry"]
    with pytest.raises(UserError, match=r"there is no category 'geografy'; did you mean 'geography'\?"):
        chosen_categories(["geografy"])
    monkeypatch.setattr(questions, "PROMPTS", prompts / "none")
    with pytest.raises(UserError, match="there are no categories in"):
        chosen_categories([])


def entry(answer: str, ask: str = "Why?") -> str:
    """A file whose second question has an answer."""
    first = "  - ask: Who?\n    answer: {exact: [me]}\n"
    return f"category: one\nkind: reasoning\nquestions:\n{first}  - ask: {ask}\n    answer: {answer}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (entry("{}"), "question 2: answer: has to have exactly one of exact, numeric, regex, set, python, form"),
        (entry("{exact: [a], numeric: 3}"), "question 2: answer: has to have exactly one of"),
        (entry("42"), "question 2: answer: has to have exactly one of"),
        (entry("{regex: '('}"), "question 2: answer.regex: is no regular expression: missing"),
        (entry("{form: {matches: '['}}"), "question 2: answer.form.matches: is no regular expression"),
        (entry("{exact: [yes]}"), r"question 2: answer.exact.0: has to be a text.*in quotes \(given: True\)"),
        (entry("{exact: []}"), "question 2: answer.exact: "),
        (entry("{exact: ['...']}"), "question 2: answer.exact.0: has nothing to compare"),
        (entry("{numeric: forty}"), "question 2: answer: numeric: input should be a number"),
        (entry("{numeric: .nan}"), "question 2: answer.numeric: input should be a finite number"),
        (entry("{numeric: 1, tolerance: -1}"), "question 2: answer.tolerance: "),
        (entry("{set: [a, b], at_least: 3}"), "question 2: answer: at_least 3 exceeds the 2 of set"),
        (entry("{form: {at_least: 1}}"), "question 2: answer.form: at_least 1 exceeds the 0 of contains"),
        (entry("{form: {}}"), "question 2: answer.form: has no check"),
        (entry("{form: {min_words: 5, max_words: 4}}"), "question 2: answer.form: min_words 5 exceeds max_words 4"),
        (entry("{python: {function: f, cases: []}}"), "question 2: answer.python.cases: "),
        (entry("{python: {function: 'f()', cases: [{arguments: [], returns: 1}]}}"), "answer.python.function: "),
        (entry("{exact: [a], otherwise: b}"), "question 2: answer.otherwise: extra inputs are not permitted"),
        (entry("{exact: [a]}\n    chance: 1"), "question 2: chance: input should be less than 1"),
        (entry("{exact: [a]}\n    chance: -0.1"), "question 2: chance: input should be greater than or equal to 0"),
        (entry("{exact: [a]}", ask="Who?"), "questions 1 and 2 are the same: 'Who.'"),
        (entry("{exact: [a]}", ask="'  '"), "question 2: ask: "),
        (entry("{exact: [a]}").replace("one", "two"), "category is 'two'; it has to be the file's name"),
        (entry("{exact: [a]}").replace("reasoning", "thinking"), "kind: input should be 'knowledge'"),
        ("category: one\nkind: code\nquestions: []", "questions: "),
        ("- 1", "valid dictionary"),
        ("category: [", "cannot be read: "),
        ("category: one\ncategory: one", "cannot be read: the key 'category' stands twice"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "one.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as found:
        read_category(path)
    assert str(path) in str(found.value)
    assert "\n" not in str(found.value)
