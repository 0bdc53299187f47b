"""What came of a task: scores with their errors, what guessing gives, and every sample."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tasks.document_losses import ratio
from tasks.scores import Score

_FAR = -1e4
"""A log-probability that no choice comes near to."""
_ROLLING = ("word_perplexity", "byte_perplexity", "bits_per_byte")
"""Metrics of texts that are what lm-eval makes of one document as well as of all."""
Sample = Mapping[str, Any]


class Levels(NamedTuple):
    """What answers give that know nothing, per metric."""

    chance: dict[str, float]
    """Choosing blindly, each choice as often as the others; of a text, all tokens of the vocabulary alike."""
    majority: dict[str, float]
    """Always choosing the same place among the choices, the best of them; nothing where one place is right in every
    document, as in truthfulqa, for that is an order that no model is shown."""


def metric_name(metric: str, extraction: str) -> str:
    """A metric as it is called here: lm-eval's name, with that of the filter behind it where there are several."""
    return metric if extraction == "none" else f"{metric} ({extraction})"


def scores(task: str, found: Mapping[str, Any], samples: Sequence[Sample], levels: Levels) -> list[Score]:
    """lm-eval's results of one task as scores. `samples`: those that lm-eval logged."""
    made = []
    for key, value in found.items():
        metric, comma, extraction = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = found.get(f"{metric}_stderr,{extraction}")
        own = [sample[metric] for sample in samples if sample["filter"] == extraction and metric in sample]
        made.append(
            Score(
                task=task,
                metric=metric_name(metric, extraction),
                value=_finite(value),
                standard_error=_finite(error) if isinstance(error, float) else _ratio_error(metric, own),
                n=len(own),
                higher_is_better=found["higher_is_better"].get(metric, True),
                chance=levels.chance.get(metric),
                majority=levels.majority.get(metric),
            )
        )
    return made


def _finite(value: float) -> float | None:
    """None for what is no number, as lm-eval makes it of probabilities that are all too small to be told from 0."""
    return float(value) if math.isfinite(value) else None


def _ratio_error(metric: str, own: Sequence[Any]) -> float | None:
    """The standard error of perplexities over documents, of which lm-eval gives none."""
    if metric not in _ROLLING or not own:
        return None
    losses, weights = (np.array(column, np.float64) for column in zip(*own, strict=True))
    loss, error = ratio(-losses, weights)
    if error is None:
        return None
    return _finite(error / math.log(2) if metric == "bits_per_byte" else float(np.exp(loss)) * error)


def levels(task: Any, samples: Sequence[Sample], uniform: Callable[[str], float]) -> Levels:
    """What guessing gives, by asking the task itself what it makes of such answers.

    `uniform`: the log-probability of a text whose tokens are all equally likely. A metric that is no mean over the
    documents has no level here, and so has one of answers that are written: there is nothing to choose from.
    """
    kind = task.OUTPUT_TYPE
    one_filter = samples[0]["filter"] if samples else None
    own = [sample for sample in samples if sample["filter"] == one_filter]
    if kind == "loglikelihood_rolling":
        return Levels(_uniform_levels(task, own, uniform), {})
    if kind == "generate_until":
        return Levels({}, {})
    by_place: dict[str, list[list[float]]] = defaultdict(list)
    for sample in own:
        for metric, values in _by_choice(task, sample).items():
            by_place[metric].append(values)
    majority = {metric: _best_place(rows) for metric, rows in by_place.items()}
    return Levels(
        {metric: float(np.mean([np.mean(values) for values in rows])) for metric, rows in by_place.items()},
        {metric: value for metric, value in majority.items() if value is not None},
    )


def _by_choice(task: Any, sample: Sample) -> dict[str, list[float]]:
    """What each metric gives a document for each of its choices, chosen with certainty; nothing where there is no
    choice or a metric is no number."""
    asked, choices = len(sample["arguments"]), _choice_count(sample)
    if choices < 2:
        return {}
    found: dict[str, list[float]] = defaultdict(list)
    for chosen in range(choices):
        # Answers behind the choices, which are without context, are all alike.
        answers = [(0.0, True) if place == chosen else (_FAR, False) for place in range(asked)]
        for metric, value in task.process_results(sample["doc"], answers).items():
            if isinstance(value, int | float | np.number | np.bool_) and math.isfinite(value):
                found[metric].append(float(value))
    return {metric: values for metric, values in found.items() if len(values) == choices}


def _choice_count(sample: Sample) -> int:
    """The choices of a document: for mutual information, each is asked for twice, first behind its context and then
    behind none."""
    asked = len(sample["arguments"])
    return asked // 2 if "acc_mutual_info" in sample["metrics"] else asked


def _best_place(rows: Sequence[Sequence[float]]) -> float | None:
    """The mean of the place that is best, or None where it is so in every document."""
    width = max(map(len, rows))
    padded = np.array([[*row, *[0.0] * (width - len(row))] for row in rows])
    always_best = (padded == padded.max(axis=1, keepdims=True)).all(axis=0)
    return None if always_best.any() else float(padded.mean(axis=0).max())


def _uniform_levels(task: Any, samples: Sequence[Sample], uniform: Callable[[str], float]) -> dict[str, float]:
    values: dict[str, list[Any]] = defaultdict(list)
    for sample in samples:
        for metric, value in task.process_results(sample["doc"], [uniform(sample["arguments"][0][0])]).items():
            values[metric].append(value)
    aggregated = {metric: _number(task.aggregation()[metric], own) for metric, own in values.items()}
    return {metric: value for metric, value in aggregated.items() if value is not None}


def _number(aggregate: Callable[[Sequence[Any]], Any], values: Sequence[Any]) -> float | None:
    try:
        found = float(aggregate(values))
    except (ArithmeticError, ValueError, TypeError):
        return None
    return found if math.isfinite(found) else None


def sample_columns(task: Any, samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """The columns of `samples.parquet`: a row per document, the metrics of each filter beside each other.

    `prediction` and `correct` are both of the task's first filter. A prompt that begins with `…` is what goes on behind
    each of the `choices`. Where there is one text to be said, `log_probability` is its, and `greedy` whether the model
    says it by itself, which alone makes it the prediction.
    """
    by_document: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_document[sample["doc_id"]].append(sample)
    rows = [_row(task, own) for own in by_document.values()]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _row(task: Any, own: Sequence[Sample]) -> dict[str, Any]:
    first = own[0]
    row: dict[str, Any] = {
        "id": f"{first['doc_id']}-{first['doc_hash'][:16]}",
        "prompt": str(first["arguments"][0][0]),
        "target": _text(first["target"]),
        "prediction": "",
        "correct": None,
    }
    if task.OUTPUT_TYPE in ("multiple_choice", "loglikelihood"):
        row |= _choice(task, first) if len(first["arguments"]) > 1 else _continuation(first)
    elif task.OUTPUT_TYPE == "generate_until":
        row["prediction"] = _text(first["filtered_resps"][0])
    for sample in own:
        for metric in sample["metrics"]:
            if _is_of_a_document(metric, sample[metric]):
                row[metric_name(metric, sample["filter"])] = _of_a_document(task, metric, sample[metric])
    right = next((first[metric] for metric in ("acc", "exact_match") if metric in first["metrics"]), None)
    # Of several right choices, acc may be a part, which is neither.
    row["correct"] = bool(right) if right in (0, 1) else None
    return row | {"document": json.dumps(first["doc"], default=str)}


def _is_of_a_document(metric: str, value: Any) -> bool:
    """Whether a metric says something of one document: an F1, of which a document has only its two labels, does not."""
    return metric in _ROLLING or isinstance(value, int | float | np.number | np.bool_)


def _of_a_document(task: Any, metric: str, value: Any) -> float | None:
    """A metric of one document, better in the same direction as that of all: of lm-eval's `perplexity`, to which a
    document gives its log-probability, the loss."""
    from lm_eval.api.metrics import perplexity

    aggregate = task.aggregation().get(metric)
    if metric in _ROLLING:
        return _number(aggregate, [value])
    return _finite(-value if aggregate is perplexity else value)


def _choice(task: Any, sample: Sample) -> dict[str, Any]:
    """The choices of a document with their log-probabilities, and which of them the model took."""
    count = _choice_count(sample)
    asked = [(str(argument[0]), str(argument[1])) for argument in sample["arguments"][:count]]
    differing = 0 if len({continuation for _, continuation in asked}) == 1 else 1
    choices = [pair[differing] for pair in asked]
    log_probabilities = [float(answer[0]) for answer in sample["filtered_resps"][:count]]
    target = sample["target"]
    # Where the contexts differ, the target is the text that all of them go on with, and the text says which is right.
    place = task.doc_to_text(sample["doc"]) if differing == 0 and getattr(task, "multiple_input", False) else target
    told = choices[place] if isinstance(place, int) and 0 <= place < len(choices) else _text(target)
    return {
        "prompt": asked[0][0] if differing else f"…{asked[0][1]}",
        "target": told,
        "prediction": choices[int(np.argmax(log_probabilities))],
        "choices": choices,
        "log_probabilities": log_probabilities,
    }


def _continuation(sample: Sample) -> dict[str, Any]:
    """What the model makes of the one text that it is asked to say."""
    log_probability, greedy = sample["filtered_resps"][0]
    return {
        "prediction": str(sample["arguments"][0][1]) if greedy else "",
        "log_probability": float(log_probability),
        "greedy": bool(greedy),
    }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def told(made: Sequence[Score]) -> Iterator[str]:
    """Scores in words, each with its error and what guessing gives."""
    for score in made:
        mark = ", no better than chance" if score.near_chance else ""
        yield f"{score.metric} {score.text}{mark}"
