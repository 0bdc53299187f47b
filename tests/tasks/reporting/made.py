"""Evaluations as stages leave them, and a report that has everything, for tests of what reads them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from common.files import canonical_json
from tasks.groups import Measure, TaskGroup
from tasks.reporting.report_data import Evaluation, Provenance, Published, Report, Snapshot
from tasks.reporting.significance import Difference
from tasks.scores import RESULTS, SAMPLES, Score, share

BAD = '"><script>alert(1)</script>|`*_[x](javascript:alert(1))\n<b>'
"""A name as nobody should give one."""


def evaluation(
    folder: Path,
    values: Sequence[bool | float | None],
    task: str = "arc_easy",
    metric: str = "acc",
    ids: Sequence[Any] | None = None,
    chance: float | None = None,
    categories: Sequence[str] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    scores: Sequence[Score] | None = None,
    **results: Any,
) -> Path:
    """An evaluation's folder, in which each document was given a value."""
    folder.mkdir(parents=True)
    found = {"id": range(len(values)) if ids is None else ids, metric: values, **(columns or {})}
    if categories is not None:
        found["category"] = categories
    pq.write_table(pa.table({name: pa.array(list(column)) for name, column in found.items()}), folder / SAMPLES)
    if scores is None:
        told = [value for value in values if value is not None]
        scores = [share(task, metric, told, chance=chance)]
        for category in dict.fromkeys(categories or ()):
            own = [value for value, other in zip(told, categories or (), strict=True) if other == category]
            scores.append(share(task, metric, own, group=category, chance=chance))
    content = {"scores": [score.dumped() for score in scores], **results}
    (folder / RESULTS).write_bytes(canonical_json(content))
    return folder


def score(task: str = "arc_easy", value: float | None = 0.4, error: float | None = 0.01, **fields: Any) -> Score:
    return Score.model_validate(
        {"task": task, "metric": "acc", "value": value, "standard_error": error, "n": 2376} | fields
    )


def difference(first: float = 0.4, second: float = 0.5, p: float = 0.0004, **fields: Any) -> Difference:
    known = {"task": "arc_easy", "metric": "acc", "first": first, "second": second, "difference": first - second}
    return Difference.model_validate(known | {"standard_error": 0.02, "p": p, "n": 2376} | fields)


def published(model: str = "GPT-2 124M", value: float = 0.438, **fields: Any) -> Published:
    known = {"model": model, "task": "arc_easy", "metric": "acc", "value": value, "few_shot": 0}
    return Published.model_validate(known | {"source": "A card", "url": "https://example.org/card"} | fields)


def task_group(name: str = "sums", *tasks: str, weight_by_size: bool = True) -> TaskGroup:
    return TaskGroup(name=name, tasks=tasks, measures=(Measure(metric="acc", weight_by_size=weight_by_size),))


def report(name: str = "elite-112m", **fields: Any) -> Report:
    """A report with a score of every sort; `name` stands wherever a name may stand."""
    whole = score(name, 0.4, chance=0.25, majority=0.27)
    scores = (
        whole,
        score("copa", 0.52, error=0.05, chance=0.5, majority=0.55),
        score("boolq", 0.6, chance=0.5, majority=0.62),
        score("aqua", 0.1, chance=0.2),
        score("wikitext", 42.3, error=1.2, metric="word_perplexity", higher_is_better=False),
        score("wikitext", None, error=None, metric="token_perplexity", higher_is_better=False),
        score("behaviour", 0.5, metric=name),
        score("behaviour", 0.25, metric=name, group=name),
        score("behaviour", 1.0, error=0.0, metric=name, group="digits: 3"),
    )
    provenance = Provenance(num_fewshot=5, template=name, task_version="1.0", lm_eval="0.4.13", data={name: "ab" * 32})
    earlier = tuple(one.model_copy(update={"value": one.value and one.value * 0.9}) for one in scores)
    known: dict[str, Any] = {
        "title": name,
        "model": name,
        "other": name,
        "evaluations": (
            Evaluation(
                name=name,
                provenance=provenance,
                scores=scores,
                kinds={name: name},
                intervals={"digits: 3": (0.86, 1.0)},
            ),
        ),
        "references": (
            published(name, task=name, source=name),
            published("OPT-125M", task=name, value=0.41, certain=False, few_shot=None),
        ),
        "history": (Snapshot(at="2026-10-01T03:00:00Z", scores=earlier), Snapshot(scores=scores)),
        "differences": (
            difference(task=name),
            difference(0.5, 0.4, task="copa"),
            difference(0.5, 0.49, p=0.4, task="boolq"),
            difference(task="behaviour", metric=name, group=name),
            difference(1.1, 1.0, task="wikitext", metric="bits_per_byte", higher_is_better=False),
        ),
    }
    return Report(**(known | fields))
