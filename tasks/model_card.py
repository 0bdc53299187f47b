"""The model card of a published folder: what the model is, what was measured, how it is used, what it was made from."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from models.chat import Chat
from models.config import ModelConfig
from models.hub import CODE, native_class
from models.tuning import LoraConfig
from models.weights import parameter_count
from tasks.checkpoint import ADAPTER, ModelFolder
from tasks.exact_match import SHOWN_GROUPS, shown_groups, shown_lengths
from tasks.scores import Score

_MARKS = re.compile(r"[\\|*_<`\[]")
"""What Markdown would take for more than itself in a table."""


class About(Protocol):
    """What is said of a model beside what was measured, as the stage's config has it."""

    @property
    def title(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def license(self) -> str: ...
    @property
    def base_model(self) -> str | None: ...


def model_card(
    about: About, model: ModelFolder, chat: Chat | None, results: dict[str, Any] | None, report: str, lineage: str
) -> str:
    """The card. `results`: those of an evaluation; `report`: one over evaluations, in Markdown, or nothing."""
    shape = model.config
    sections = [
        f"---\nlicense: {json.dumps(about.license)}\nlibrary_name: transformers\npipeline_tag: text-generation\n---",
        f"# {about.title}",
        about.description,
        f"{kind_of(shape)}, {parameter_count(shape):,} parameters: {shape.num_hidden_layers} layers, "
        f"{shape.hidden_size} wide, {shape.num_attention_heads} heads, {shape.intermediate_size} inner, "
        f"{shape.vocab_size:,} tokens in the vocabulary, {shape.max_position_embeddings:,} positions.",
    ]
    if results is not None:
        sections.append(_results(results))
    if report:
        # Its own heading is the first; the card has one already.
        sections.append(re.sub(r"^#", "##", report.strip(), flags=re.MULTILINE))
    prompt = results["samples"][0]["prompt"] if results and results.get("samples") else ""
    # A model with learned positions has none beyond its last.
    room = min(256, max(1, shape.max_position_embeddings // 2))
    calls = _writing(prompt) if chat is None else _asking(prompt or "Hello!", room)
    sections.append(_usage(calls, own_code=native_class(shape) is None))
    if chat is not None:
        sections.append(
            "A special token that is written out in a message is taken for the token; in training it was text."
        )
    if model.adapters is not None:
        sections.append(_adapters(model.adapters.config, about.base_model))
    if lineage:
        sections.append(f"## Made from\n\n{lineage}\n\nThe digests are those of the artifacts' contents.")
    return "\n\n".join(section for section in sections if section) + "\n"


def _adapters(lora: LoraConfig, base_model: str | None) -> str:
    beneath = "the model that they were trained on" if base_model is None else f"`{base_model}`"
    return (
        f"## Adapters\n\nTuned with LoRA: rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}. The "
        f"weights here have the adapters in them. `{ADAPTER}/` holds them apart, as `peft` opens them, for {beneath}: "
        f"on the weights here they would count twice."
    )


def kind_of(config: ModelConfig) -> str:
    """What a model is, in a word or some."""
    return native_class(config) or f"{config.norm}, {config.position_embedding} positions, {config.mlp} MLP"


def _results(results: dict[str, Any]) -> str:
    if results.get("measure") == "perplexity":
        return _perplexity(results)
    if results.get("measure") in ("benchmark", "behaviour"):
        return _scores(results["scores"])
    lengths = [("all", results), *((group["length"], group) for group in shown_lengths(results["by_answer_length"]))]
    sections = [
        f"## Results\n\nExact match by greedy generation over the whole {results['split']} split, with its standard "
        "error and Wilson's 95% interval.",
        _shares("characters of the answer", lengths),
    ]
    # A single group is the whole once more.
    for name, groups in ((name, groups) for name, groups in results["groups"].items() if len(groups) > 1):
        shown = shown_groups(groups)
        if len(shown) < len(groups):
            sections.append(f"By {name}, the {SHOWN_GROUPS} worst of {len(groups):,}:")
        sections.append(_shares(name, [(group["group"], group) for group in shown]))
    if "marks" in results:
        sections.append(_marks(results["marks"]))
    return "\n\n".join(sections)


def _scores(scores: Iterable[Mapping[str, Any]]) -> str:
    lines = ["| task | measure | score | chance | n |", "|---|---|---|---|---|"]
    for dumped in scores:
        score = Score.of(dumped)
        name = score.metric if score.group is None else f"{score.metric}, {score.group}"
        cells = (_cell(score.task), _cell(name), score.text, score.figure(score.chance), f"{score.n:,}")
        lines.append(f"| {' | '.join(cells)} |")
    return "## Results\n\n" + "\n".join(lines)


def _cell(text: object) -> str:
    return " ".join(_MARKS.sub(r"\\\g<0>", str(text)).split())


def _shares(of: str, rows: Iterable[tuple[object, Mapping[str, Any]]]) -> str:
    """A table of exact matches; what they are of may be any text."""
    lines = [f"| {of} | problems | exact match | 95% interval |", "|---|---|---|---|"]
    for name, measured in rows:
        error = measured["standard_error"]
        share = f"{measured['exact_match']:.2%}" + ("" if error is None else f" ± {error:.2%}")
        low, high = measured["interval"]
        lines.append(f"| {_cell(name)} | {measured['n']:,} | {share} | {low:.2%} to {high:.2%} |")
    return "\n".join(lines)


def _marks(marks: dict[str, Any]) -> str:
    return (
        f"Of the {marks['n']:,} answers that have calculator marks such as `<<48/2=24>>`:\n\n"
        "| marks are well-formed | and all of them right | the final number is right |\n|---|---|---|\n"
        f"| {marks['well_formed']:.2%} | {marks['right']:.2%} | {marks['final_number']:.2%} |"
    )


def _perplexity(results: dict[str, Any]) -> str:
    token, word = (results[f"{unit}_perplexity"] for unit in ("token", "word"))
    table = (
        f"## Results\n\nOver the whole {results['split']} split{_of(results['data'])}, {results['tokens']:,} tokens, "
        f"in windows of {results['window']:,} tokens of which each further one scores {results['stride']:,}. Before "
        f"each document stands `{results['bos']}`, which is not scored.\n\n"
        "| perplexity per token | perplexity per word | bits per byte |\n|---|---|---|\n"
        f"| {'∞' if token is None else f'{token:,.2f}'} | {'∞' if word is None else f'{word:,.1f}'} "
        f"| {results['bits_per_byte']:.4f} |"
    )
    shown = [f"> **{sample['prompt']}**{sample['continuation']}".replace("\n", "\n> ") for sample in results["samples"]]
    return "\n\n".join([table, *(["## Samples", *shown] if shown else [])])


def _of(data: Mapping[str, str | None]) -> str:
    """The data sets that were read, with the start of their digests or commits."""
    named = (f"`{name}`" + ("" if version is None else f" ({version[:12]})") for name, version in data.items())
    return f" of {' and '.join(named)}" if data else ""


def _writing(prompt: str) -> str:
    """How a text is gone on with, in Python."""
    return f"""ids = [tokenizer.bos_token_id, *tokenizer.encode({prompt!r}, add_special_tokens=False)]
print(tokenizer.decode(model.generate(torch.tensor([ids]), max_new_tokens=16)[0]))"""


def _asking(question: str, max_new_tokens: int) -> str:
    """How a chat model is asked, in Python."""
    return f"""chat = [{{"role": "user", "content": {question!r}}}]
asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**asked, max_new_tokens={max_new_tokens})[0, asked["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True).strip())"""


def _usage(calls: str, own_code: bool) -> str:
    trusted = ", trust_remote_code=True" if own_code else ""
    imports = "import torch\n" if "torch." in calls else ""
    usage = f"""## Use

```python
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder"{trusted})
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{trusted})
{calls}
```"""
    if not own_code:
        return usage
    configuration, modeling = (f"`{path.name}`" for path in CODE)
    return f"""{usage}

`transformers` has no class with this composition, so the model's code lies in this folder, in {configuration}
and {modeling}, and `trust_remote_code=True` lets `transformers` run it. It imports PyTorch and `transformers`
and nothing else; read it first."""
