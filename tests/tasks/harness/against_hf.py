"""Holds Cairn's answers to lm-eval's requests against those of lm-eval's own `hf` model on the same published folder.

`python -m tests.tasks.harness.against_hf` does it for every task of the group `seed`, whole where they are small, and
prints a table; the tests do it with few documents.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from models.config import ModelConfig
from models.engine import EngineName, inference_engine
from models.tokenizer import ADD_BOS_SETTING, TOKENIZER_CONFIG, TOKENIZER_FILE, Tokenizer, read_settings, write_settings
from models.weights import initial_weights, whole_pieces
from tasks import publish
from tasks.benchmark import BOOTSTRAPS, Config, load_task, resolved
from tasks.checkpoint import ModelFolder, read_model, write_model
from tasks.harness.adapter import HarnessModel
from tasks.harness.catalogue import GROUPS
from tasks.hub import local_copy
from tasks.stage import Context, Runtime
from tasks.vocabulary.hub import write_hub_tokenizer

NEAR, TIE = 1e-3, 2e-3
"""How far a log-probability may be apart, and how near to each other choices are of which either may be taken."""
SHAPES: dict[str, dict[str, object]] = {
    "llama": {"architecture": "llama", "num_key_value_heads": 2},
    "gpt2": {"architecture": "gpt2"},
}
HUB_TOKENIZERS = {"llama": "HuggingFaceTB/SmolLM2-135M", "gpt2": "openai-community/gpt2"}


class Model(NamedTuple):
    """A model artifact and the same model as a published folder."""

    artifact: Path
    published: Path


class Compared(NamedTuple):
    """How two sets of answers to the same requests differ."""

    requests: int
    furthest: float
    """The largest difference of a log-probability."""
    scores: dict[str, tuple[float, float]]
    """Each metric, theirs and ours."""
    other_choices: int
    """Documents in which another choice is taken though the two best are further apart than a tie."""


def random_model(place: Path, kind: str, *, bos: bool = False, **shape: object) -> Model:
    """A random model with a real tokenizer; `bos`: of the kind that puts <bos> before every text by itself."""
    artifact, published = place / "model", place / "published"
    (artifact / "tokenizer").mkdir(parents=True)
    published.mkdir()
    source = local_copy("tokenizer", HUB_TOKENIZERS[kind])
    assert source is not None, "CAIRN_HUB has the tokenizers"
    write_hub_tokenizer(source, artifact / "tokenizer", kind)
    size = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        # Choices are far enough apart that few are ties.
        "initializer_range": 0.2,
        "vocab_size": len(Tokenizer(artifact / "tokenizer")),
    }
    config = ModelConfig.model_validate({**size, **SHAPES[kind], **shape})
    write_model(artifact, ModelFolder(config, {**initial_weights(config, seed=1)}, None, None, ()))
    _publish(artifact, published)
    if bos:
        _add_bos(artifact, published)
    return Model(artifact, published)


def _publish(artifact: Path, published: Path) -> None:
    nowhere = Path(tempfile.gettempdir())
    context = Context("published", published, nowhere, (None, ""), nowhere, Runtime(), lambda event: None)
    publish.run(publish.Config(title="random"), {"model": artifact}, context)


def _add_bos(artifact: Path, published: Path) -> None:
    """Makes both sides' tokenizer one that puts <bos> before every text."""
    settings = artifact / "tokenizer" / TOKENIZER_CONFIG
    write_settings(settings, {**read_settings(settings), ADD_BOS_SETTING: True})
    tokenizer = Tokenizer(artifact / "tokenizer")
    backend = Backend.from_file(str(published / TOKENIZER_FILE))
    bos = str(backend.id_to_token(tokenizer.bos_id))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_id)]
    )
    backend.save(str(published / TOKENIZER_FILE))


def theirs(model: Model, batch_size: int = 16) -> Any:
    """lm-eval's own model."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(model.published), dtype="float32", device="cpu", batch_size=batch_size)


def ours(model: Model, engine: EngineName = "torch", *, bos: bool = False, batch_tokens: int = 4096) -> HarnessModel:
    """Cairn's."""
    read = read_model(model.artifact)
    reader = inference_engine(engine, read.config, "float32", whole_pieces(read.weights))
    return HarnessModel(reader, Tokenizer(model.artifact / "tokenizer"), bos, batch_tokens)


def answers(lm: Any, task: str, limit: int | None, cache: Path) -> dict[str, Any]:
    """What lm-eval gives, with every sample. `cache`: a folder for what is made of the data, which others may share."""
    from lm_eval.evaluator import evaluate

    loaded, _ = load_task(resolved(Config(task=task)), cache)
    found = evaluate(lm, {"tasks": {task: loaded}, "groups": {}}, limit=limit, bootstrap_iters=BOOTSTRAPS)
    assert found is not None
    return dict(found)


def compare(task: str, first: dict[str, Any], second: dict[str, Any]) -> Compared:
    """How the second's answers differ from the first's."""
    furthest, requests, other_choices = 0.0, 0, 0
    for one, other in zip(first["samples"][task], second["samples"][task], strict=True):
        assert one["arguments"] == other["arguments"]
        pairs = [_numbers(sample["resps"]) for sample in (one, other)]
        requests += len(pairs[0])
        furthest = max(furthest, float(np.abs(pairs[0] - pairs[1]).max()))
        best = np.sort(pairs[0])[-2:]
        if len(best) == 2 and best[1] - best[0] > TIE:
            other_choices += int(pairs[0].argmax() != pairs[1].argmax())
    scores = {
        name.partition(",")[0]: (value, second["results"][task][name])
        for name, value in first["results"][task].items()
        if "," in name and "_stderr" not in name
    }
    return Compared(requests, furthest, scores, other_choices)


def _numbers(responses: Sequence[Any]) -> np.ndarray:
    return np.array([answer[0] if isinstance(answer, tuple) else answer for (answer,) in responses], np.float64)


def main() -> None:
    """Prints a table of every task of the group."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=SHAPES, default="llama")
    parser.add_argument("--bos", action="store_true")
    parser.add_argument("--engine", choices=("torch", "jax", "mlx"), default="torch")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--whole-up-to", type=int, default=1300, help="documents up to which a task is asked whole")
    parser.add_argument("--tasks", default=",".join(GROUPS["seed"]))
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder), options.kind, bos=options.bos)
        reference, own = theirs(model), ours(model, options.engine, bos=options.bos)
        print("| task | documents | requests | furthest apart | theirs | ours | other choices | s theirs | s ours |")
        print("|---|---|---|---|---|---|---|---|---|")
        for task in options.tasks.split(","):
            cache = Path(folder, "data")
            size = len(load_task(resolved(Config(task=task)), cache)[0].eval_docs)
            limit = None if size <= options.whole_up_to else options.limit
            started = time.monotonic()
            first = answers(reference, task, limit, cache)
            between = time.monotonic()
            second = answers(own, task, limit, cache)
            ended = time.monotonic()
            found = compare(task, first, second)
            both = [" ".join(f"{name} {pair[side]:.4f}" for name, pair in found.scores.items()) for side in (0, 1)]
            print(
                f"| {task} | {limit or size:,} | {found.requests:,} | {found.furthest:.1e} | {both[0]} | {both[1]} | "
                f"{found.other_choices} | {between - started:.1f} | {ended - between:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
