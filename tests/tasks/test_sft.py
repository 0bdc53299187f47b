"""Tuning on conversations: what is learned, rows of new tokens, and models and tokens that do not fit each other."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from common.errors import UserError
from common.files import canonical_json
from models.chat import END, START, chat_of
from models.config import ModelConfig
from models.engine import inference_engine
from models.generation import generate
from models.sampling import SamplingConfig
from models.tokenizer import TOKENIZER_CONFIG, Tokenizer
from models.training.batches import Batches
from models.training.events import Note
from models.weights import Array, whole_pieces
from tasks import sft
from tasks.checkpoint import read_model
from tasks.history import Trained
from tests.models.training.folders import folder_source
from tests.tasks import killed_sft
from tests.tasks.conftest import RunStage, context_in
from tests.tasks.conversations import (
    CHARACTERS,
    TOKENIZER,
    VOCABULARY,
    conversations,
    model,
    training,
    write_tokens,
)


@pytest.fixture
def tokenizer(run_stage: RunStage) -> Path:
    return run_stage("tokenizer", TOKENIZER)[0]


@pytest.fixture
def tokens(tokenizer: Path, tmp_path: Path) -> Path:
    return write_tokens(tmp_path / "conversations", tokenizer)


def base(run_stage: RunStage, tokens: Path, **changes: Any) -> Path:
    """A model that has seen a little of everything."""
    config = {"model": model(**changes), "training": training(steps=2, packing="stream")}
    return run_stage("pretrain", config, tokens=tokens)[0]


def tune(run_stage: RunStage, folder: Path, tokens: Path, **changes: Any) -> tuple[Path, dict[str, Any]]:
    keys = {key: changes.pop(key) for key in ("vocab_size", "optimizer_state", "lora") if key in changes}
    return run_stage("sft", {"training": training(**changes), **keys}, model=folder, tokens=tokens)


def numbers(array: Array) -> NDArray[np.float64]:
    return array.astype(np.float64)


def describe(tokens: Path, **described: Any) -> None:
    """Has tokens describe themselves otherwise."""
    path = tokens / "tokens.json"
    path.write_bytes(canonical_json({**json.loads(path.read_bytes()), **described}))


def losses(folder: Path, tokens: Path) -> tuple[float, float]:
    """The mean loss on what the assistant says and on what it does not."""
    found = read_model(folder)
    source = folder_source(tokens, files=[tokens / "validation-00000.safetensors"])
    with Batches([source], seed=0, sequence_length=95, packing="documents", batch_size=1, pad_id=0) as batches:
        batch = batches.rows(0, batches.sources[0].rows)
    engine = inference_engine("torch", found.config, "float32", whole_pieces(found.weights))
    loss_BT = -engine.log_probabilities(batch)
    others_BT = (batch.targets_BT != 0) & ~batch.loss_mask_BT
    return float(loss_BT[batch.loss_mask_BT].mean()), float(loss_BT[others_BT].mean())


def test_what_the_assistant_says_is_learned_and_nothing_else(
    run_stage: RunStage, tokens: Path, tokenizer: Path
) -> None:
    before = base(run_stage, tokens)
    after, metrics = tune(run_stage, before, tokens, steps=80, validation={"every": 40, "rows": 4, "samples": 2})
    (said, others), (said_after, others_after) = losses(before, tokens), losses(after, tokens)
    assert said_after < 0.2 * said
    assert others_after > 0.9 * others
    first, *_, last = metrics["validation"]
    assert (first["step"], last["step"]) == (0, 80)
    assert last["loss"] < 0.2 * first["loss"]
    assert metrics["vocabulary"] == {"rows_before": VOCABULARY, "rows": VOCABULARY, "added": 0}
    (blend,) = metrics["blend"]
    assert blend["epochs"] > 1
    assert blend["padding"] < 0.1
    entries = [entry for entry in read_model(after).history if isinstance(entry, Trained)]
    assert [entry.steps for entry in entries] == [2, 80]
    assert [loss.step for loss in entries[1].validation] == [0, 40, 80]
    chat = chat_of(after / "tokenizer")
    assert chat is not None
    assert chat.template == "plain"
    # The same run gives the same bytes.
    again, _ = tune(run_stage, before, tokens, steps=80, validation={"every": 40, "rows": 4, "samples": 2})
    assert (again / "model.safetensors").read_bytes() == (after / "model.safetensors").read_bytes()


def test_new_tokens_get_the_mean_of_the_rows(
    run_stage: RunStage, tokens: Path, tokenizer: Path, tmp_path: Path
) -> None:
    before = base(run_stage, tokens, tie_word_embeddings=False)
    chatml = write_tokens(tmp_path / "chatml", tokenizer, "chatml")
    needed = len(Tokenizer(chatml / "tokenizer"))
    assert needed == VOCABULARY + 2
    with pytest.raises(
        UserError,
        match=rf"has {needed} tokens, with the template's 2, and the model would have {VOCABULARY} rows: set "
        rf"vocab_size to {needed} or more$",
    ):
        tune(run_stage, before, chatml)
    after, metrics = tune(run_stage, before, chatml, vocab_size=48, optimizer={"learning_rate": 1e-9})
    assert metrics["vocabulary"] == {"rows_before": VOCABULARY, "rows": 48, "added": 2}
    old, new = read_model(before), read_model(after)
    assert new.config == old.config.model_copy(update={"vocab_size": 48})
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = numbers(old.weights[name])
        expected = np.concatenate([rows, np.broadcast_to(rows.mean(0), (48 - VOCABULARY, 16))])
        np.testing.assert_allclose(numbers(new.weights[name]), expected, atol=1e-6)
    chat = chat_of(after / "tokenizer")
    assert chat is not None
    assert chat.closing_id == needed - 1
    assert sft.model_of(
        sft.Config.model_validate({"training": training(), "vocab_size": 48}), {"model": old.config}
    ) == (new.config)


def test_a_new_closing_token_is_written(run_stage: RunStage, tokens: Path, tokenizer: Path, tmp_path: Path) -> None:
    chatml = write_tokens(tmp_path / "chatml", tokenizer, "chatml")
    after, _ = tune(run_stage, base(run_stage, tokens), chatml, steps=80, vocab_size=VOCABULARY + 2)
    chat = chat_of(after / "tokenizer")
    assert chat is not None
    found = read_model(after)
    engine = inference_engine("torch", found.config, "float32", whole_pieces(found.weights))
    prompts = [chat.prompt_ids(messages[:1]) for messages in conversations(20, 2)]
    answers = generate(engine, prompts, SamplingConfig(max_new_tokens=16), [chat.closing_id])
    assert all(answer[-1] == chat.closing_id for answer in answers)
    assert all(chat.answer(answer).startswith("yes ") for answer in answers)


def test_moments_go_along_where_it_is_asked_for(
    run_stage: RunStage, tokens: Path, tokenizer: Path, tmp_path: Path
) -> None:
    before = base(run_stage, tokens)
    chatml = write_tokens(tmp_path / "chatml", tokenizer, "chatml")
    still = {"optimizer": {"learning_rate": 1e-9}, "steps": 1, "vocab_size": VOCABULARY + 2}
    moments = {}
    for state in ("copy", "reset"):
        after, _ = tune(run_stage, before, chatml, optimizer_state=state, **still)
        found = read_model(after, with_optimizer=True).optimizer
        assert found is not None
        moments[state] = found
    old = read_model(before, with_optimizer=True).optimizer
    assert old is not None
    assert moments["copy"]["updates"] == old["updates"] + 1 == moments["reset"]["updates"] + 2
    # With the gradient of one and the same step, they differ by what was there before.
    name = "exp_avg:model.embed_tokens.weight"
    difference = numbers(moments["copy"][name]) - numbers(moments["reset"][name])
    np.testing.assert_allclose(difference[:VOCABULARY], 0.9 * numbers(old[name]), atol=1e-7)
    assert not difference[VOCABULARY:].any()


def test_adapters_leave_the_weights(run_stage: RunStage, tokens: Path) -> None:
    before = base(run_stage, tokens)
    keys = {"vocab_size": VOCABULARY + 2, "lora": {"rank": 4}, "steps": 30, "validation": {"every": 30}}
    after, metrics = tune(run_stage, before, tokens, **keys)
    old, new = read_model(before), read_model(after, merge=False)
    assert new.adapters is not None
    for name, array in old.weights.items():
        assert (new.weights[name][: len(array)] == array).all(), name
    assert [one["step"] for one in metrics["validation"]] == [0, 30]
    assert metrics["validation"][-1]["loss"] < metrics["validation"][0]["loss"]
    # Tuned once more, they are in the weights.
    again, _ = tune(run_stage, after, tokens, optimizer={"learning_rate": 1e-9}, steps=1)
    for name, array in read_model(after).weights.items():
        np.testing.assert_allclose(numbers(read_model(again).weights[name]), numbers(array), atol=1e-6, err_msg=name)


def test_adapters_cannot_learn_a_new_closing_token(run_stage: RunStage, tokenizer: Path, tmp_path: Path) -> None:
    chatml = write_tokens(tmp_path / "chatml", tokenizer, "chatml")
    plain = base(run_stage, write_tokens(tmp_path / "plain", tokenizer))
    with pytest.raises(UserError, match=r"^lora: the token that closes an answer is new, .*: leave lora out, take"):
        tune(run_stage, plain, chatml, vocab_size=VOCABULARY + 2, lora={"rank": 4})
    # A base whose tokenizer has had the tokens from the beginning has rows of its own for them.
    known = base(run_stage, chatml, vocab_size=VOCABULARY + 2)
    after, metrics = tune(run_stage, known, chatml, lora={"rank": 4})
    assert metrics["vocabulary"]["added"] == 0
    assert read_model(after, merge=False).adapters is not None


def test_lora_has_no_moments_to_copy() -> None:
    config = {"training": training(), "lora": {}}
    assert sft.Config.model_validate(config).optimizer_state == "reset"
    with pytest.raises(ValueError, match="which no moments come with: leave optimizer_state at reset"):
        sft.Config.model_validate({**config, "optimizer_state": "copy"})


@pytest.mark.parametrize("packing", [{}, {"packing": "stream", "document_masking": True}])
def test_a_stream_would_cut_conversations(packing: dict[str, Any]) -> None:
    run = {name: value for name, value in training().items() if name != "packing"} | packing
    with pytest.raises(ValueError, match=r"set training\.packing to whole, or to documents for one to a row"):
        sft.Config.model_validate({"training": run})


def test_conversations_that_lose_their_ends_are_counted(run_stage: RunStage, tokens: Path, tmp_path: Path) -> None:
    before = base(run_stage, tokens)
    splits = json.loads((tokens / "tokens.json").read_bytes())["splits"]
    lengths = [length for name in splits for length, count in splits[name]["lengths"] for _ in range(count)]
    for room in (40, max(lengths)):
        config = sft.Config.model_validate({"training": training(steps=1, sequence_length=room - 1)})
        inputs, events = {"model": before, "tokens": tokens}, list[object]()
        context = replace(context_in(tmp_path / str(room), "sft", inputs), report=events.append)
        sft.run(config, inputs, context)
        longer = sum(length > room for length in lengths)
        said = (
            f"{longer} conversations of 'tokens' are longer than sequence_length {room - 1} + 1, and lose their "
            f"ends in the middle of a message: set max_tokens: {room} in the stage that makes them"
        )
        assert [one for one in events if isinstance(one, Note) and "longer" in one.text] == [Note(said)] * bool(longer)
    assert longer == 0


def test_rows_are_only_added(run_stage: RunStage) -> None:
    config = sft.Config.model_validate({"training": training(), "vocab_size": 40})
    with pytest.raises(UserError, match=r"vocab_size 40 is less than the model's 41; rows are only added"):
        sft.model_of(config, {"model": ModelConfig.model_validate(model(vocab_size=41))})
    config = sft.Config.model_validate({"training": training()})
    with pytest.raises(UserError, match="sequence_length 95 exceeds the model's max_position_embeddings 32"):
        sft.model_of(config, {"model": ModelConfig.model_validate(model(max_position_embeddings=32))})


def test_a_base_from_another_tokenizer_is_refused(run_stage: RunStage, tokens: Path, tmp_path: Path) -> None:
    before = base(run_stage, tokens)
    more = {"vocabulary": {"kind": "characters", "characters": CHARACTERS + "G"}}
    other = write_tokens(tmp_path / "other", run_stage("tokenizer", more)[0])
    message = r"^the tokens 'tokens' were made with another tokenizer than the model was trained with \(.*\): make them"
    for stage in ("sft", "refine"):
        with pytest.raises(UserError, match=message):
            run_stage(stage, {"training": training()}, model=before, tokens=other)


@pytest.mark.parametrize("begins", [True, False])
def test_what_stands_before_a_text_stays(run_stage: RunStage, tokenizer: Path, tmp_path: Path, begins: bool) -> None:
    tokens = write_tokens(tmp_path / "base", tokenizer, bos=begins)
    other = write_tokens(tmp_path / "other", tokenizer, bos=not begins)
    before = base(run_stage, tokens)
    role = f"'tokens' stands <.*>, where the model was trained with <.*>: set bos: {str(begins).lower()} in the stage"
    for stage in ("sft", "refine"):
        with pytest.raises(UserError, match=role):
            run_stage(stage, {"training": training()}, model=before, tokens=other)


def test_other_ends_of_texts_are_refused(run_stage: RunStage, tokens: Path, tmp_path: Path) -> None:
    before = base(run_stage, tokens)
    settings = tokens / "tokenizer" / TOKENIZER_CONFIG
    settings.write_text(json.dumps({**json.loads(settings.read_bytes()), "pad_token": "<eos>"}))
    message = r"have <eos> and <eos> as eos and pad tokens, where the model was trained with <eos> and <pad>: make them"
    with pytest.raises(UserError, match=message):
        tune(run_stage, before, tokens)


def test_a_refined_chat_model_stays_one(run_stage: RunStage, tokens: Path, tokenizer: Path, tmp_path: Path) -> None:
    texts = Path(shutil.copytree(tokens, tmp_path / "texts"))
    describe(texts, template=None, loss_on="text")
    shutil.rmtree(texts / "tokenizer")
    shutil.copytree(tokenizer, texts / "tokenizer")
    chat_model, _ = tune(run_stage, base(run_stage, texts), tokens)
    refined, _ = run_stage("refine", {"training": training()}, model=chat_model, tokens=texts)
    found = chat_of(refined / "tokenizer")
    assert found is not None
    assert found.template == "plain"
    # A model that has no template gets none.
    again, _ = run_stage("refine", {"training": training()}, model=base(run_stage, texts), tokens=texts)
    assert chat_of(again / "tokenizer") is None


def test_refinement_adds_no_tokens(run_stage: RunStage, tokens: Path, tokenizer: Path, tmp_path: Path) -> None:
    chatml = write_tokens(tmp_path / "chatml", tokenizer, "chatml")
    with pytest.raises(UserError, match="has 2 tokens that the model was trained without: train it with sft"):
        run_stage("refine", {"training": training()}, model=base(run_stage, tokens, vocab_size=50), tokens=chatml)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"template": None, "loss_on": "text"}, r"'tokens' are texts: sft learns from conversations; set template"),
        ({"loss_on": "pairs"}, "'tokens' are pairs of answers, of which the stage dpo alone learns"),
    ],
)
def test_other_tokens_than_conversations_are_refused(
    run_stage: RunStage, tokens: Path, described: dict[str, Any], message: str
) -> None:
    before = base(run_stage, tokens)
    describe(tokens, **described)
    with pytest.raises(UserError, match=message):
        tune(run_stage, before, tokens)


def test_texts_may_stand_beside_conversations(
    run_stage: RunStage, tokens: Path, tokenizer: Path, tmp_path: Path
) -> None:
    texts = Path(shutil.copytree(tokens, tmp_path / "texts"))
    describe(texts, template=None, loss_on="target")
    shutil.rmtree(texts / "tokenizer")
    shutil.copytree(tokenizer, texts / "tokenizer")
    labels = {"tokens.0": "texts", "tokens.1": "answers"}
    inputs = {"model": base(run_stage, tokens), "tokens.0": texts, "tokens.1": tokens}
    folder, metrics = run_stage("sft", {"training": training()}, labels, **inputs)
    assert [row["source"] for row in metrics["blend"]] == ["texts", "answers"]
    # The model speaks in the template of those that have one.
    assert chat_of(folder / "tokenizer") is not None


def test_texts_beside_chatml_keep_their_own_end(run_stage: RunStage, tmp_path: Path) -> None:
    special = {"special_tokens": [START, END]}
    vocabulary = {"kind": "characters", "characters": f"{CHARACTERS}0123456789+=", **special}
    tokenizer, _ = run_stage("tokenizer", {"vocabulary": vocabulary})
    sums = {"kind": "arithmetic", "maximum": 9, "train": 60, "validation": 8, "test": 8}
    documents, _ = run_stage("documents", {"source": sums})
    texts, _ = run_stage("tokens", {"bos": True, "loss_on": "target"}, documents=documents, tokenizer=tokenizer)
    chats = write_tokens(tmp_path / "chats", tokenizer, "chatml")
    labels = {"tokens.0": "chats", "tokens.1": "sums"}
    inputs = {"model": base(run_stage, texts, vocab_size=60), "tokens.0": chats, "tokens.1": texts}
    tuned, _ = run_stage("sft", {"training": training(steps=60)}, labels, **inputs)
    found = Tokenizer(tuned / "tokenizer")
    assert [found.backend.id_to_token(token) for token in found.stop_ids] == [END, "<eos>"]
    # What the model says is taken as the truth: it is right where it ended as texts do.
    evaluation, _ = run_stage("evaluate", {}, model=tuned, documents=documents)
    said = pq.read_table(evaluation / "samples.parquet")
    truth = tmp_path / "truth"
    truth.mkdir()
    pq.write_table(pa.table({"prompt": said["prompt"], "target": said["prediction"]}), truth / "test-00000.parquet")
    _, measured = run_stage("evaluate", {}, model=tuned, documents=truth)
    assert measured["exact_match"] == 1


def test_templates_are_not_mixed(run_stage: RunStage, tokens: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tokens, tmp_path / "other"))
    describe(other, template="chatml")
    labels = {"tokens.0": "alpaca", "tokens.1": "dolly"}
    inputs = {"model": base(run_stage, tokens), "tokens.0": tokens, "tokens.1": other}
    with pytest.raises(
        UserError, match=r"'alpaca' and 'dolly' have different templates \(plain and chatml\): choose one"
    ):
        run_stage("sft", {"training": training()}, labels, **inputs)


def test_a_killed_run_ends_with_the_same_bytes(run_stage: RunStage, tokens: Path, tmp_path: Path) -> None:
    before = base(run_stage, tokens, dropout=0.1)
    whole = killed_sft.run(tmp_path / "whole", before, tokens)
    command = [sys.executable, "-m", "tests.tasks.killed_sft", str(tmp_path / "killed"), str(before), str(tokens)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env={**os.environ}, check=False)
    assert done.returncode == -9
    assert list((tmp_path / "killed").rglob("state.json"))
    found = killed_sft.run(tmp_path / "killed", before, tokens)
    assert found.went_on
    for name in ("model.safetensors", "optimizer.safetensors", "history.json"):
        assert (found.output / name).read_bytes() == (whole.output / name).read_bytes(), name
