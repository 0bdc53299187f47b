"""Stage `publish`: a folder that `transformers` opens, with a model card.

A model that has a class in `transformers` needs no custom code; beside any other lie two Python files that are all
it needs (see `models.hub`).
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from common.config import FrozenModel
from common.errors import UserError
from models.chat import chat_of
from models.hub import CODE, hub_config, hub_weights, native_class
from models.tokenizer import tokenizer_files
from models.weights import parameter_count, write_arrays
from tasks.checkpoint import ADAPTER, WEIGHTS, read_model, tokenizer_of, write_adapters
from tasks.model_card import kind_of, model_card
from tasks.report import REPORT_MARKDOWN
from tasks.scores import RESULTS
from tasks.stage import Context, Kind, Metrics, Stage


class Config(FrozenModel):
    """What the model card says beside what was measured."""

    title: str = Field(min_length=1)
    """The model's name on its card."""
    description: str = ""
    """What the model is for, a sentence or two."""
    license: str = "mit"
    """The licence of the weights, as the Hugging Face hub calls it: mit, apache-2.0, odc-by, …"""
    base_model: str | None = Field(default=None, min_length=1)
    """Where the model beneath the adapters is to be had, for whoever opens `adapter/`; null for not said."""


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes config.json, generation_config.json, model.safetensors, the tokenizer, README.md, and the model's own
    code where no `transformers` class has its composition. Adapters are in the weights, and apart in `adapter/`."""
    unmerged = read_model(inputs["model"], merge=False)
    model, adapters = unmerged.merged(), unmerged.adapters
    tokenizer = tokenizer_of(inputs["model"], model.config)
    # A chat model may end texts with another token than answers; a list is then what transformers stops at.
    stops = tokenizer.eos_id if len(tokenizer.stop_ids) == 1 else list(tokenizer.stop_ids)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops, "pad_token_id": tokenizer.pad_id}
    chat = chat_of(inputs["model"] / "tokenizer")
    description = hub_config(model.config, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    _write_json(context.output / "config.json", description)
    _write_json(context.output / "generation_config.json", {**ids, "do_sample": False})
    write_arrays(context.output / WEIGHTS, hub_weights(model.config, model.weights), {"format": "pt"})
    if adapters is not None:
        write_adapters(context.output / ADAPTER, model.config, adapters, config.base_model)
    code = () if native_class(model.config) else CODE
    for path in (*code, *tokenizer_files(inputs["model"] / "tokenizer")):
        shutil.copyfile(path, context.output / path.name)
    results = json.loads((inputs["evaluation"] / RESULTS).read_bytes()) if "evaluation" in inputs else None
    report = _report(inputs["report"]) if "report" in inputs else ""
    card = model_card(config, unmerged, chat, results, report, context.lineage)
    (context.output / "README.md").write_text(card, encoding="utf-8")
    parameters = parameter_count(model.config)
    metrics: Metrics = {"summary": f"{kind_of(model.config)}, {parameters:,} parameters", "parameters": parameters}
    for score in ("exact_match", "token_perplexity", "word_perplexity", "bits_per_byte"):
        if results is not None and score in results:
            metrics[score] = results[score]
    return metrics


def _report(folder: Path) -> str:
    path = folder / REPORT_MARKDOWN
    if not path.is_file():
        raise UserError("the report of a publication is one over evaluations, of a stage `report`")
    return path.read_text(encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# The files of `models/published` are part of what comes out: the version is raised when they change.
STAGE = Stage(
    name="publish",
    version=5,
    config=Config,
    inputs={"model": Kind.MODEL},
    optional_inputs={"evaluation": Kind.EVALUATION, "report": Kind.REPORT},
    output=Kind.PUBLISHED,
    run=run,
)
