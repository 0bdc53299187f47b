"""What a report over evaluations says, apart from how it looks: the page and the Markdown are two views of it."""

from collections.abc import Iterable, Sequence
from datetime import date, datetime
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BeforeValidator

from common.config import FrozenModel
from tasks.groups import GroupScore, TaskGroup, group_scores
from tasks.reporting.significance import GROUP_COLON, LEVEL, Difference
from tasks.scores import Score


def iso_time(value: Any) -> Any:
    """A time as text, where it is one. Raises ValueError for text that is none as ISO 8601 writes it."""
    if isinstance(value, date | datetime):  # as YAML reads one without quotes
        return value.isoformat()
    if isinstance(value, str):
        try:
            datetime.fromisoformat(value)
        except ValueError:
            raise ValueError("is no time as ISO 8601 writes it, such as 2026-11-22T18:00:00Z") from None
    return value


Moment = Annotated[str, BeforeValidator(iso_time)]
"""A time, ISO 8601."""


class Provenance(FrozenModel):
    """How scores came about, as far as the evaluation says."""

    num_fewshot: int | None = None
    """Worked examples that stood before each question; null where that is not said."""
    template: str | None = None
    """The prompt's template."""
    task_version: str | None = None
    """The version of the task."""
    lm_eval: str | None = None
    """The version of lm-eval that defines it."""
    data: dict[str, str] = {}  # noqa: RUF012 - frozen
    """The digest of each data set, by its id."""

    @classmethod
    def shared(cls, several: Iterable[Self]) -> Self:
        """What several have in common, with the data of all."""
        every = list(several)
        alike = {
            name: getattr(every[0], name)
            for name in ("num_fewshot", "task_version", "lm_eval")
            if len({getattr(one, name) for one in every}) == 1
        }
        return cls(**alike, data={name: digest for one in every for name, digest in one.data.items()})


class Part(NamedTuple):
    """A score of a part of a task."""

    name: str
    """What the part is called among those of its kind."""
    score: Score
    """What it was given."""
    interval: tuple[float, float] | None
    """Its 95% interval, where the evaluation gives one."""


class Evaluation(FrozenModel):
    """The scores of one evaluation, and how they came about."""

    name: str
    """What the evaluation is called in the report."""
    provenance: Provenance = Provenance()
    """How the scores came about."""
    scores: tuple[Score, ...]
    """What was measured."""
    kinds: dict[str, str] = {}  # noqa: RUF012 - frozen
    """What the parts of its task are of, by the part's name: of the category geography, knowledge."""

    intervals: dict[str, tuple[float, float]] = {}  # noqa: RUF012 - frozen
    """The 95% intervals of parts, by the part's name, where the evaluation gives better ones than standard errors."""

    def divided(self) -> dict[tuple[str, str], dict[str, list[Part]]]:
        """The scores of parts of tasks, by task and metric, and by what the parts are of: their kind, of a group such
        as `digits: 3` the digits, else nothing."""
        found: dict[tuple[str, str], dict[str, list[Part]]] = {}
        for score in self.scores:
            if score.group is not None:
                division, colon, part = score.group.partition(GROUP_COLON)
                kind, name = (division, part) if colon else (self.kinds.get(score.group, ""), score.group)
                kinds = found.setdefault((score.task, score.metric), {})
                kinds.setdefault(kind, []).append(Part(name, score, self.intervals.get(score.group)))
        return found


class Published(FrozenModel):
    """A score that was published of another model."""

    model: str
    """The model's name."""
    task: str
    """What it was asked."""
    metric: str
    """What of it was measured."""
    certain: bool = True
    """Whether the source says that it is this metric, and not only one of its kind."""
    value: float
    """The score, in the unit of `tasks.scores.Score`."""
    few_shot: int | None = None
    """Worked examples that stood before each question; null where the source does not say."""
    source: str
    """The title of what it was published in."""
    url: str
    """Where that is."""


class Series(NamedTuple):
    """What two scores have in common of which one may be held against the other over time."""

    task: str
    metric: str
    group: str | None
    n: int
    few_shot: int | None
    task_version: str | None
    data: tuple[tuple[str, str], ...]
    """The data sets: id and digest of each."""


class Snapshot(FrozenModel):
    """What a model was newly given at one time."""

    at: Moment | None = None
    """When it was measured, ISO 8601; null where nobody said."""
    digest: str | None = None
    """The digest of the model; null where nobody said."""
    scores: tuple[Score, ...]
    """Its scores."""
    provenance: dict[str, Provenance] = {}  # noqa: RUF012 - frozen
    """How they came about, by task."""

    def series(self, score: Score) -> Series:
        """What one of its scores is a point of."""
        how = self.provenance.get(score.task, Provenance())
        asked = (how.num_fewshot, how.task_version, tuple(sorted(how.data.items())))
        return Series(score.task, score.metric, score.group, score.n, *asked)


class Report(FrozenModel):
    """A report over evaluations of one model."""

    title: str
    """Its title."""
    model: str
    """The model's name."""
    other: str = "other"
    """What the differences are against."""
    level: float = LEVEL
    """The p below which a difference is called significant."""
    evaluations: tuple[Evaluation, ...]
    """What was measured, in the order of its tables."""
    groups: tuple[TaskGroup, ...] = ()
    """The groups of tasks whose figures it shows."""
    references: tuple[Published, ...] = ()
    """What was published of other models, in the order of its tables."""
    history: tuple[Snapshot, ...] = ()
    """The model's scores over time, the newest last."""
    differences: tuple[Difference, ...] = ()
    """How far the model lies from the other one."""

    @property
    def scores(self) -> tuple[Score, ...]:
        """The scores of all evaluations."""
        return tuple(score for one in self.evaluations for score in one.scores)

    @property
    def wholes(self) -> tuple[tuple[Evaluation, Score], ...]:
        """The scores of whole tasks, each with its evaluation."""
        return tuple((one, score) for one in self.evaluations for score in one.scores if score.group is None)

    @property
    def grouped(self) -> tuple[tuple[Provenance, GroupScore], ...]:
        """The figures of the groups, each with what its tasks' provenances have in common."""
        how = {score.task: one.provenance for one, score in self.wholes}
        return tuple(
            (Provenance.shared(how[task] for task in found.tasks), found)
            for group in self.groups
            for found in group_scores(group, self.scores)
        )

    def references_of(self, score: Score) -> tuple[Published, ...]:
        """What was published of the same measure of the whole task."""
        return tuple(
            one
            for one in self.references
            if score.group is None and (one.task, one.metric) == (score.task, score.metric)
        )

    def reference_models(self) -> list[str]:
        """The models that anything was published of, in the order of the references."""
        return list(dict.fromkeys(one.model for one in self.references))

    def sources(self) -> list[tuple[str, str, list[str]]]:
        """Where the references come from: title, address and models of each source."""
        found: dict[tuple[str, str], list[str]] = {}
        for one in self.references:
            models = found.setdefault((one.source, one.url), [])
            if one.model not in models:
                models.append(one.model)
        return [(title, url, models) for (title, url), models in found.items()]

    def lines(self) -> dict[Series, list[tuple[Snapshot, Score]]]:
        """The scores of whole tasks over time that have more than one point."""
        found: dict[Series, list[tuple[Snapshot, Score]]] = {}
        for snapshot in self.history:
            for score in snapshot.scores:
                if score.group is None and score.value is not None:
                    found.setdefault(snapshot.series(score), []).append((snapshot, score))
        return {series: points for series, points in found.items() if len(points) > 1}

    def with_history(self, earlier: Sequence[Snapshot], at: str | None, digest: str | None) -> Self:
        """The report with what is new in it behind earlier measurements: scores of whole tasks and of groups, but for
        those that the same model was given the time before, as of a task that was not asked again."""
        told: dict[Series, tuple[str | None, Score]] = {}
        for snapshot in earlier:
            told |= {snapshot.series(score): (snapshot.digest, score) for score in snapshot.scores}
        measured = [(one.provenance, score) for one, score in self.wholes]
        measured += [(provenance, found.score) for provenance, found in self.grouped]
        scores = tuple(score for _, score in measured)
        # Templates are long, and no series is told by them.
        how = {score.task: provenance.model_copy(update={"template": None}) for provenance, score in measured}
        whole = Snapshot(at=at, digest=digest, scores=scores, provenance=how)
        news = tuple(score for score in scores if told.get(whole.series(score)) != (digest, score))
        known = {score.task: how[score.task] for score in news}
        newest = whole.model_copy(update={"scores": news, "provenance": known})
        return self.model_copy(update={"history": (*earlier, newest) if news else tuple(earlier)})

    @property
    def summary(self) -> str:
        """The report in a line."""
        tasks = {score.task for score in self.scores}
        wholes = [score for _, score in self.wholes]
        told = [_count(len(tasks), "task") + (f" with {len(wholes)} scores" if len(wholes) > len(tasks) else "")]
        told += [f"{one.score.task} {one.score.metric} {one.score.text}" for one in self._outermost()]
        if any(score.chance is not None for score in wholes):
            near = [score for score in wholes if score.near_chance]
            below = any(score.below_chance for score in near)
            told.append(f"{len(near)} within two standard errors of chance{' or below' if below else ''}")
        compared = [one for one in self.differences if one.group is None]
        if compared:
            told += self._against(compared, "")
        parts = [one for one in self.differences if one.group is not None]
        if parts:
            told += self._against(parts, "part")
        return ", ".join(told)

    def _outermost(self) -> list[GroupScore]:
        """The figures of groups that lie in no other one."""
        inner = {one.name for one in self.groups for other in self.groups if set(one.tasks) < set(other.tasks)}
        return [found for _, found in self.grouped if found.score.task not in inner]

    def _against(self, found: Sequence[Difference], what: str) -> list[str]:
        falls = sum(one.is_fall(self.level) for one in found)
        rises = sum(one.is_rise(self.level) for one in found)
        below = f"{_count(falls, what) if what else falls} significantly below {self.other}"
        above = f"{_count(rises, what) if what else rises} significantly above it"
        return [below, *([above] if rises else [])]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
