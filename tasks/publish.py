"""Stage `publish`: a folder that `transformers` opens with no custom code, with a model card."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from common.config import FrozenModel
from models.hub import hub_config
from models.tokenizer import tokenizer_files
from models.weights import parameter_count, write_arrays
from tasks.checkpoint import WEIGHTS, ModelFolder, read_model, tokenizer_of
from tasks.evaluate import RESULTS
from tasks.stage import Context, Kind, Metrics, Stage


class Config(FrozenModel):
    """What the model card says beside what was measured."""

    title: str = Field(min_length=1)
    """The model's name on its card."""
    description: str = ""
    """What the model is for, a sentence or two."""
    license: str = "mit"
    """The licence of the weights, an SPDX identifier in lower case."""


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes config.json, generation_config.json, model.safetensors, the tokenizer and README.md.

    Raises UserError for a model whose composition no `transformers` class has.
    """
    model = read_model(inputs["model"])
    tokenizer = tokenizer_of(inputs["model"], model.config)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    description = hub_config(model.config, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    _write_json(context.output / "config.json", description)
    _write_json(context.output / "generation_config.json", {**ids, "do_sample": False})
    write_arrays(context.output / WEIGHTS, model.weights, {"format": "pt"})
    for path in tokenizer_files(inputs["model"] / "tokenizer"):
        shutil.copyfile(path, context.output / path.name)
    results = json.loads((inputs["evaluation"] / RESULTS).read_bytes()) if "evaluation" in inputs else None
    card = _card(config, model, results, context.lineage)
    (context.output / "README.md").write_text(card, encoding="utf-8")
    parameters = parameter_count(model.config)
    metrics: Metrics = {"summary": f"{model.config.architecture}, {parameters:,} parameters", "parameters": parameters}
    for score in ("exact_match", "token_perplexity", "word_perplexity", "bits_per_byte"):
        if results is not None and score in results:
            metrics[score] = results[score]
    return metrics


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _card(config: Config, model: ModelFolder, results: dict[str, Any] | None, lineage: str) -> str:
    shape = model.config
    sections = [
        f"---\nlicense: {json.dumps(config.license)}\nlibrary_name: transformers\npipeline_tag: text-generation\n---",
        f"# {config.title}",
        config.description,
        f"{shape.architecture}, {parameter_count(shape):,} parameters: {shape.num_hidden_layers} layers, "
        f"{shape.hidden_size} wide, {shape.num_attention_heads} heads, {shape.intermediate_size} inner, "
        f"{shape.vocab_size:,} tokens in the vocabulary, {shape.max_position_embeddings:,} positions.",
    ]
    if results is not None:
        sections.append(_results(results))
    prompt = results["samples"][0]["prompt"] if results and results["samples"] else ""
    sections.append(_usage(prompt))
    if lineage:
        sections.append(f"## Made from\n\n{lineage}\n\nThe digests are those of the artifacts' contents.")
    return "\n\n".join(section for section in sections if section) + "\n"


def _results(results: dict[str, Any]) -> str:
    if results.get("measure") == "perplexity":
        return _perplexity(results)
    rows = [f"| all | {results['n']:,} | {results['exact_match']:.2%} |"]
    rows += [
        f"| {group['length']} | {group['n']:,} | {group['exact_match']:.2%} |" for group in results["by_answer_length"]
    ]
    return (
        f"## Results\n\nExact match by greedy generation over the whole {results['split']} split.\n\n"
        "| characters of the answer | problems | exact match |\n|---|---|---|\n" + "\n".join(rows)
    )


def _perplexity(results: dict[str, Any]) -> str:
    token, word = (results[f"{unit}_perplexity"] for unit in ("token", "word"))
    table = (
        f"## Results\n\nOver the whole {results['split']} split, {results['tokens']:,} tokens, in windows of "
        f"{results['window']:,} tokens of which each further one scores {results['stride']:,}.\n\n"
        "| perplexity per token | perplexity per word | bits per byte |\n|---|---|---|\n"
        f"| {'∞' if token is None else f'{token:,.2f}'} | {'∞' if word is None else f'{word:,.1f}'} "
        f"| {results['bits_per_byte']:.4f} |"
    )
    shown = [f"> **{sample['prompt']}**{sample['continuation']}".replace("\n", "\n> ") for sample in results["samples"]]
    return "\n\n".join([table, *(["## Samples", *shown] if shown else [])])


def _usage(prompt: str) -> str:
    return f"""## Use

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
ids = [tokenizer.bos_token_id, *tokenizer.encode({prompt!r}, add_special_tokens=False)]
print(tokenizer.decode(model.generate(torch.tensor([ids]), max_new_tokens=16)[0]))
```"""


STAGE = Stage(
    name="publish",
    version=2,
    config=Config,
    inputs={"model": Kind.MODEL},
    optional_inputs={"evaluation": Kind.EVALUATION},
    output=Kind.PUBLISHED,
    run=run,
)
