import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from common.errors import StageInterrupted, UserError
from models.chat import Chat, Message, Template, chat_of, write_chat
from models.engine import inference_engine
from models.generation import generate
from models.sampling import SamplingConfig
from models.tokenizer import Tokenizer, write_tokenizer
from models.weights import Array, whole_pieces
from tasks import behaviour
from tasks.asking import questions
from tasks.behaviour import Asking, first_answer
from tasks.checkpoint import ModelFolder, write_model
from tasks.registry import stage_named
from tasks.scores import Score
from tasks.vocabulary.config import ROLES, Bytes
from tasks.vocabulary.written import bytes_tokenizer
from tests.tasks.asking.suite import write_suite
from tests.tasks.conftest import RunStage, context_in
from tests.tasks.conversations import write_tokens
from tests.tasks.test_publish import model_folder, random_weights

LONG = {"architecture": "llama", "max_position_embeddings": 128}
ASKED = [f"What is {number} and {number}?" for number in range(12)]


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_suite(tmp_path / "prompts")
    monkeypatch.setattr(questions, "PROMPTS", folder)
    return folder


def bytes_folder(folder: Path, template: Template | None = None) -> Path:
    """A tokenizer of bytes, which can represent any question."""
    folder.mkdir()
    write_tokenizer(folder, bytes_tokenizer(Bytes(kind="bytes")), ROLES)
    if template is not None:
        write_chat(folder, template, bos=True)
    return folder


def write_category(
    folder: Path, name: str, kind: str, answers: Sequence[dict[str, Any]], asked: Sequence[str], chance: float = 0.0
) -> None:
    entries = [{"ask": ask, "answer": answer} for ask, answer in zip(asked, answers, strict=True)]
    content = {"category": name, "kind": kind, "chance": chance, "questions": entries}
    text = yaml.safe_dump(content, allow_unicode=True)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def said_by_hand(model: Path, config: Any, asked: Sequence[str], chat: Chat | None, limit: int) -> list[str]:
    """What a model answers, question by question."""
    engine = inference_engine("torch", config, "float32", whole_pieces(random_weights(config)))
    tokenizer = Tokenizer(model / "tokenizer")
    stops = {*tokenizer.stop_ids, *([] if chat is None else [chat.closing_id])}
    found = []
    for ask in asked:
        if chat is None:
            prompt = [tokenizer.bos_id, *tokenizer.encode(f"Question: {ask}\nAnswer:")]
        else:
            prompt = chat.prompt_ids([{"role": "user", "content": ask}])
        (answer,) = generate(engine, [prompt], SamplingConfig(max_new_tokens=limit), stops)
        text = tokenizer.decode_after(prompt, answer) if chat is None else chat.answer(answer)
        found.append(re.split(r"\n\s*\n|\nQuestion:", text.strip())[0].strip() if chat is None else text)
    return found


@pytest.mark.parametrize(("own", "named"), [(None, None), ("plain", None), ("plain", "chatml"), (None, "plain")])
def test_answers_are_scored_by_category(
    run_stage: RunStage, tmp_path: Path, prompts: Path, own: Template | None, named: Template | None
) -> None:
    tokenizer = bytes_folder(tmp_path / "tokenizer", own)
    model, config = model_folder(tmp_path / "model", LONG, tokenizer)
    chat = chat_of(tokenizer) or (Chat(Tokenizer(tokenizer), named, bos=True) if named else None)
    said = said_by_hand(model, config, ASKED, chat, 8)
    # What the model says is the right answer to every other question of one category, and to none of the other.
    true = [{"regex": f"^{re.escape(text)}$" if number % 2 else r"\bParis\b"} for number, text in enumerate(said)]
    assert all(said)
    write_category(prompts, "echo", "reasoning", true, ASKED, chance=0.25)
    write_category(prompts, "python", "code", [{"python": DOUBLE}], ["Write double(x)."])
    settings = {"categories": ["python", "echo"], "template": named, "max_new_tokens": 8, "batch_size": 5}
    folder, measured = run_stage("behaviour", {**settings, "shown_samples": 4}, model=model)
    results = json.loads((folder / "results.json").read_bytes())
    assert results == {key: value for key, value in measured.items() if key not in ("summary", "device")}
    assert results["measure"] == "behaviour"
    template = {None: "<bos>Question: {ask}\nAnswer:", "plain": "<bos>User: {ask}\nAssistant:"}[own or named]
    assert results["template"] == template
    assert [(group["category"], group["kind"], group["n"], group["correct"]) for group in results["categories"]] == [
        ("echo", "reasoning", 12, 6),
        ("python", "code", 1, 0),
    ]
    assert results["categories"][0]["interval"] == pytest.approx([0.2538, 0.7462], abs=1e-4)
    scores = [Score.model_validate({k: v for k, v in one.items() if k != "near_chance"}) for one in results["scores"]]
    assert [(one.task, one.metric, one.group, one.n) for one in scores] == [
        ("behaviour", "correct", None, 13),
        ("behaviour", "correct", "echo", 12),
        ("behaviour", "correct", "python", 1),
    ]
    assert [one.chance for one in scores] == [pytest.approx(3 / 13), 0.25, 0.0]
    assert [one["near_chance"] for one in results["scores"]] == [True, True, True]
    assert scores[0].value == pytest.approx(6 / 13)
    assert scores[1].standard_error == pytest.approx(0.1508, abs=1e-4)
    assert measured["summary"].startswith("6 of 13 questions right, 46.2% (23.2% to 70.9%)")
    samples = pq.read_table(folder / "samples.parquet").to_pylist()
    assert [sample["prediction"] for sample in samples[:12]] == said
    assert [sample["correct"] for sample in samples] == [number % 2 == 1 for number in range(12)] + [False]
    assert [sample["category"] for sample in samples] == ["echo"] * 12 + ["python"]
    assert [sample["scorer"] for sample in samples] == ["regex"] * 12 + ["python"]
    assert samples[0]["prompt"] == ASKED[0]
    assert samples[0]["target"] == r"/\bParis\b/"
    assert len({sample["id"] for sample in samples}) == 13
    assert [sample["prompt"] for sample in results["samples"]] == [ASKED[0], ASKED[3], ASKED[6], ASKED[9]]


DOUBLE = {"function": "double", "cases": [{"arguments": [3], "returns": 6}]}


def test_the_batch_changes_nothing(run_stage: RunStage, tmp_path: Path, prompts: Path) -> None:
    model, _ = model_folder(tmp_path / "model", LONG, bytes_folder(tmp_path / "tokenizer"))
    folders = [
        run_stage("behaviour", {"batch_size": size, "max_new_tokens": 8}, model=model)[0] for size in (1, 4, 100)
    ]
    for name in ("results.json", "samples.parquet"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1
    results = json.loads((folders[0] / "results.json").read_bytes())
    assert [group["category"] for group in results["categories"]] == ["code-function", "geography", "poetry"]
    assert results["n"] == 6


def test_a_text_is_generated_up_to_what_ends_it(
    run_stage: RunStage, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = model_folder(tmp_path / "model", LONG, bytes_folder(tmp_path / "tokenizer"))
    settings = {"max_new_tokens": 8, "categories": ["geography"]}
    assert run_stage("behaviour", settings, model=model)[1]["cut_off"] == 3
    monkeypatch.setattr(behaviour, "_ENDS", re.compile(r"\S"))
    lengths: list[int] = []

    def generated(*arguments: Any) -> list[list[int]]:
        answers = generate(*arguments)
        lengths.extend(map(len, answers))
        return answers

    monkeypatch.setattr(behaviour, "generate", generated)
    assert run_stage("behaviour", {**settings, "shown_samples": 1}, model=model)[1]["cut_off"] == 0
    assert max(lengths) < 8


@pytest.mark.parametrize(
    ("text", "ended"),
    [
        ("Paris", False),
        ("\n\n Paris\n", False),
        ("Paris\n\n", False),  # what comes next may be white space too
        ("Paris\n\nIt", True),
        ("Paris\nQuestion: Who", True),
        ("", False),
    ],
)
def test_a_text_ends_where_something_else_begins(tmp_path: Path, text: str, ended: bool) -> None:
    tokenizer = Tokenizer(bytes_folder(tmp_path / "tokenizer"))
    answer = tokenizer.encode(text)
    for chat, expected in ((None, ended), (Chat(tokenizer, "plain", bos=True), False)):
        asking = Asking(tokenizer, chat)
        assert asking.ended(answer) is expected
        assert asking.ended([*answer, min(asking.stops)])


def test_what_is_longer_than_the_positions_is_wrong(run_stage: RunStage, tmp_path: Path, prompts: Path) -> None:
    model, _ = model_folder(tmp_path / "model", LONG, bytes_folder(tmp_path / "tokenizer"))
    anything = [{"regex": "."}] * 3
    write_category(prompts, "long", "language", anything, ["x" * 108, "x" * 109, "x" * 110])
    folder, measured = run_stage("behaviour", {"categories": ["long"]}, model=model)
    # With <bos> and what is around it, the second takes all 128 positions, after which one token more is said.
    samples = pq.read_table(folder / "samples.parquet").to_pylist()
    assert measured["too_long"] == 1
    assert "1 questions longer than the model's positions" in measured["summary"]
    assert (samples[2]["prediction"], samples[2]["correct"]) == ("", False)
    assert samples[0]["correct"]


def test_a_recipe_holds_the_digest_of_its_questions(run_stage: RunStage, tmp_path: Path, prompts: Path) -> None:
    stage = stage_named("behaviour")
    config = stage.config.model_validate({"categories": ["poetry"]})
    assert stage.resolved is not None
    found = stage.resolved(config)
    assert found.suite == questions.suite_digest(["poetry"])
    assert stage.resolved(found) == found
    write_suite(prompts, geography=(prompts / "geography.yaml").read_text() + "\n# another")
    assert stage.resolved(config) == found
    text = (prompts / "poetry.yaml").read_text()
    write_suite(prompts, poetry=text.replace("17 + 25", "20 + 22"))
    assert stage.resolved(config).suite != found.suite
    model, _ = model_folder(tmp_path / "model", LONG, bytes_folder(tmp_path / "tokenizer"))
    with pytest.raises(UserError, match=r"the questions here have the digest \w{12}…, and suite asks for \w{12}…"):
        run_stage("behaviour", found.model_dump(mode="json"), model=model)
    with pytest.raises(UserError, match=r"there is no category 'poesy'"):
        stage.resolved(stage.config.model_validate({"categories": ["poesy"]}))


def test_it_says_how_far_it_is_and_stops_when_told(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    monkeypatch.setattr(behaviour, "REPORT_SECONDS", 0.0)
    model, _ = model_folder(tmp_path / "model", LONG, bytes_folder(tmp_path / "tokenizer"))
    config = behaviour.Config(batch_size=2, max_new_tokens=2)

    def told(place: str, should_stop: Callable[[], bool]) -> list[str]:
        events: list[Any] = []
        context = context_in(tmp_path / place, "behaviour")
        context = dataclasses.replace(context, report=events.append, should_stop=should_stop)
        behaviour.run(config, {"model": model}, context)
        return [event.text for event in events]

    lines = told("whole", lambda: False)
    assert lines[:3] == [f"{done} of 6 questions answered" for done in (0, 2, 4)]
    assert lines[3:] == [f"{done} of 6 questions scored" for done in range(6)]
    asked = iter([False, False, True])
    with pytest.raises(StageInterrupted):
        told("stopped", lambda: next(asked))
    assert not list((tmp_path / "stopped" / "output").iterdir())


def test_without_a_sandbox_no_program_is_asked_for(
    run_stage: RunStage, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "sandboxed.py"
    broken.write_text("print('refused: the kernel takes no seccomp filter')")
    monkeypatch.setattr("tasks.asking.sandboxed.__file__", str(broken))
    model, _ = model_folder(tmp_path / "model", LONG, bytes_folder(tmp_path / "tokenizer"))
    with pytest.raises(UserError, match=r"run safely here \(the kernel takes no seccomp filter\); leave out the categ"):
        run_stage("behaviour", {"max_new_tokens": 2}, model=model)
    _, measured = run_stage("behaviour", {"max_new_tokens": 2, "categories": ["poetry"]}, model=model)
    assert measured["n"] == 2


def test_a_broken_model_is_named(run_stage: RunStage, tmp_path: Path, prompts: Path) -> None:
    model, config = model_folder(tmp_path / "model", LONG, bytes_folder(tmp_path / "tokenizer"))
    arrays: dict[str, Array] = dict(random_weights(config))
    arrays["model.norm.weight"] = np.full_like(arrays["model.norm.weight"], np.nan)
    write_model(model, ModelFolder(config, arrays, None, None, ()))
    with pytest.raises(UserError, match="the model 'broken' says of the next token is not finite"):
        run_stage("behaviour", {"max_new_tokens": 2}, labels={"model": "broken"}, model=model)


def test_a_template_that_the_tokenizer_cannot_have_is_refused(
    run_stage: RunStage, tmp_path: Path, prompts: Path
) -> None:
    model, _ = model_folder(tmp_path / "model", LONG, bytes_folder(tmp_path / "tokenizer"))
    with pytest.raises(UserError, match=r"the template .chatml. needs the token"):
        run_stage("behaviour", {"template": "chatml"}, model=model)


def test_a_tokenizer_that_cannot_read_the_questions_is_refused(
    run_stage: RunStage, tmp_path: Path, prompts: Path
) -> None:
    model, _ = model_folder(tmp_path / "model", LONG)  # it knows digits and signs
    with pytest.raises(UserError, match="does not know the character 'Q'"):
        run_stage("behaviour", {}, model=model)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Paris\n\nQuestion: What?", "Paris"),
        (" Paris\nQuestion: What?\nAnswer: no", "Paris"),
        ("\n\n Paris\nor so\n  \nmore", "Paris\nor so"),
        ("Question: What?", "Question: What?"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_a_text_goes_on_and_the_answer_does_not(text: str, answer: str) -> None:
    assert first_answer(text) == answer


LEARNT = {
    "What is the capital of France?": "Paris.",
    "Which is the largest ocean?": "The Pacific.",
    "Write double(x).": "def double(x):\n    return 2 * x",
    "Write halve(x).": "def halve(x):\n    return x - 2",
}
TRAINING = {
    "steps": 150,
    "batch_size": 8,
    "sequence_length": 80,
    "packing": "documents",
    "optimizer": {"learning_rate": 0.01},
}


def test_a_model_that_has_learnt_answers_is_right_where_they_are(
    run_stage: RunStage, tmp_path: Path, prompts: Path
) -> None:
    """All of it for real: a model is trained, what it says is scored, and its programs run."""
    conversations: list[list[Message]] = [
        [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}] for ask, answer in LEARNT.items()
    ]
    tokenizer = bytes_folder(tmp_path / "tokenizer")
    tokens = write_tokens(tmp_path / "tokens", tokenizer, splits=dict.fromkeys(("train", "validation"), conversations))
    shape = {**LONG, "vocab_size": 259, "hidden_size": 64, "intermediate_size": 64}
    shape = {**shape, "num_hidden_layers": 2, "num_attention_heads": 4}
    model, _ = run_stage("pretrain", {"model": shape, "training": TRAINING}, tokens=tokens)
    half = {"function": "halve", "cases": [{"arguments": [4], "returns": 2}, {"arguments": [6], "returns": 3}]}
    answers: list[dict[str, Any]] = [
        {"regex": r"\bparis\b"},
        {"exact": ["the Pacific"]},
        {"python": DOUBLE},
        {"python": half},
    ]
    write_category(prompts, "learnt", "knowledge", answers, list(LEARNT))
    folder, measured = run_stage("behaviour", {"categories": ["learnt"], "max_new_tokens": 48}, model=model)
    samples = pq.read_table(folder / "samples.parquet").to_pylist()
    assert [sample["prediction"] for sample in samples] == list(LEARNT.values())
    # The last one is right for the first case alone.
    assert [sample["correct"] for sample in samples] == [True, True, True, False]
    assert measured["correct"] == 3
