"""What a task of lm-eval needs and has not got, in a line that says what to do: packages, splits and examples."""

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from common.errors import UserError

_ADVICE = re.compile(r"pip install [`'\"]?([A-Za-z0-9][\w.+:/-]*)")
_EXTRA = re.compile(r"lm[-_]eval\[(\w+)\]")
_NLTK = re.compile(r"nltk\.download\('([\w-]+)'\)")
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
_NO_EXAMPLES = "'{}' has no examples to show, only its questions: ask it apart, without num_fewshot"


@contextmanager
def packages_named(task: str) -> Iterator[None]:
    """Turns errors for a package that is not installed, which only some of lm-eval's tasks need, into a UserError that
    names it; others pass as they are."""
    try:
        yield
    except UserError:
        raise
    except SystemExit as error:
        # Some modules end the process where a program of the system's is missing.
        raise UserError(f"'{task}' cannot be asked here: {error.code}") from error
    except Exception as error:
        advice = _advice(error)
        if advice is None:
            raise
        raise UserError(f"'{task}' needs {advice}") from error


def _advice(error: Exception) -> str | None:
    """What is missing and how it is had; None where an error is of something else."""
    resource = _NLTK.search(str(error)) if type(error) is LookupError else None
    if resource is not None:
        return f"NLTK's '{resource[1]}', which is not here; run: python -m nltk.downloader {resource[1]}"
    if not isinstance(error, ImportError) and not _ADVICE.search(str(error)):
        return None
    chain = list(_chain(error))
    named = [one.name for one in chain if isinstance(one, ModuleNotFoundError) and one.name]
    # Some of lm-eval's tasks say it in words alone, and of some packages where else they are.
    advised = [found for one in chain for found in _ADVICE.findall(str(one))]
    named += [one for one in advised if "/" not in one]
    missing = next((name for name in map(_root, named) if importlib.util.find_spec(name) is None), None)
    if missing is None:
        return None
    said = next((found[1] for one in chain if (found := _EXTRA.search(str(one)))), None)
    extra = said or _extra_with(missing)
    place = next((one for one in advised if "/" in one), missing)
    wanted = place if extra is None else f"'lm-eval[{extra}]'"
    return f"the package '{missing}', which is not installed; run: pip install {wanted}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def scripts_refused(task: str, trusted: bool) -> Iterator[None]:
    """Within the block, a metric that the package `evaluate` would fetch from the hub and run as a program raises
    UserError, unless such are trusted."""
    if trusted or importlib.util.find_spec("evaluate") is None:
        yield
        return
    import evaluate.loading

    def refuse(path: str, *arguments: Any, **options: Any) -> Any:
        raise UserError(
            f"'{task}' is scored by '{path}', a program that the package evaluate fetches from the hub; "
            f"--trust-remote-code, or trust_remote_code in a recipe, lets it run"
        )

    # What `evaluate.load` asks, whichever module it was imported into.
    original = evaluate.loading.evaluation_module_factory
    evaluate.loading.evaluation_module_factory = refuse
    try:
        yield
    finally:
        evaluate.loading.evaluation_module_factory = original


def _root(name: str) -> str:
    """The module that a package or one of its modules begins with."""
    return name.partition(".")[0].replace("-", "_")


def _extra_with(package: str) -> str | None:
    """The extra of lm-eval that a package belongs to."""
    for requirement in importlib.metadata.requires("lm-eval") or ():
        name, _, condition = requirement.partition(";")
        found = re.match(r"[\w.-]+", name)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", condition)
        if found and extra and _root(found[0]).lower() == package.lower():
            return extra[1]
    return None


@contextmanager
def splits_named(task: str, definition: Mapping[str, Any]) -> Iterator[None]:
    """Turns the error for a split that a task asks for and its data do not have into a UserError that names both."""
    try:
        yield
    except KeyError as error:
        if error.args[0] not in [definition.get(key) for key in _SPLITS]:
            raise
        raise UserError(f"the data of '{task}' have no split '{error.args[0]}', which lm-eval reads for it") from error


def check_defines_examples(definition: Mapping[str, Any], name: str, num_fewshot: int | None) -> None:
    """Raises UserError where examples are wanted and a task's definition has no place for any but the questions.

    What a task that is a class of its own has, `check_examples` finds once it is loaded.
    """
    shows_none = definition.get("num_fewshot") == 0 or definition.get("output_type") == "loglikelihood_rolling"
    if not num_fewshot or shows_none or "class" in definition:
        return
    own = definition.get("fewshot_config") or {}
    splits = (definition.get(key) for key in ("training_split", "validation_split", "fewshot_split"))
    if not any([*splits, own.get("split"), own.get("samples")]):
        raise UserError(_NO_EXAMPLES.format(name))


def check_examples(task: Any, name: str) -> None:
    """Raises UserError where a task of lm-eval has fewer examples than are to stand before each question, or none but
    the questions themselves."""
    wanted = task.get_config("num_fewshot")
    if not wanted:
        return
    own = task.fewshot_cfg
    if not (own.split or own.samples or task.has_training_docs() or task.has_validation_docs()):
        raise UserError(_NO_EXAMPLES.format(name))
    # lm-eval draws no example that is the question itself.
    found = len(task.sampler.fewshot_docs()) - (own.split == task.get_config("test_split"))
    if wanted > found:
        raise UserError(f"'{name}' has {found:,} examples to show, and num_fewshot asks for {wanted:,}")
