"""Several tokens in one run: what is drawn of each, what is said of it, and what does not fit together."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from common.files import canonical_json
from models.chat import chat_of
from models.training.shards import write_shard
from tests.tasks.conftest import RunStage
from tests.tasks.training_stages import TOKENIZER, pretraining

LABELS = {"tokens.0": "small", "tokens.1": "large"}


@pytest.fixture
def tokenizer(run_stage: RunStage) -> Path:
    return run_stage("tokenizer", TOKENIZER)[0]


def tokens(run_stage: RunStage, tokenizer: Path, maximum: int, **counts: int) -> Path:
    source = {"kind": "arithmetic", "maximum": maximum, "train": 60, "validation": 9, "test": 3, **counts}
    documents, _ = run_stage("documents", {"source": source})
    return run_stage("tokens", {}, documents=documents, tokenizer=tokenizer)[0]


@pytest.fixture
def both(run_stage: RunStage, tokenizer: Path) -> dict[str, Path]:
    """Tokens of short and of long documents."""
    return {
        "tokens.0": tokens(run_stage, tokenizer, 9),
        "tokens.1": tokens(run_stage, tokenizer, 99_999, train=200),
    }


def described(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "tokens.json").read_bytes())["splits"])


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_the_record_says_what_was_asked_for_and_what_came_out(
    run_stage: RunStage, both: dict[str, Path], packing: str
) -> None:
    config = pretraining({"weight": 3}, {"weight": 1}, packing=packing, steps=40, validation={"every": 20})
    _, metrics = run_stage("pretrain", config, LABELS, **both)
    small, large = metrics["blend"]
    assert [small["source"], large["source"]] == ["small", "large"]
    assert [small["share_asked"], large["share_asked"]] == [0.75, 0.25]
    assert small["rows"] + large["rows"] == 160
    assert small["share"] + large["share"] == pytest.approx(1)
    assert small["share"] == pytest.approx(0.75, abs=0.02)
    splits = [described(folder)["train"] for folder in both.values()]
    for row, split in zip(metrics["blend"], splits, strict=True):
        if packing == "stream":
            assert row["tokens"] == row["rows"] * 15
            assert row["epochs"] == row["rows"] / ((split["tokens"] - 1) // 15)
            assert row["dropped_tokens"] == (split["tokens"] - 1) % 15
        else:
            assert row["epochs"] == row["rows"] / split["documents"]
            assert row["cut_documents"] == sum(count for length, count in split["lengths"] if length > 16)
            assert row["dropped_tokens"] == sum(max(0, length - 16) * count for length, count in split["lengths"])
    # The validation loss is that of the sources by the shares that were asked for.
    for record in metrics["validation"]:
        each = record["by_source"]
        assert list(each) == ["small", "large"]
        assert record["loss"] == pytest.approx(0.75 * each["small"] + 0.25 * each["large"])
    assert metrics["best_validation"] in metrics["validation"]
    assert "notes" not in metrics or not metrics["notes"]


def test_what_came_out_is_of_the_steps_that_were_taken(run_stage: RunStage, both: dict[str, Path]) -> None:
    config = pretraining(
        {"budget": 60},
        {},
        steps=1000,
        optimizer={"learning_rate": 1e-9},
        validation={"every": 4},
        early_stopping={"patience": 2, "minimum_improvement": 1.0},
    )
    _, metrics = run_stage("pretrain", config, LABELS, **both)
    assert metrics["stopped_early"]
    assert metrics["steps"] == 12
    small, large = metrics["blend"]
    assert (small["budget"], small["tokens"], small["rows"]) == (60, 60, 4)
    assert large["rows"] == 12 * 4 - 4
    assert small["share"] == 60 / (48 * 15)


def test_one_source_has_a_row_too(run_stage: RunStage, both: dict[str, Path]) -> None:
    _, metrics = run_stage("pretrain", pretraining(validation={"every": 8}), tokens=both["tokens.0"])
    (row,) = metrics["blend"]
    assert row["share_asked"] == row["share"] == 1
    assert row["tokens"] == metrics["tokens"] == 8 * 4 * 15
    assert metrics["validation"][0]["by_source"] == {}


def test_a_budget_of_one_source_alone(run_stage: RunStage, both: dict[str, Path]) -> None:
    inputs = {"tokens.0": both["tokens.1"]}
    _, metrics = run_stage("pretrain", pretraining({"epochs": 1}), LABELS, **inputs)
    assert metrics["blend"][0]["epochs"] < 1
    with pytest.raises(UserError, match=r"1,000 steps of 4 rows need 4,000 rows, but the budgets allow \d+ \(small"):
        run_stage("pretrain", pretraining({"epochs": 1}, steps=1000), LABELS, **inputs)


def test_a_source_without_a_validation_split_is_left_out_and_it_is_said(
    run_stage: RunStage, tokenizer: Path, both: dict[str, Path]
) -> None:
    folder = both["tokens.1"]
    description = json.loads((folder / "tokens.json").read_bytes())
    del description["splits"]["validation"]
    (folder / "tokens.json").write_bytes(canonical_json(description))
    _, metrics = run_stage("pretrain", pretraining({}, {}, validation={"every": 8}), LABELS, **both)
    assert metrics["notes"] == ["'large' has no validation split: validation losses are of the other tokens"]
    assert metrics["validation"][0]["by_source"] == {}
    with pytest.raises(UserError, match=r"no validation split: make one of the documents, or set training.validation"):
        run_stage("pretrain", pretraining(validation={"every": 8}), tokens=folder)
    run_stage("pretrain", pretraining(), tokens=folder)


def test_tokens_of_different_tokenizers_are_not_mixed(run_stage: RunStage, both: dict[str, Path]) -> None:
    path = both["tokens.1"] / "tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(UserError, match=r"tokens 'small' and 'large' were made with different tokenizers: give both"):
        run_stage("pretrain", pretraining({}, {}), LABELS, **both)


@pytest.mark.parametrize("role", ["bos", "eos", "pad"])
def test_tokens_with_other_special_tokens_are_not_mixed(run_stage: RunStage, both: dict[str, Path], role: str) -> None:
    path = both["tokens.1"] / "tokens.json"
    description = json.loads(path.read_bytes())
    path.write_bytes(canonical_json(description | {f"{role}_id": 17}))
    with pytest.raises(UserError, match=rf"'small' and 'large' have different {role} tokens \(\w+ and 17\): make"):
        run_stage("pretrain", pretraining({}, {}), LABELS, **both)


def test_tokens_of_the_same_name_are_told_apart(run_stage: RunStage, both: dict[str, Path]) -> None:
    labels = {"tokens.0": "tokens", "tokens.1": "tokens"}
    _, metrics = run_stage("pretrain", pretraining({}, {}), labels, **both)
    assert [row["source"] for row in metrics["blend"]] == ["tokens-0", "tokens-1"]


def test_every_source_has_a_portion(run_stage: RunStage, both: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="blend has 3 portions, and there are 2 tokens"):
        run_stage("pretrain", pretraining({}, {}, {}), LABELS, **both)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda said: said["splits"]["train"].pop("shards"),
            r"does not describe tokens .*splits\.train\.shards.*again",
        ),
        (lambda said: said["splits"]["train"]["lengths"].pop(), r"contradicts itself: the train shards have 60 docum"),
        (lambda said: said["splits"].pop("train"), "the tokens 'tokens' have no train split"),
        (lambda said: said["splits"]["train"]["shards"][0].update(name="x"), r"/x is no intact token shard"),
        (
            lambda said: said["splits"].update(train={"lengths": [], "shards": []}),
            "train split of tokens has not enough",
        ),
    ],
)
def test_a_description_that_is_none_is_refused(
    run_stage: RunStage, both: dict[str, Path], change: Any, message: str
) -> None:
    path = both["tokens.0"] / "tokens.json"
    description = json.loads(path.read_bytes())
    change(description)
    path.write_bytes(canonical_json(description))
    with pytest.raises(UserError, match=message):
        run_stage("pretrain", pretraining(), tokens=both["tokens.0"])


def test_documents_are_kept_apart_where_it_is_asked_for(run_stage: RunStage, tokenizer: Path, tmp_path: Path) -> None:
    # Each document is one token many times: inside it the next is known, at its end it is not.
    numbers = np.random.default_rng(0).integers(3, 18, 400)
    write_shard(tmp_path / "train-00000.safetensors", np.repeat(numbers, 5).astype(np.uint16), 5 * np.arange(1, 401))
    shard = {"name": "train-00000.safetensors", "tokens": 2000, "documents": 400}
    special_ids = {"pad_id": 0, "bos_id": None, "eos_id": None}
    description = {**special_ids, "splits": {"train": {"lengths": [[5, 400]], "shards": [shard]}}}
    (tmp_path / "tokens.json").write_bytes(canonical_json(description))
    shutil.copytree(tokenizer, tmp_path / "tokenizer")
    changes = {"steps": 150, "batch_size": 8, "optimizer": {"learning_rate": 0.05}}
    apart, mixed = (
        run_stage("pretrain", pretraining(**changes, document_masking=masking), tokens=tmp_path)[1]["loss"]
        for masking in (True, False)
    )
    # A fifth of the targets of the stream is a random one of 15 tokens.
    assert apart < 0.1
    assert mixed > 0.15 * np.log(15)


PLAIN = {"template": "plain", "loss_on": "assistant"}
CHATML = {"template": "chatml", "loss_on": "assistant"}
PAIRS = {"template": "plain", "loss_on": "pairs"}
MARKERS = ["<|im_start|>", "<|im_end|>"]


def talks(run_stage: RunStage, place: Path, tokenizer: Path, config: dict[str, Any]) -> Path:
    """Tokens of conversations, or of preferences."""
    rows = [{"prompt": f"q{n}", "chosen": "yes", "rejected": "no"} for n in range(80)]
    format = "preferences" if config["loss_on"] == "pairs" else "gsm8k"
    if format == "gsm8k":
        rows = [{"question": row["prompt"], "answer": row["chosen"]} for row in rows]
    path = place / f"{format}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "files", "path": str(path)}
    documents, _ = run_stage("documents", {"source": source, "conversations": format, "split": "train"})
    return run_stage("tokens", config, documents=documents, tokenizer=tokenizer)[0]


@pytest.mark.parametrize(("config", "special"), [(PLAIN, []), (CHATML, MARKERS)])
def test_texts_and_conversations_make_a_model_with_a_template(
    run_stage: RunStage, tmp_path: Path, config: dict[str, Any], special: list[str]
) -> None:
    base, _ = run_stage("tokenizer", {"vocabulary": {"kind": "bytes", "special_tokens": special}})
    texts = tokens(run_stage, base, 99)
    conversations = talks(run_stage, tmp_path, base, config)
    run = pretraining({}, {})
    run["model"] = {**run["model"], "vocab_size": 261}
    folder, _ = run_stage("pretrain", run, LABELS, **{"tokens.0": texts, "tokens.1": conversations})
    chat = chat_of(folder / "tokenizer")
    assert chat is not None
    assert chat.template == config["template"]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            None,
            CHATML,
            r"different tokenizers: give both stages the same one, which has <\|im_start\|> and <\|im_end\|>",
        ),
        (PLAIN, PAIRS, "'small' and 'large' cannot be blended: only one of them has preferences"),
        (PLAIN, {**PLAIN, "bos": True}, r"'small' and 'large' have different bos tokens \(None and 1\)"),
    ],
)
def test_conversations_that_do_not_fit_are_not_mixed(
    run_stage: RunStage, tmp_path: Path, first: dict[str, Any] | None, second: dict[str, Any], message: str
) -> None:
    base, _ = run_stage("tokenizer", {"vocabulary": {"kind": "bytes"}})
    one = tokens(run_stage, base, 99) if first is None else talks(run_stage, tmp_path, base, first)
    both = {"tokens.0": one, "tokens.1": talks(run_stage, tmp_path, base, second)}
    with pytest.raises(UserError, match=message):
        run_stage("pretrain", pretraining({}, {}), LABELS, **both)


def test_two_templates_are_not_mixed(run_stage: RunStage, tmp_path: Path) -> None:
    base, _ = run_stage("tokenizer", {"vocabulary": {"kind": "bytes", "special_tokens": MARKERS}})
    both = {f"tokens.{n}": talks(run_stage, tmp_path, base, config) for n, config in enumerate([PLAIN, CHATML])}
    with pytest.raises(UserError, match=r"have different templates \(plain and chatml\): choose one"):
        run_stage("pretrain", pretraining({}, {}), LABELS, **both)
