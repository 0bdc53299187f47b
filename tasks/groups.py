"""Groups of lm-eval's tasks, such as `mmlu`: the one figure that lm-eval makes of their tasks' scores.

Each task is an artifact of its own, and a group's figure is made of theirs wherever it is shown. How is written in the
group's file, under `aggregate_metric_list`; a group that has none there has no figure, and neither have tags and the
group `seed`, which are ways of writing many names.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import Field

from common.config import FrozenModel
from tasks.harness.catalogue import group_definition, leaves
from tasks.harness.results import metric_name
from tasks.scores import Score


class Measure(FrozenModel):
    """A metric of tasks of which their group has the mean."""

    metric: str
    """lm-eval's name of it."""
    filters: tuple[str, ...] | None = None
    """The filters of answers behind which it is measured; null for those that the tasks have."""
    weight_by_size: bool = True
    """Whether tasks count by their documents, or each alike."""

    def is_of(self, metric: str) -> bool:
        """Whether a score's metric is this one."""
        if self.filters is None:
            return metric == self.metric or metric.startswith(f"{self.metric} (")
        return metric in {metric_name(self.metric, one) for one in self.filters}


class TaskGroup(FrozenModel):
    """A group as lm-eval defines it."""

    name: str = Field(min_length=1)
    """Its name; of one that is defined within another, that one's stands before it, as in `mmlusr::mmlusr_qa_stem`."""
    tasks: tuple[str, ...] = Field(min_length=1)
    """The tasks in it and in the groups within it; one that is in two of these stands here twice, and counts twice."""
    measures: tuple[Measure, ...] = Field(min_length=1)
    """What it has figures of."""


class GroupScore(NamedTuple):
    """A figure of a group."""

    score: Score
    """It, under the group's name, beside the means of what guessing gives in its tasks."""
    tasks: tuple[str, ...]
    """Those that it is of: those that have its metric."""


def groups_in(names: Sequence[str]) -> list[TaskGroup]:
    """The groups that have a figure among names and within them, outer ones first, each once."""
    found: dict[str, TaskGroup] = {}
    for name in names:
        said = group_definition(name)
        for one in _tree(name, said).groups if said is not None else ():
            found.setdefault(one.name, one)
    return list(found.values())


def group_scores(group: TaskGroup, scores: Iterable[Score]) -> list[GroupScore]:
    """The figures of a group from its tasks' scores: for each of its metrics the mean over the tasks that have it."""
    own = {(score.task, score.metric): score for score in scores if score.group is None and score.task in group.tasks}
    found = []
    for measure in group.measures:
        for metric in dict.fromkeys(metric for _, metric in own if measure.is_of(metric)):
            tasks = tuple(task for task in group.tasks if (task, metric) in own)
            members = [own[task, metric] for task in tasks]
            found.append(GroupScore(_mean(group.name, members, measure.weight_by_size), tasks))
    return found


def _mean(name: str, members: Sequence[Score], weight_by_size: bool) -> Score:
    weights = [one.n if weight_by_size else 1 for one in members]

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        if len(known) < len(values) or not sum(weights):
            return None
        return sum(value * weight for value, weight in zip(known, weights, strict=True)) / sum(weights)

    return Score(
        task=name,
        metric=members[0].metric,
        value=mean([one.value for one in members]),
        standard_error=_error(members, weight_by_size),
        n=sum(one.n for one in members),
        higher_is_better=members[0].higher_is_better,
        chance=mean([one.chance for one in members]),
        majority=mean([one.majority for one in members]),
    )


def _error(members: Sequence[Score], weight_by_size: bool) -> float | None:
    """The standard error of the mean, as in lm-eval (`pooled_sample_stderr` and `unweighted_mean_stderr` of
    `lm_eval.api.metrics`); None where that of a task is not known."""
    errors = [one.standard_error for one in members if one.standard_error is not None]
    if len(errors) < len(members):
        return None
    if not weight_by_size:
        return math.sqrt(sum(error**2 for error in errors)) / len(errors)
    sizes = [one.n for one in members]
    free = sum(sizes) - len(sizes)
    pooled = sum((size - 1) * size * error**2 for size, error in zip(sizes, errors, strict=True))
    return math.sqrt(pooled / free / sum(sizes)) if free > 0 else None


class _Tree(NamedTuple):
    """What is in a group."""

    tasks: tuple[str, ...]
    groups: tuple[TaskGroup, ...]
    """Those that have a figure, itself first."""


def _tree(name: str, said: Mapping[str, Any]) -> _Tree:
    # By name, as in lm-eval: a member that is named twice is in the group once.
    members: dict[str, _Tree] = {}
    for member, within in _members(name, said):
        if within is not None:
            members[member] = _tree(member, within)
        else:
            members |= {leaf.name: _Tree((leaf.name,), ()) for leaf in leaves([member])}
    tasks = tuple(task for one in members.values() for task in one.tasks)
    measures = _measures(said.get("aggregate_metric_list") or ())
    own = (TaskGroup(name=name, tasks=tasks, measures=measures),) if tasks and measures else ()
    return _Tree(tasks, (*own, *(group for one in members.values() for group in one.groups)))


def _members(name: str, said: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any] | None]]:
    """The members of a group, and what is said of those that are groups."""
    for member in said.get("task") or ():
        if isinstance(member, str):
            yield member, group_definition(member)
        elif "group" in member:
            registered = group_definition(str(member["group"]))
            own_name = str(member["group"]) if registered is not None else f"{name}::{member['group']}"
            yield own_name, member if registered is None else registered
        else:
            yield str(member["task"]), group_definition(str(member["task"]))


def _measures(listed: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> tuple[Measure, ...]:
    found = []
    for one in [listed] if isinstance(listed, Mapping) else listed:
        filters = one.get("filter_list")
        found.append(
            Measure(
                metric=one["metric"],
                filters=(filters,) if isinstance(filters, str) else filters,
                # As lm-eval reads it: one of its files says `truez`.
                weight_by_size=bool(one.get("weight_by_size", True)),
            )
        )
    return tuple(found)
