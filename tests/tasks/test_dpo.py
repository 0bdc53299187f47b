"""The stage `dpo`: a model that learns to prefer right sums to wrong ones, what its record says, what it refuses."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from pydantic import ValidationError

from common.errors import UserError
from common.files import canonical_json
from models.chat import Template, chat_of
from models.engine import Batch, inference_engine
from models.tokenizer import Tokenizer
from models.training.metrics import read_csv
from models.training.shards import write_shard
from models.weights import whole_pieces
from tasks.checkpoint import read_model
from tasks.history import Trained, read_history
from tasks.registry import stage_named
from tests.tasks import conversations
from tests.tasks.conftest import RunStage
from tests.tasks.training_stages import MODEL, TOKENIZER, pretraining

LENGTH = 7
"""Positions of a row: the bos, `9+9=18`, and the eos as the last one's target."""


class Pair(NamedTuple):
    prompt: str
    right: str
    wrong: str


def sums(seed: int, wrong: int) -> list[Pair]:
    """Every sum of two digits, each with so many wrong answers."""
    numbers = np.random.default_rng(seed)
    found = []
    for a, b in np.ndindex(10, 10):
        others = numbers.permutation([answer for answer in range(19) if answer != a + b])[:wrong]
        found += [Pair(f"{a}+{b}=", str(a + b), str(other)) for other in others]
    return found


def pair_tokens(folder: Path, tokenizer: Path, splits: Mapping[str, Sequence[Pair]]) -> Path:
    """A tokens artifact as `loss_on: pairs` makes it: the chosen document, then the rejected one, masks on answers."""
    encoder, described = Tokenizer(tokenizer), {}
    for split, pairs in splits.items():
        documents, masks = [], []
        for pair in pairs:
            for answer in (pair.right, pair.wrong):
                prompt = [encoder.bos_id, *encoder.encode(pair.prompt)]
                target = [*encoder.encode(answer), encoder.eos_id]
                documents.append(prompt + target)
                masks.append([0] * len(prompt) + [1] * len(target))
        ends, name = np.cumsum([len(one) for one in documents]), f"{split}-00000.safetensors"
        folder.mkdir(exist_ok=True)
        write_shard(folder / name, np.concatenate(documents).astype(np.uint16), ends, np.concatenate(masks))
        lengths = np.unique([len(one) for one in documents], return_counts=True)
        shard = {"name": name, "tokens": int(ends[-1]), "documents": len(documents)}
        described[split] = {"lengths": np.stack(lengths, 1).tolist(), "shards": [shard]}
    ids = {f"{role}_id": getattr(encoder, f"{role}_id") for role in ("pad", "bos", "eos")}
    text = canonical_json({**ids, "loss_on": "pairs", "splits": described})
    (folder / "tokens.json").write_bytes(text)
    shutil.copytree(tokenizer, folder / "tokenizer")
    return folder


@pytest.fixture
def inputs(run_stage: RunStage, tmp_path: Path) -> dict[str, Path]:
    """Pairs, and a model that has seen what sums look like."""
    tokenizer, _ = run_stage("tokenizer", TOKENIZER)
    documents, _ = run_stage(
        "documents", {"source": {"kind": "arithmetic", "maximum": 9, "train": 60, "validation": 9, "test": 3}}
    )
    texts, _ = run_stage("tokens", {"bos": True}, documents=documents, tokenizer=tokenizer)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = pretraining(steps=20, batch_size=16, sequence_length=LENGTH, packing="documents")
    model, _ = run_stage("pretrain", {**config, "model": {**MODEL, **size}}, tokens=texts)
    splits = {"train": sums(0, 6), "validation": sums(1, 2)}
    return {"model": model, "tokens": pair_tokens(tmp_path / "pairs", tokenizer, splits)}


def tuning(**changes: Any) -> dict[str, Any]:
    """The config of a `dpo` stage, with changes to its training."""
    training = {
        "steps": 300,
        "batch_size": 64,
        "micro_batch_size": 32,
        "sequence_length": LENGTH,
        "packing": "pairs",
        "optimizer": {"learning_rate": 0.01},
        "schedule": {"warmup_steps": 10},
        "validation": {"every": 100, "samples": 2},
    }
    return {"beta": 0.2, "training": {**training, **changes}}


def prefers_right(model: Path, tokenizer: Path) -> float:
    """The share of sums of which a model finds the right answer likelier than a wrong one, in an order of its own."""
    folder, encoder = read_model(model), Tokenizer(tokenizer)
    reader = inference_engine("torch", folder.config, "float32", whole_pieces(folder.weights))
    pairs, likelihoods = sums(2, 1), []
    for answers in ([pair.right for pair in pairs], [pair.wrong for pair in pairs]):
        rows = np.full((len(pairs), LENGTH + 1), encoder.pad_id, np.int32)
        counted = np.zeros((len(pairs), LENGTH), np.bool_)
        for row, (pair, answer) in enumerate(zip(pairs, answers, strict=True)):
            ids = [encoder.bos_id, *encoder.encode(pair.prompt + answer), encoder.eos_id]
            rows[row, : len(ids)] = ids
            counted[row, len(pair.prompt) : len(ids) - 1] = True
        batch = Batch(rows[:, :-1], rows[:, 1:], counted)
        likelihoods.append((reader.log_probabilities(batch) * counted).sum(1))
    return float((likelihoods[0] > likelihoods[1]).mean())


def test_a_model_learns_to_prefer_right_sums(run_stage: RunStage, inputs: dict[str, Path]) -> None:
    output, metrics = run_stage("dpo", tuning(), **inputs)
    tokenizer = inputs["model"] / "tokenizer"
    assert 0.3 < prefers_right(inputs["model"], tokenizer) < 0.7
    assert prefers_right(output, tokenizer) > 0.9
    measured = [record["preferences"] for record in metrics["validation"]]
    assert measured[0]["accuracy"] < measured[-1]["accuracy"]
    assert measured[-1]["accuracy"] > 0.9
    assert measured[-1]["margin"] == pytest.approx(measured[-1]["chosen_reward"] - measured[-1]["rejected_reward"])
    assert metrics["validation"][-1]["loss"] < 0.5 * np.log(2)
    assert f"accuracy {measured[-1]['accuracy']:.2%}" in metrics["summary"]
    _check_logs(output.parent / "logs")


def _check_logs(logs: Path) -> None:
    training, validation = (read_csv(logs / f"{name}.csv") for name in ("training", "validation"))
    assert training["accuracy"][-1] > 0.9
    assert training["margin"][0] < training["margin"][-1]
    assert validation["step"] == [100, 200, 300]
    assert validation["accuracy"][-1] > 0.9
    assert (logs / "loss.png").stat().st_size
    samples = [json.loads(line) for line in (logs / "samples.jsonl").read_text().splitlines()]
    # The prompts of the first two pairs, which are of one sum, and its right answer.
    assert [(one["prompt"], one["expected"]) for one in samples if one["step"] == 300] == [("0+0=", "0")] * 2


def preferences(path: Path, count: int) -> Path:
    """Rows of which the chosen answer is no, where a model of `conversations` says yes."""
    numbers = np.random.default_rng(0)
    questions = ["".join(numbers.choice(list("abcdef"), numbers.integers(2, 7))) for _ in range(count)]
    rows = [
        {"prompt": f"{asked}?", "chosen": f"no {asked[-1]}!", "rejected": f"yes {asked[-1]}!"} for asked in questions
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_preferences_become_a_published_model(run_stage: RunStage, tmp_path: Path, template: Template) -> None:
    """From rows to adapters, by way of every stage, or to whole weights where the template's tokens get rows."""
    tokenizer, _ = run_stage("tokenizer", conversations.TOKENIZER)
    said = conversations.write_tokens(tmp_path / "said", tokenizer)
    config = {"model": conversations.model(), "training": conversations.training(steps=20)}
    base, _ = run_stage("pretrain", config, tokens=said)
    source = {"kind": "files", "path": str(preferences(tmp_path / "preferences.jsonl", 120))}
    documents, _ = run_stage(
        "documents", {"source": source, "conversations": "preferences", "split": {"validation": 0.1}}
    )
    keys = {"template": template, "loss_on": "pairs", "bos": True, "max_tokens": 60}
    pairs, _ = run_stage("tokens", keys, documents=documents, tokenizer=tokenizer)
    rows, lora = conversations.VOCABULARY, {"lora": {"rank": 4}}
    if template == "chatml":
        rows, lora = rows + 2, {}
    changes = {"batch_size": 16, "micro_batch_size": None, "validation": {"every": 20, "samples": 1}}
    adapting = {**tuning(steps=20, sequence_length=59, **changes), "vocab_size": rows, **lora}
    tuned, metrics = run_stage("dpo", adapting, model=base, tokens=pairs)
    assert metrics["vocabulary"]["rows"] == rows
    measured = metrics["validation"][-1]
    assert measured["loss"] < 0.9 * np.log(2)
    assert measured["preferences"]["accuracy"] > 0.9
    published, _ = run_stage("publish", {"title": "A model"}, model=tuned)
    chat = chat_of(published)
    assert chat is not None
    assert chat.template == template
    assert (published / "adapter" / "adapter_model.safetensors").exists() == bool(lora)
    if lora:
        assert metrics["trained_parameters"] < metrics["parameters"]
        # The weights beneath are those that came in, which the reference was.
        before, after = read_model(base).weights, read_model(tuned, merge=False).weights
        for name, array in before.items():
            np.testing.assert_array_equal(after[name], array, err_msg=name)


def test_the_model_goes_on_with_its_history(run_stage: RunStage, inputs: dict[str, Path]) -> None:
    output, metrics = run_stage("dpo", tuning(steps=4, schedule={}, validation={"every": 2, "rows": 20}), **inputs)
    before, entry = read_history(output)
    assert isinstance(before, Trained)
    assert isinstance(entry, Trained)
    assert (entry.steps, entry.tokens) == (4, 4 * 64 * LENGTH)
    # A loss over a reference of its own is nothing to compare others with, and the reference reads all rows too.
    assert entry.measured_on is None
    assert [one.step for one in entry.validation] == [2, 4]
    assert entry.flops / entry.tokens == pytest.approx(4 / 3 * before.flops / before.tokens)
    assert metrics["flops"] == entry.flops
    assert read_model(output).config == read_model(inputs["model"]).config
    assert (output / "tokenizer" / "tokenizer.json").exists()


def test_beta_is_how_dear_it_is_to_leave_the_model(run_stage: RunStage, inputs: dict[str, Path]) -> None:
    margins = []
    for beta in (0.05, 0.5):
        config = tuning(steps=30, validation={"every": 30}) | {"beta": beta}
        _, metrics = run_stage("dpo", config, **inputs)
        margins.append(metrics["validation"][-1]["preferences"]["margin"] / beta)
    assert margins[0] > 1.2 * margins[1] > 0


def test_texts_are_no_pairs_and_pairs_are_no_texts(run_stage: RunStage, inputs: dict[str, Path]) -> None:
    texts = inputs["tokens"].parent / "texts"
    shutil.copytree(inputs["tokens"], texts)
    description = json.loads((texts / "tokens.json").read_bytes())
    (texts / "tokens.json").write_bytes(canonical_json({**description, "loss_on": "assistant"}))
    with pytest.raises(UserError, match=r"^the tokens 'tokens' are no pairs of answers: make them with loss_on: pairs"):
        run_stage("dpo", tuning(), model=inputs["model"], tokens=texts)
    learns = r"^the tokens 'tokens' are pairs of answers, of which the stage dpo alone learns$"
    for packing, tokens, message in (
        ("documents", inputs["tokens"], learns),
        ("pairs", texts, r"^training.packing: pairs is for the stage dpo alone; leave it out$"),
    ):
        config = {"training": {**tuning()["training"], "packing": packing}}
        with pytest.raises(UserError, match=message):
            run_stage("refine", config, model=inputs["model"], tokens=tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": "documents"}, "set training.packing: pairs"),
        ({"batch_size": 33, "micro_batch_size": None}, "batch_size 33 has to be even"),
        ({"micro_batch_size": 1}, "micro_batch_size 1 has to be even"),
        ({"validation": {"every": 1, "rows": 7}}, "validation.rows 7 has to be even"),
        ({"validation": {"every": 1, "exact_match_rows": 4}}, "leave validation.exact_match_rows out"),
    ],
)
def test_what_has_no_meaning_for_pairs_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        stage_named("dpo").config.model_validate(tuning(**changes))
    with pytest.raises(ValidationError, match="greater than 0"):
        stage_named("dpo").config.model_validate({**tuning(), "beta": 0.0})
