"""Stage `compare`: models side by side, loss against FLOPs, and what growth saved or cost."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.config import FrozenModel
from common.files import canonical_json
from tasks.comparison import Compared, compare, lowest, verdict
from tasks.comparison_picture import draw_comparison
from tasks.history import read_history
from tasks.stage import Context, Kind, Metrics, Stage, gathered

REPORT, COMPARISON_PICTURE = "report.json", "comparison.png"


class Config(FrozenModel):
    """What is compared: the models, which are written as an input."""

    names: tuple[str, ...] = ()
    """What the stages that made the models are called; set where the recipe is loaded."""


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes `report.json`: a list of `tasks.comparison.Compared`. The picture is among the logs.

    Raises UserError for models whose losses cannot be compared.
    """
    folders = gathered(inputs, "models")
    models = compare(
        [(name, read_history(folder)) for name, folder in zip(config.names, folders.values(), strict=True)]
    )
    rows = [json.loads(model.model_dump_json()) for model in models]
    (context.output / REPORT).write_bytes(canonical_json(rows))
    (context.logs / COMPARISON_PICTURE).write_bytes(draw_comparison(models, context.name))
    # A curve has as many points as there were validations: the report keeps them, the record need not.
    return {
        "summary": _summary(models),
        "models": [{key: value for key, value in row.items() if key != "phases"} for row in rows],
    }


def _summary(models: Sequence[Compared]) -> str:
    verdicts = [said for model in models if (said := verdict(model)) is not None]
    if len(verdicts) == 1:
        return verdicts[0]
    best = lowest(models)
    said = "no loss is finite" if best is None else f"the lowest loss, {best.loss:.4f}, has {best.name}"
    return f"{len(models)} models; {said}"


STAGE = Stage(
    name="compare",
    version=2,
    config=Config,
    inputs={"models": Kind.MODEL},
    named={"models": "names"},
    # Histories are all that is read.
    lazy={"models": ".safetensors"},
    output=Kind.REPORT,
    run=run,
)
