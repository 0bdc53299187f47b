import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import UserError
from models.chat import Chat, Message, Template, chat_of, write_chat
from models.engine import Bits, inference_engine
from models.generation import generate
from models.sampling import SamplingConfig
from models.tokenizer import Tokenizer, write_tokenizer
from models.weights import Array, whole_pieces
from tasks.checkpoint import ModelFolder, write_model
from tasks.evaluate import marks_summary
from tasks.vocabulary.config import ROLES, Characters
from tasks.vocabulary.written import characters_tokenizer
from tests.tasks.conftest import RunStage
from tests.tasks.test_publish import ARCHITECTURES, WIDE, model_folder, random_weights


def test_every_row_of_the_split_is_scored_by_tokens(run_stage: RunStage, tmp_path: Path) -> None:
    model, config = model_folder(tmp_path / "model", ARCHITECTURES["gpt2"])
    source = {"kind": "arithmetic", "train": 20, "validation": 10, "test": 200}
    documents, _ = run_stage("documents", {"source": source})
    settings = {"max_new_tokens": 5, "batch_size": 64, "shown_samples": 3}
    folder, _ = run_stage("evaluate", settings, model=model, documents=documents)
    samples = pq.read_table(folder / "samples.parquet").to_pylist()
    prompts = [sample["prompt"] for sample in samples]
    assert prompts == pq.read_table(documents / "test-00000.parquet")["prompt"].to_pylist()
    # What the model says is taken as the truth now: then it is right wherever it ended without a special token before.
    truth = tmp_path / "truth"
    truth.mkdir()
    columns = {"prompt": prompts, "target": [sample["prediction"] for sample in samples]}
    pq.write_table(pa.table(columns), truth / "test-00000.parquet")
    _, measured = run_stage("evaluate", settings, model=model, documents=truth)
    engine = inference_engine("torch", config, "float32", whole_pieces(random_weights(config)))
    tokenizer = Tokenizer(model / "tokenizer")
    encoded = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    answers = generate(engine, encoded, SamplingConfig(max_new_tokens=5), [tokenizer.eos_id])
    ended = [answer[-1] == tokenizer.eos_id and min(answer[:-1], default=3) > 2 for answer in answers]
    assert 0 < sum(ended) < 200
    assert measured["n"] == 200
    assert measured["exact_match"] == sum(ended) / 200
    assert len(measured["samples"]) == 3


def test_few_bits_are_asked_for_and_said(run_stage: RunStage, tmp_path: Path) -> None:
    pytest.importorskip("models.mlx_engine")
    model, config = model_folder(tmp_path / "model", WIDE)
    source = {"kind": "arithmetic", "train": 20, "validation": 10, "test": 50}
    documents, _ = run_stage("documents", {"source": source})
    tokenizer = Tokenizer(model / "tokenizer")
    predictions: dict[Bits | None, list[str]] = {}
    every: tuple[Bits | None, ...] = (None, 4, 8)
    for bits in every:
        settings = {"engine": "mlx", "bits": bits, "max_new_tokens": 5, "shown_samples": 50}
        folder, metrics = run_stage("evaluate", settings, model=model, documents=documents)
        written = json.loads((folder / "results.json").read_bytes())
        assert metrics.get("bits") == written.get("bits") == bits
        predictions[bits] = [sample["prediction"] for sample in metrics["samples"]]
        pieces = whole_pieces(random_weights(config))
        engine = inference_engine("mlx", config, "float32", pieces, bits=bits)
        encoded = [[tokenizer.bos_id, *tokenizer.encode(sample["prompt"])] for sample in metrics["samples"]]
        answers = generate(engine, encoded, SamplingConfig(max_new_tokens=5), [tokenizer.eos_id])
        expected = [tokenizer.decode_after(ids, answer) for ids, answer in zip(encoded, answers, strict=True)]
        assert predictions[bits] == expected
    assert predictions[4] != predictions[None]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["1"]}, "no column 'prompt'"),
        (None, "no test split"),
        (
            {"text": ["1"], "messages": ["[]"], "chosen": ["1"], "rejected": ["2"]},
            "the documents are preferences, of which neither answer is one to be met",
        ),
    ],
)
def test_documents_without_problems_are_refused(
    run_stage: RunStage, tmp_path: Path, columns: dict[str, list[str]] | None, message: str
) -> None:
    model, _ = model_folder(tmp_path / "model", ARCHITECTURES["gpt2"])
    folder = tmp_path / "documents"
    folder.mkdir()
    if columns:
        pq.write_table(pa.table(columns), folder / "test-00000.parquet")
    with pytest.raises(UserError, match=message):
        run_stage("evaluate", {}, model=model, documents=folder)


def test_the_splits_that_documents_have_are_told(run_stage: RunStage, tmp_path: Path) -> None:
    model, _ = model_folder(tmp_path / "model", ARCHITECTURES["gpt2"])
    documents = tmp_path / "documents"
    documents.mkdir()
    for split in ("validation", "train"):
        pq.write_table(pa.table({"prompt": ["1"], "target": ["1"]}), documents / f"{split}-00000.parquet")
    with pytest.raises(UserError, match="the documents have no test split to evaluate; they have train and validation"):
        run_stage("evaluate", {}, model=model, documents=documents)


LETTERS = Characters(kind="characters", characters="0123456789+=: \nUuserAaitn")
QUESTIONS = [f"{a}+{b}" for a in range(20) for b in range(10)]
LONG = {"architecture": "llama", "max_position_embeddings": 64}


def letters_tokenizer(folder: Path, template: Template | None) -> Path:
    """A tokenizer of few characters, of which a model that knows nothing soon says the one that closes an answer."""
    folder.mkdir()
    write_tokenizer(folder, characters_tokenizer(LETTERS), ROLES)
    if template is not None:
        write_chat(folder, template, bos=True)
    return folder


def conversations(folder: Path, answers: Sequence[str], questions: Sequence[str] = QUESTIONS) -> Path:
    """Documents with a column of messages; the first question of each is answered before."""
    folder.mkdir()
    rows = [
        [*exchange("1+1", "2"), *exchange(question, answer)]
        for question, answer in zip(questions, answers, strict=True)
    ]
    pq.write_table(pa.table({"messages": [json.dumps(row) for row in rows]}), folder / "test-00000.parquet")
    return folder


def exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def asked(chat: Chat, engine: Any, questions: Sequence[str], max_new_tokens: int) -> list[list[int]]:
    """What a model answers, put together by hand."""
    prompts = [
        chat.prompt_ids([*exchange("1+1", "2"), {"role": "user", "content": question}]) for question in questions
    ]
    return generate(engine, prompts, SamplingConfig(max_new_tokens=max_new_tokens), chat.tokenizer.stop_ids)


def test_the_last_answer_of_a_conversation_is_scored(run_stage: RunStage, tmp_path: Path) -> None:
    tokenizer = letters_tokenizer(tmp_path / "tokenizer", "chatml")
    model, config = model_folder(tmp_path / "model", LONG, tokenizer)
    engine = inference_engine("torch", config, "float32", whole_pieces(random_weights(config)))
    chat = chat_of(tokenizer)
    assert chat is not None
    answers = asked(chat, engine, QUESTIONS, 6)
    # What the model says is taken as the truth: then it is right where it ended, white space around it apart.
    said = [chat.answer(answer) or "none" for answer in answers]
    right = [
        answer == [*chat.tokenizer.encode(text), chat.closing_id] for answer, text in zip(answers, said, strict=True)
    ]
    assert 0 < sum(right) < 200
    documents = conversations(tmp_path / "documents", said)
    # Neither what it is asked with, nor how many at once, changes anything where the tokenizer has a template.
    settings = {"max_new_tokens": 6, "batch_size": 33, "template": "plain"}
    folder, measured = run_stage("evaluate", settings, model=model, documents=documents)
    assert measured["template"] == "chatml"
    assert measured["n"] == 200
    assert measured["exact_match"] == sum(right) / 200
    unfinished = sum(answer[-1] != chat.closing_id for answer in answers)
    assert 0 < unfinished == measured["cut_off"] < 200
    assert f"{unfinished} answers cut off" in measured["summary"]
    assert "marks" not in measured
    assert "too_long" not in measured
    samples = pq.read_table(folder / "samples.parquet").to_pylist()
    assert [sample["prediction"] for sample in samples] == [chat.answer(answer) for answer in answers]
    assert [sample["correct"] for sample in samples] == right
    assert samples[3]["prompt"] == f"1+1\n2\n{QUESTIONS[3]}"


def test_a_base_model_is_asked_with_a_template_that_is_named(run_stage: RunStage, tmp_path: Path) -> None:
    tokenizer = letters_tokenizer(tmp_path / "tokenizer", None)
    model, config = model_folder(tmp_path / "model", LONG, tokenizer)
    documents = conversations(tmp_path / "documents", ["2"] * 200)
    with pytest.raises(UserError, match="tokenizer has no chat template: name the one to ask it with, template: plain"):
        run_stage("evaluate", {}, model=model, documents=documents)
    with pytest.raises(UserError, match=r"the template .chatml. needs the token .<\|im_end\|>."):
        run_stage("evaluate", {"template": "chatml"}, model=model, documents=documents)
    settings = {"template": "plain", "max_new_tokens": 4, "shown_samples": 200}
    _, measured = run_stage("evaluate", settings, model=model, documents=documents)
    chat = Chat(Tokenizer(tokenizer), "plain", bos=True)
    assert chat.prompt_ids([{"role": "user", "content": "1"}])[0] == chat.tokenizer.bos_id
    engine = inference_engine("torch", config, "float32", whole_pieces(random_weights(config)))
    expected = [chat.answer(answer) for answer in asked(chat, engine, QUESTIONS, 4)]
    assert [sample["prediction"] for sample in measured["samples"]] == expected


@pytest.mark.parametrize("as_chat", [True, False])
def test_prompts_beyond_the_positions_are_counted_and_wrong(run_stage: RunStage, tmp_path: Path, as_chat: bool) -> None:
    tokenizer = letters_tokenizer(tmp_path / "tokenizer", "plain")
    model, _ = model_folder(tmp_path / "model", LONG, tokenizer)
    questions = ["1" * 70, "1+2", "1" * 90]
    if as_chat:
        documents = conversations(tmp_path / "documents", ["3"] * 3, questions)
    else:
        documents = tmp_path / "documents"
        documents.mkdir()
        pq.write_table(pa.table({"prompt": questions, "target": ["3"] * 3}), documents / "test-00000.parquet")
    folder, measured = run_stage("evaluate", {"max_new_tokens": 4}, model=model, documents=documents)
    assert measured["too_long"] == 2
    assert measured["n"] == 3
    assert "2 prompts longer than the model's positions" in measured["summary"]
    samples = pq.read_table(folder / "samples.parquet").to_pylist()
    assert [bool(sample["prediction"]) for sample in samples] == [False, True, False]
    assert not samples[0]["correct"]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("[", "its messages are no JSON"),
        (None, "its messages are no JSON"),
        ("{}", "list of messages"),
        (json.dumps(exchange("1", "2")[:1]), "the assistant says nothing"),
    ],
)
def test_what_is_no_conversation_is_named(run_stage: RunStage, tmp_path: Path, cell: str | None, message: str) -> None:
    model, _ = model_folder(tmp_path / "model", LONG, letters_tokenizer(tmp_path / "tokenizer", "plain"))
    documents = tmp_path / "documents"
    documents.mkdir()
    cells = [json.dumps(exchange("1", "2")), cell]
    pq.write_table(pa.table({"messages": pa.array(cells, pa.string())}), documents / "test-00000.parquet")
    with pytest.raises(UserError, match=rf"no conversation in test-00000.parquet, row 1 .*{message}"):
        run_stage("evaluate", {}, model=model, documents=documents)


@pytest.mark.parametrize(("as_chat", "limit"), [(False, 16), (True, 256)])
def test_where_nobody_says_an_answer_may_be_as_long_as_its_kind_is(
    run_stage: RunStage, tmp_path: Path, as_chat: bool, limit: int
) -> None:
    tokenizer = letters_tokenizer(tmp_path / "tokenizer", "plain")
    shape = {"architecture": "llama", "max_position_embeddings": 300}
    model, _ = model_folder(tmp_path / "model", shape, tokenizer)
    if as_chat:
        documents = conversations(tmp_path / "documents", ["3"] * 30, QUESTIONS[:30])
    else:
        documents = tmp_path / "documents"
        documents.mkdir()
        columns = {"prompt": QUESTIONS[:30], "target": ["3"] * 30}
        pq.write_table(pa.table(columns), documents / "test-00000.parquet")
    folder, measured = run_stage("evaluate", {}, model=model, documents=documents)
    explicit, again = run_stage("evaluate", {"max_new_tokens": limit}, model=model, documents=documents)
    assert measured["max_new_tokens"] == limit
    assert (folder / "samples.parquet").read_bytes() == (explicit / "samples.parquet").read_bytes()
    assert measured["cut_off"] == again["cut_off"]


def test_marks_are_counted_over_the_targets_that_have_them() -> None:
    target = "5 + 6 = <<5+6=11>>11"
    predictions = {
        target: (1, 1, 1),
        "5 + 6 = <<5+6=12>>12": (1, 0, 0),
        "5 + 6 = <<5+6=12>>11": (1, 0, 1),
        "5 + 6 = <<5+6=11": (0, 0, 1),
        "<<1+1=2>> is 7": (1, 1, 0),
        "11": (0, 0, 1),
        "": (0, 0, 0),
    }
    for prediction, expected in predictions.items():
        summary = marks_summary([target, "no marks"], [prediction, "<<1+1=3>>"])
        assert tuple(summary["marks"].values()) == (1, *expected), prediction
    both = marks_summary([target] * 2, [target, ""])["marks"]
    assert both == {"n": 2, "well_formed": 0.5, "right": 0.5, "final_number": 0.5}
    assert marks_summary(["11", "12"], ["<<5+6=11>>11", ""]) == {}


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("<<5*200=1000>>\n#### 1000", 1),
        ("<<5*200=1000>>\n#### 1,000 apples", 1),
        ("<<5*200=1000>>1000", 0),
        ("####", 0),
    ],
)
def test_the_final_number_stands_where_that_of_the_target_does(prediction: str, right: int) -> None:
    target = "It is <<5*200=1000>>1000.\n#### 1,000"
    assert marks_summary([target], [prediction])["marks"]["final_number"] == right


def test_problems_are_told_apart_by_what_they_ask(run_stage: RunStage, tmp_path: Path) -> None:
    tokenizer, _ = run_stage("tokenizer", {"vocabulary": {"kind": "bytes"}})
    write_chat(tokenizer, "plain", bos=True)
    model, _ = model_folder(tmp_path / "model", {**LONG, "max_position_embeddings": 512}, tokenizer)
    source = {"kind": "word_problems", "train": 1, "validation": 1, "test": 60, "operators": ["+", "*"]}
    documents, _ = run_stage("documents", {"source": source})
    table = pq.read_table(documents / "test-00000.parquet")
    folder, measured = run_stage("evaluate", {"max_new_tokens": 2}, model=model, documents=documents)
    assert list(measured["groups"]) == ["operator", "digits", "phrasing"]
    for groups in measured["groups"].values():
        assert sum(group["n"] for group in groups) == 60
        assert all(group["interval"][0] == group["exact_match"] == 0 < group["interval"][1] for group in groups)
    assert {group["group"] for group in measured["groups"]["phrasing"]} == set(table["phrasing"].to_pylist())
    signs = ["+" if " + " in target else "*" for target in table["target"].to_pylist()]
    operators = {group["group"]: group["n"] for group in measured["groups"]["operator"]}
    assert operators == {sign: signs.count(sign) for sign in "+*"}
    assert measured["data"] == {"word_problems": None}
    assert {score["task"] for score in measured["scores"]} == {"word_problems"}
    assert len(measured["scores"]) == 1 + sum(map(len, measured["groups"].values()))
    samples = pq.read_table(folder / "samples.parquet")
    assert samples.column_names == ["id", "prompt", "target", "prediction", "correct", "exact_match"]
    assert len(set(samples["id"].to_pylist())) == 60
    assert samples["exact_match"].to_pylist() == [0] * 60
    first = samples.to_pylist()[0]
    text = json.dumps([first["prompt"], first["target"]], separators=(",", ":"), ensure_ascii=False)
    assert first["id"] == hashlib.sha256(text.encode()).hexdigest()[:16]
    _, other = run_stage("evaluate", {"max_new_tokens": 2, "by": ["phrasing"]}, model=model, documents=documents)
    assert other["groups"] == {"phrasing": measured["groups"]["phrasing"]}
    with pytest.raises(UserError, match="by: the documents have no column 'phrase'; did you mean 'phrasing'"):
        run_stage("evaluate", {"by": ["phrase"]}, model=model, documents=documents)


def test_right_answers_are_ones_in_the_samples(run_stage: RunStage, tmp_path: Path) -> None:
    model, _ = model_folder(tmp_path / "model", ARCHITECTURES["gpt2"])
    source = {"kind": "arithmetic", "train": 20, "validation": 10, "test": 200}
    documents, _ = run_stage("documents", {"source": source})
    folder, _ = run_stage("evaluate", {"max_new_tokens": 5}, model=model, documents=documents)
    said = pq.read_table(folder / "samples.parquet")
    truth = tmp_path / "truth"
    truth.mkdir()
    columns = {"prompt": said["prompt"], "target": said["prediction"], "level": [1, 2] * 100}
    pq.write_table(pa.table(columns), truth / "test-00000.parquet")
    keys = {"max_new_tokens": 5, "by": ["level", "operator"]}
    folder, measured = run_stage("evaluate", keys, model=model, documents=truth)
    samples = pq.read_table(folder / "samples.parquet")
    assert samples["exact_match"].to_pylist() == [int(right) for right in samples["correct"].to_pylist()]
    assert 0 < sum(samples["exact_match"].to_pylist()) == measured["exact_match"] * 200
    halves = {group["group"]: group["exact_match"] for group in measured["groups"]["level"]}
    assert sum(halves.values()) / 2 == pytest.approx(measured["exact_match"])
    assert halves["1"] == sum(samples["exact_match"].to_pylist()[::2]) / 100
    # Nothing says what such documents were made of.
    assert measured["data"] == {}
    assert {score["task"] for score in measured["scores"]} == {"exact_match"}


def test_a_model_that_says_nothing_finite_is_not_scored(run_stage: RunStage, tmp_path: Path) -> None:
    model, config = model_folder(tmp_path / "model", ARCHITECTURES["llama"])
    arrays: dict[str, Array] = dict(random_weights(config))
    arrays["model.norm.weight"] = np.full_like(arrays["model.norm.weight"], np.nan)
    write_model(model, ModelFolder(config, arrays, None, None, ()))
    documents, _ = run_stage("documents", {"source": {"kind": "arithmetic", "train": 1, "validation": 1, "test": 3}})
    with pytest.raises(UserError, match="the model 'broken' says of the next token is not finite: look at the losses"):
        run_stage("evaluate", {}, {"model": "broken"}, model=model, documents=documents)


def test_a_model_without_a_tokenizer_is_refused(run_stage: RunStage, tmp_path: Path) -> None:
    model, _ = model_folder(tmp_path / "model", ARCHITECTURES["gpt2"])
    shutil.rmtree(model / "tokenizer")
    documents, _ = run_stage("documents", {"source": {"kind": "arithmetic", "train": 1, "validation": 1, "test": 3}})
    with pytest.raises(UserError, match=r"^the model in .* has no tokenizer, and so reads no text; make it again$"):
        run_stage("evaluate", {}, model=model, documents=documents)
