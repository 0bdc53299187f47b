"""Stage `report`: the scores of a model beside chance, beside what was published of others, over time, and beside
another model, as a page and as Markdown."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from common.config import FrozenModel
from common.errors import UserError
from common.files import canonical_json, sha256_file
from tasks.groups import TaskGroup, group_scores
from tasks.reporting.markdown import to_markdown
from tasks.reporting.page import to_html
from tasks.reporting.reading import read_evaluation, told_apart
from tasks.reporting.references import REFERENCES, reference_scores
from tasks.reporting.report_data import Evaluation, Moment, Published, Report, Snapshot
from tasks.reporting.significance import LEVEL, Difference, differences
from tasks.stage import Context, Kind, Metrics, Stage, gathered

REPORT_DATA, REPORT_PAGE, REPORT_MARKDOWN = "report.json", "report.html", "report.md"


class Config(FrozenModel):
    """What is reported, and what the models are called in it. What is read is written as inputs: `evaluations` of the
    model, `others` of the model or of the time that it is held against, and `previous`, an earlier report of the model,
    whose history is carried on."""

    title: str = Field(min_length=1)
    """The report's title."""
    model: str = Field(min_length=1)
    """The model's name in the report."""
    other: str = Field(default="other", min_length=1)
    """What the model is held against, where there are `others`."""
    at: Moment | None = None
    """When it was measured, ISO 8601; null where the history need not say."""
    digest: str | None = None
    """The digest of the model, by which the history tells a new model from the same one; null to go by scores alone."""
    history: tuple[Snapshot, ...] = ()
    """What was measured before, as an earlier report has it: instead of the input `previous`, for a report that is made
    again and again would have every model of its history among what it was made from, and keep them all."""
    level: float = Field(default=LEVEL, gt=0, lt=1)
    """The p below which a difference is called significant."""
    groups: tuple[TaskGroup, ...] = ()
    """Groups of tasks whose figures are shown, of which the evaluations have every task."""
    references: str | None = None
    """The digest of the published values that the model is set beside; set where the recipe is loaded."""
    names: tuple[str, ...] = ()
    """What the stages that made the evaluations are called; set where the recipe is loaded."""
    other_names: tuple[str, ...] = ()
    """What those of the others are called; set where the recipe is loaded."""


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes `report.json`, a `tasks.reporting.report_data.Report`, and it as `report.html` and `report.md`, which are
    among the logs too.

    A task that several of the evaluations have is told apart by the names of their stages; such evaluations are
    compared with the others of the same task in their order. Raises UserError for an evaluation without scores, and for
    a previous report that is none of this model, where the history is given beside one, for a group of which a task was
    not evaluated or several times, and where the published values are not those of the config.
    """
    if config.references not in (None, sha256_file(REFERENCES)):
        raise UserError("the published values here are other ones than where the recipe was loaded; load it again")
    own = _read(inputs, "evaluations", config.names)
    others = _read(inputs, "others", config.other_names)
    evaluations = told_apart([one for _, one in own])
    _check_groups(config.groups, evaluations)
    report = Report(
        title=config.title,
        model=config.model,
        other=config.other,
        level=config.level,
        evaluations=evaluations,
        groups=config.groups,
        references=_references(evaluations, config.groups),
        differences=_differences(own, others, evaluations),
    ).with_history(_earlier(config, inputs), config.at, config.digest)
    (context.output / REPORT_DATA).write_bytes(canonical_json(report.model_dump(mode="json")))
    for folder in (context.output, context.logs):
        (folder / REPORT_PAGE).write_text(to_html(report), encoding="utf-8")
        (folder / REPORT_MARKDOWN).write_text(to_markdown(report), encoding="utf-8")
    marked = [one for one in report.differences if one.significant(config.level)]
    return {
        "summary": report.summary,
        "differences": [one.model_dump(mode="json") for one in marked],
        "compared": len(report.differences),
        "snapshots": len(report.history),
    }


def read_report(path: Path) -> Report:
    """A report as `report.json` has it. Raises UserError where the file is something else."""
    try:
        return Report.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{path} is no report over evaluations; name what a stage `report` made") from error


def _read(inputs: Mapping[str, Path], key: str, names: Sequence[str]) -> list[tuple[Path, Evaluation]]:
    folders = gathered(inputs, key)
    return [
        (folder, read_evaluation(folder, name)) for folder, name in zip(folders.values(), names or folders, strict=True)
    ]


def _check_groups(groups: Sequence[TaskGroup], evaluations: Sequence[Evaluation]) -> None:
    tasks = {score.task for one in evaluations for score in one.scores}
    for group in groups:
        missing = [task for task in group.tasks if task not in tasks]
        if missing:
            raise UserError(
                f"the group '{group.name}' has the task '{missing[0]}', which must be in one of the evaluations, and "
                "in no more than one"
            )


def _references(evaluations: Sequence[Evaluation], groups: Sequence[TaskGroup]) -> tuple[Published, ...]:
    """What was published of other models in the measures of whole tasks and of groups."""
    scores = [score for one in evaluations for score in one.scores]
    wholes = [score for score in scores if score.group is None]
    wholes += [found.score for group in groups for found in group_scores(group, scores)]
    measures = dict.fromkeys((score.task, score.metric) for score in wholes)
    return tuple(
        Published(
            model=model,
            task=task,
            metric=metric,
            certain=score.metric == metric,
            value=score.value,
            few_shot=score.few_shot,
            source=source.title,
            url=source.url,
        )
        for task, metric in measures
        for model, score, source in reference_scores(task, metric)
    )


def _differences(
    own: Sequence[tuple[Path, Evaluation]],
    others: Sequence[tuple[Path, Evaluation]],
    evaluations: Sequence[Evaluation],
) -> tuple[Difference, ...]:
    """How far the evaluations lie from the others, task by task; `evaluations` are those of `own`, told apart."""
    against: dict[str, list[Path]] = {}
    for folder, one in others:
        for task in dict.fromkeys(score.task for score in one.scores):
            against.setdefault(task, []).append(folder)
    found: list[Difference] = []
    for (folder, one), named in zip(own, evaluations, strict=True):
        tasks = {score.task: renamed.task for score, renamed in zip(one.scores, named.scores, strict=True)}
        for task, name in tasks.items():
            if against.get(task):
                scores = [score for score in named.scores if score.task == name]
                found += differences(folder, against[task].pop(0), scores)
    return tuple(found)


def _earlier(config: Config, inputs: Mapping[str, Path]) -> tuple[Snapshot, ...]:
    if "previous" not in inputs:
        return config.history
    if config.history:
        raise UserError("the history is given, and a previous report that has one: leave one of them out")
    previous = read_report(inputs["previous"] / REPORT_DATA)
    if previous.model != config.model:
        raise UserError(
            f"the previous report is of '{previous.model}', not of '{config.model}': its history is another one"
        )
    return previous.history


def resolved(config: Config) -> Config:
    """The config with the digest of the published values, for what is made of other ones is another report."""
    return config.model_copy(update={"references": sha256_file(REFERENCES)})


# How a report is written and drawn is part of what comes out: the version is raised when that changes.
STAGE = Stage(
    name="report",
    version=3,
    config=Config,
    inputs={"evaluations": Kind.EVALUATION},
    optional_inputs={"others": Kind.EVALUATION, "previous": Kind.REPORT},
    named={"evaluations": "names", "others": "other_names"},
    output=Kind.REPORT,
    run=run,
    resolved=resolved,
)
