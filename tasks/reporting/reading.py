"""What a report reads of an evaluation: its scores, and how they came about."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common.errors import UserError
from tasks.reporting.report_data import Evaluation, Provenance
from tasks.reporting.significance import GROUP_COLON
from tasks.scores import RESULTS, Score

_PERPLEXITIES = ("token_perplexity", "word_perplexity", "bits_per_byte")


def read_evaluation(folder: Path, name: str) -> Evaluation:
    """The scores of an evaluation's folder. `name`: what the evaluation is called.

    Raises UserError where it has none.
    """
    try:
        results = json.loads((folder / RESULTS).read_bytes())
        scores = [Score.of(row) for row in results["scores"]] if "scores" in results else _without_scores(results)
        provenance = _provenance(results)
        parts = _parts(results)
        kinds = {name: row["kind"] for name, row in parts.items() if "kind" in row}
        intervals = {name: row["interval"] for name, row in parts.items() if "interval" in row}
        found = Evaluation(name=name, provenance=provenance, scores=tuple(scores), kinds=kinds, intervals=intervals)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        told = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise UserError(f"the evaluation '{name}' has no scores that can be read ({told}); evaluate again") from error
    if not scores:
        raise UserError(f"the evaluation '{name}' has no scores")
    return found


def _without_scores(results: Mapping[str, Any]) -> list[Score]:
    """The scores of an evaluation that was made before there were `scores` in its results."""
    if results.get("measure") == "perplexity":
        return [
            # Of how many documents it is was not written.
            Score(task="perplexity", metric=metric, value=results[metric], n=0, higher_is_better=False)
            for metric in _PERPLEXITIES
        ]
    value, error, n = (results[key] for key in ("exact_match", "standard_error", "n"))
    return [Score(task="exact_match", metric="exact_match", value=value, standard_error=error, n=n)]


def _parts(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What results say of the parts of their task beside the scores, by the scores' groups."""
    found = {row["category"]: row for row in results.get("categories", ())}
    for division, rows in results.get("groups", {}).items():
        found |= {f"{division}{GROUP_COLON}{row['group']}": row for row in rows}
    return found


def _provenance(results: Mapping[str, Any]) -> Provenance:
    data = results.get("data") or {}
    return Provenance(
        num_fewshot=results.get("num_fewshot"),
        template=_text(results.get("template")),
        task_version=_text(results.get("task_version")),
        lm_eval=_text(results.get("lm_eval")),
        data={str(identity): digest for identity, digest in data.items() if digest is not None},
    )


def _text(value: object) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def told_apart(evaluations: Sequence[Evaluation]) -> tuple[Evaluation, ...]:
    """The evaluations, with their own names behind those of tasks that several of them have."""
    owners = Counter(task for one in evaluations for task in {score.task for score in one.scores})
    return tuple(
        one.model_copy(
            update={
                "scores": tuple(
                    score.model_copy(update={"task": f"{score.task} ({one.name})"}) if owners[score.task] > 1 else score
                    for score in one.scores
                )
            }
        )
        for one in evaluations
    )
