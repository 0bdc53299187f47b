"""What lm-eval's own tasks say where something of theirs is missing."""

import sys
from pathlib import Path

import pytest
from lm_eval.api.task import ConfigurableTask

from common.errors import UserError
from tasks.benchmark import Config, load_task, resolved
from tasks.harness.needs import check_examples, packages_named, scripts_refused


def write_lines(hub: Path, data_set: str, line: str = "{}", name: str = "train.jsonl") -> None:
    folder = hub / data_set
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"{line}\n" * 3)


@pytest.mark.parametrize(
    ("task", "data_set", "package", "message"),
    [
        ("ifeval", "google/IFEval", "langdetect", r"'langdetect', .*; run: pip install 'lm-eval\[ifeval\]'$"),
        ("minerva_math_algebra", "EleutherAI/hendrycks_math", "sympy", r"'sympy', .* pip install 'lm-eval\[math\]'$"),
        ("ag_news", None, "unitxt", r"'unitxt', which is not installed; run: pip install 'lm-eval\[unitxt\]'$"),
    ],
)
def test_a_package_that_a_task_needs(
    task: str,
    data_set: str | None,
    package: str,
    message: str,
    empty_hub: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if data_set is not None:
        write_lines(empty_hub, data_set)
    for name in [name for name in sys.modules if name.startswith(("lm_eval.tasks.ifeval", "lm_eval.tasks.minerva"))]:
        monkeypatch.delitem(sys.modules, name)
    # As if it were not installed.
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"^'{task}' needs the package {message}"):
        load_task(resolved(Config(task=task)), tmp_path / "data")


def test_other_errors_pass_as_they_are() -> None:
    handled = ModuleNotFoundError("No module named 'absent_package'", name="absent_package")
    for error in (
        ModuleNotFoundError("No module named 'numpy.absent'", name="numpy.absent"),
        ImportError("cannot import name 'absent' from 'numpy'", name="numpy"),
        ImportError("try pip install numpy"),
        UserError("no such data; run: pip install absent-package"),
        TypeError("a defect"),
        LookupError("not found"),
    ):
        error.__context__ = handled if isinstance(error, UserError | TypeError) else None
        with pytest.raises(type(error)) as raised, packages_named("arc_easy"):
            raise error
        assert raised.value is error


def test_a_package_is_named_by_the_words_of_others_too() -> None:
    for error, message in {
        ImportError("you need to install it using 'pip install absent-package'"): "'absent_package', which",
        ModuleNotFoundError(name="absent.part"): "run: pip install absent$",
        LookupError("Resource 'punkt' not found\n>>> nltk.download('punkt')"): r"NLTK's 'punkt', which .* punkt$",
        ModuleNotFoundError("pip install git+https://a.b/absent", name="absent"): r"install git\+https://a\.b/absent$",
    }.items():
        with pytest.raises(UserError, match=message), packages_named("arc_easy"):
            raise error


def write_splits(hub: Path, data_set: str, name: str, line: str, *splits: str) -> None:
    """Writes the same rows as some splits of a configuration."""
    write_lines(hub, data_set, line, "rows.jsonl")
    files = "".join(f"  - {{split: {split}, path: rows.jsonl}}\n" for split in splits)
    (hub / data_set / "README.md").write_text(f"---\nconfigs:\n- config_name: {name}\n  data_files:\n{files}---\n")


def test_a_split_that_the_data_have_not(empty_hub: Path, tmp_path: Path) -> None:
    write_splits(empty_hub, "openai/gsm8k", "main", '{"question": "1 + 1?", "answer": "#### 2"}', "train")
    with pytest.raises(UserError, match="the data of 'gsm8k' have no split 'test', which lm-eval reads for it"):
        load_task(resolved(Config(task="gsm8k")), tmp_path / "data")


def test_more_examples_than_there_are(empty_hub: Path, tmp_path: Path) -> None:
    """Those of this task are of the questions' own split, and no question is an example of itself."""
    rows = "\n".join(f'{{"context": "What is {number} plus 0?", "completion": " {number}"}}' for number in range(3))
    folder = empty_hub / "EleutherAI" / "arithmetic" / "data"
    folder.mkdir(parents=True)
    (folder / "two_digit_addition.jsonl").write_text(rows)

    def load(num_fewshot: int) -> ConfigurableTask:
        return load_task(resolved(Config(task="arithmetic_2da", num_fewshot=num_fewshot)), tmp_path / "data")[0]

    task = load(2)
    task.build_all_requests()
    assert [request.args[0].count("plus 0?") for request in task.instances] == [3, 3, 3]
    with pytest.raises(UserError, match="'arithmetic_2da' has 2 examples to show, and num_fewshot asks for 3"):
        load(3)


def test_a_task_without_examples(empty_hub: Path, tmp_path: Path) -> None:
    row = '{"query": "1 + 1?", "choices": ["(A)2", "(B)3"], "gold": [0]}'
    write_lines(empty_hub, "hails/agieval-aqua-rat", row, "test.jsonl")
    for num_fewshot in (None, 0):
        task, _ = load_task(resolved(Config(task="agieval_aqua_rat", num_fewshot=num_fewshot)), tmp_path / "data")
        task.build_all_requests()
    with pytest.raises(UserError, match="'agieval_aqua_rat' has no examples to show, only its questions"):
        resolved(Config(task="agieval_aqua_rat", num_fewshot=2))
    task.set_config(key="num_fewshot", value=2)
    with pytest.raises(UserError, match="'agieval_aqua_rat' has no examples to show, only its questions"):
        check_examples(task, "agieval_aqua_rat")


def test_texts_that_are_scored_whole_have_no_examples(empty_hub: Path, tmp_path: Path) -> None:
    splits = ("train", "validation", "test")
    write_splits(empty_hub, "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", '{"page": "a text"}', *splits)
    task, _ = load_task(resolved(Config(task="wikitext", num_fewshot=3)), tmp_path / "data")
    assert task.get_config("num_fewshot") == 0
    check_examples(task, "wikitext")


@pytest.mark.parametrize("task", ["non_greedy_robustness_math_algebra", "slr_bench_easy"])
def test_tasks_that_run_answers_without_saying_so(task: str) -> None:
    with pytest.raises(UserError, match=f"'{task}' runs what a model writes as a program"):
        resolved(Config(task=task))


def test_metrics_that_are_fetched_as_programs_run_where_they_are_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    from evaluate import load

    monkeypatch.setattr("evaluate.loading.evaluation_module_factory", lambda path, **options: 1 / 0)
    with (
        scripts_refused("xquad", trusted=False),
        pytest.raises(UserError, match="'xquad' is scored by 'squad', "),
    ):
        load("squad")
    with scripts_refused("xquad", trusted=True), pytest.raises(ZeroDivisionError):
        load("squad")
    with pytest.raises(ZeroDivisionError):
        load("squad")


def test_code_that_would_end_the_process() -> None:
    with pytest.raises(UserError, match=r"^'own' cannot be asked here: swipl is missing$"), packages_named("own"):
        sys.exit("swipl is missing")
