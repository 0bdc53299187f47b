"""Exact match over all problems and over groups of them: by what a problem asks, and by columns of the documents."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import UserError
from tasks.expressions import expression_of
from tasks.scores import Score, share, wilson

METRIC = "exact_match"
READ = ("operator", "digits")
"""What is read from the text of a problem: its operators, and the digits of its longest operand."""
BY_DEFAULT = (*READ, "phrasing")
SHOWN_GROUPS = 20
"""Groups that are shown: of more, those that are worst; of lengths of answers, none, for texts have any."""
MOST_GROUPS = 1000


def measured(correct: Sequence[bool]) -> dict[str, Any]:
    """The share of correct answers, its standard error (null for a single one) and its 95% interval."""
    score = share(METRIC, METRIC, correct)
    return {
        "n": score.n,
        METRIC: score.value,
        "standard_error": score.standard_error,
        "interval": list(wilson(sum(correct), len(correct))),
    }


def summarise(targets: Sequence[str], correct: Sequence[bool]) -> dict[str, Any]:
    """Exact match over all and by the answer's length in characters."""
    by_length = defaultdict(list)
    for target, right in zip(targets, correct, strict=True):
        by_length[len(target)].append(right)
    groups = [{"length": length, **measured(group)} for length, group in sorted(by_length.items())]
    return {**measured(correct), "by_answer_length": groups}


def grouped(columns: Mapping[str, Sequence[Any]], correct: Sequence[bool]) -> dict[str, list[dict[str, Any]]]:
    """Exact match of the problems with each value of a column, column by column; those with none are in no group.

    Raises UserError for a column that has too many values, or other ones than texts and numbers.
    """
    found = {}
    for name, values in columns.items():
        groups = defaultdict(list)
        for value, right in zip(values, correct, strict=True):
            if value is not None and not isinstance(value, str | int | float):
                raise UserError(f"by: the column '{name}' has neither texts nor numbers")
            if value is not None:
                groups[value].append(right)
        if len(groups) > MOST_GROUPS:
            raise UserError(f"by: the column '{name}' has {len(groups):,} values; {MOST_GROUPS:,} is the most")
        found[name] = [{"group": str(value), **measured(groups[value])} for value in sorted(groups)]
    return found


def scores(task: str, summary: Mapping[str, Any], groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Score]:
    """The score of the whole, and those of the groups."""
    parts: list[tuple[str | None, Mapping[str, Any]]] = [(None, summary)]
    parts += [(f"{name}: {group['group']}", group) for name, found in groups.items() for group in found]
    return [
        Score(
            task=task,
            metric=METRIC,
            group=name,
            value=found[METRIC],
            standard_error=found["standard_error"],
            n=found["n"],
        )
        for name, found in parts
    ]


def grouping_columns(
    by: Sequence[str] | None, prompts: Sequence[str], targets: Sequence[str], kept: Mapping[str, Sequence[Any]]
) -> dict[str, Sequence[Any]]:
    """The values that problems are grouped by: columns of the documents, which are in `kept`, and what is read from
    their texts. Null takes what there is of `BY_DEFAULT`: what is read counts where every problem has it.

    Raises UserError where no problem has what is to be read.
    """
    read = _read(prompts, targets)
    if by is None:
        whole = {name: values for name, values in read.items() if None not in values}
        return {name: found for name in BY_DEFAULT if (found := kept.get(name, whole.get(name))) is not None}
    for name in by:
        if name not in kept and all(value is None for value in read[name]):
            raise UserError(f"by: no problem is an expression such as 554+456=, so that there is no {name} to group by")
    return {name: kept[name] if name in kept else read[name] for name in by}


def _read(prompts: Sequence[str], targets: Sequence[str]) -> dict[str, list[str | int | None]]:
    found = [expression_of(prompt, target) for prompt, target in zip(prompts, targets, strict=True)]
    operators: list[str | int | None] = [None if one is None else one.operators for one in found]
    digits: list[str | int | None] = [None if one is None else one.digits for one in found]
    return dict(zip(READ, (operators, digits), strict=True))


def shown_lengths(groups: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """What `by_answer_length` has, where it is short enough to be shown."""
    return groups if len(groups) <= SHOWN_GROUPS else ()


def shown_groups(groups: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The groups that are shown: all in order, or the worst of many."""
    if len(groups) <= SHOWN_GROUPS:
        return groups
    return sorted(groups, key=lambda group: group[METRIC])[:SHOWN_GROUPS]
