"""What a model is asked by `cairn evaluate`, and how prompts are taken, on stores that are put together by hand."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from artifacts.record import InputReference, Record
from artifacts.store import Store
from common.errors import UserError
from flows import inference
from flows.inference import continue_prompts, evaluate_ref, model_record, read_prompts
from models.chat import Template
from tasks.events import Listener
from tasks.produce import produce
from tasks.registry import stage_named
from tasks.work import Outcome, Work
from tests.tasks.conftest import context_in, empty_hub
from tests.tasks.test_evaluate import LONG, exchange, letters_tokenizer
from tests.tasks.test_publish import model_folder

CONVERSATIONS = {"messages": [json.dumps(exchange("1+1", "2"))]}
PROBLEMS = {"prompt": ["1+1="], "target": ["2"]}
PREFERENCES = {"messages": [json.dumps(exchange("1+1", "2")[:1])], "chosen": ["2"], "rejected": ["3"]}
TEXTS = {"text": ["1+1=2"]}

__all__ = ["empty_hub"]


class InThisProcess:
    """Does in this process what a child would do."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def do(self, work: Work, listener: Listener) -> Outcome:
        return produce(self.store, work, lambda event: None)


class Made:
    """A store that records are put into as if stages had made them."""

    def __init__(self, folder: Path) -> None:
        self.store = Store.open(str(folder / "store"))
        self.folder = folder

    def documents(self, name: str, columns: Mapping[str, list[str]], *splits: str) -> Record:
        folder = self.folder / name
        folder.mkdir()
        for split in splits:
            # Documents that say the same would be one artifact.
            table = pa.table({**columns, "source": [name]})
            pq.write_table(table, folder / f"{split}-00000.parquet")
        return self.record("documents", name, folder)

    def model(self, stage: str, name: str, template: Template | None, inputs: Mapping[str, Record]) -> Record:
        tokenizer = letters_tokenizer(self.folder / f"{name}-tokenizer", template)
        folder, _ = model_folder(self.folder / name, LONG, tokenizer)
        (folder / "name.txt").write_text(name)
        return self.record(stage, name, folder, inputs)

    def evaluation(self, model: Record, documents: Record, **config: Any) -> Record:
        folder = self.folder / f"{model.name}-{documents.name}"
        folder.mkdir()
        (folder / "results.json").write_text(folder.name)
        inputs = {"model": model, "documents": documents}
        return self.record("evaluate", folder.name, folder, inputs, split="test", **config)

    def record(
        self, stage: str, name: str, folder: Path, inputs: Mapping[str, Record] | None = None, **config: Any
    ) -> Record:
        record = self.store.commit(
            folder,
            key=hashlib.sha256(name.encode()).hexdigest(),
            stage=stage,
            version=1,
            name=name,
            config=config,
            inputs={key: InputReference(digest=one.output, key=one.key) for key, one in (inputs or {}).items()},
            started=datetime.now(UTC),
        )
        self.store.set_name(f"models/{name}", record.key)
        return record

    def asked(self, name: str, split: str = "test") -> list[str]:
        """The documents that `cairn evaluate` puts to a model."""
        return self.asked_of(f"models/{name}", split)

    def asked_of(self, ref: str, split: str = "test") -> list[str]:
        """The same of any model."""
        records = evaluate_ref(self.store, ref, split, "torch", 4)
        found = [self.store.read_record(record.inputs["documents"].key) for record in records]
        return [one.name for one in found if one is not None]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    made = Made(tmp_path)

    @contextmanager
    def process() -> Iterator[InThisProcess]:
        yield InThisProcess(made.store)

    monkeypatch.setattr(inference, "engine_process", process)
    return made


def tuned(made: Made) -> Record:
    """A model that is tuned on documents without a test split, and evaluated on others."""
    answers = made.documents("answers", CONVERSATIONS, "train", "validation")
    model = made.model("sft", "tuned", "plain", {"tokens": answers})
    made.evaluation(model, made.documents("questions", CONVERSATIONS, "test"), max_new_tokens=9)
    return model


def test_a_model_is_asked_what_it_was_evaluated_on(made: Made, caplog: pytest.LogCaptureFixture) -> None:
    tuned(made)
    assert made.asked("tuned") == ["questions"]
    assert not caplog.records
    # What it was asked in another split says nothing of this one.
    assert made.asked("tuned", "validation") == ["answers"]
    assert made.asked("tuned") == ["questions"]


def test_preferences_are_left_out_for_what_the_model_before_was_asked(
    made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = made.documents("pairs", PREFERENCES, "train", "test")
    made.model("dpo", "preferring", "plain", {"model": tuned(made), "tokens": pairs})
    with caplog.at_level(logging.WARNING, "cairn"):
        assert made.asked("preferring") == ["questions"]
    (line,) = caplog.messages
    assert line.startswith(f"left out: the documents 'pairs' ({pairs.key[:8]}) are preferences")


def test_of_a_blend_what_can_be_asked_is(made: Made, caplog: pytest.LogCaptureFixture) -> None:
    texts, problems = made.documents("texts", TEXTS, "test"), made.documents("problems", PROBLEMS, "test")
    made.model("pretrain", "base", None, {"tokens.0": texts, "tokens.1": problems})
    with caplog.at_level(logging.WARNING, "cairn"):
        assert made.asked("base") == ["problems"]
    (line,) = caplog.messages
    assert "'texts'" in line
    assert "no column 'prompt'" in line


def test_where_nothing_can_be_asked_a_line_says_why_of_each(made: Made) -> None:
    texts, answers = made.documents("texts", TEXTS, "test"), made.documents("answers", CONVERSATIONS, "train")
    chats = made.documents("chats", CONVERSATIONS, "test")
    base = made.model("pretrain", "base", None, {"tokens.0": texts, "tokens.1": chats})
    made.model("sft", "tuned", None, {"model": base, "tokens": answers})
    with pytest.raises(UserError) as error:
        made.asked("tuned")
    message = str(error.value)
    assert message.startswith("there is nothing to ask 'models/tuned': the documents 'answers' (")
    assert "have no test split to evaluate; they have train; the documents 'texts'" in message
    assert "'chats'" in message
    assert message.endswith("are conversations, and the model's tokenizer has no chat template")
    assert "\n" not in message


def test_a_base_model_is_asked_with_the_template_of_its_evaluation(made: Made) -> None:
    texts, questions = made.documents("texts", TEXTS, "train"), made.documents("questions", CONVERSATIONS, "test")
    made.evaluation(made.model("pretrain", "base", None, {"tokens": texts}), questions, template="plain")
    (record,) = evaluate_ref(made.store, "models/base", "test", "torch", 4)
    assert record.metrics["template"] == "plain"


def test_an_empty_prompt_of_a_chat_is_named(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("1+1\n \n2+2\n")
    with pytest.raises(UserError, match=r"prompts.txt, line 2 is empty: a chat model has nothing to answer"):
        read_prompts(path, as_chat=True)
    assert read_prompts(path) == ["1+1", " ", "2+2"]
    tuned(made)
    with pytest.raises(UserError, match=r"^prompt 2 is empty: a chat model has nothing to answer"):
        continue_prompts(made.store, "models/tuned", ["1+1", ""], {}, "torch", as_chat=True)


@pytest.mark.parametrize(("as_chat", "limit"), [(True, 256), (False, 64)])
def test_a_chat_answers_at_as_much_length_as_in_an_evaluation(
    made: Made, monkeypatch: pytest.MonkeyPatch, as_chat: bool, limit: int
) -> None:
    tuned(made)
    found = []

    def generate(engine: Any, prompts: list[list[int]], sampling: Any, stop_ids: list[int]) -> list[list[int]]:
        found.append(sampling.max_new_tokens)
        return [[] for _ in prompts]

    monkeypatch.setattr("models.generation.generate", generate)
    for settings in ({"max_new_tokens": None}, {}, {"max_new_tokens": 7}):
        continue_prompts(made.store, "models/tuned", ["1+1"], settings, "torch", as_chat)
    assert found == [limit, limit, 7]


def published(made: Made, model: Record, folder: Path) -> Path:
    """A model laid out as `cairn run` does it."""
    context = context_in(folder, "publish")
    stage = stage_named("publish")
    stage.run(stage.config.model_validate({"title": "A model"}), {"model": made.store.fetch(model)}, context)
    return context.output


def test_a_folder_is_used_as_the_model_that_was_published_into_it(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tuned(made)
    folder = published(made, model, tmp_path / "laid-out")
    ref = "laid-out/output"
    texts = continue_prompts(made.store, ref, ["1+1", "2"], {"max_new_tokens": 5}, "torch")
    assert texts == continue_prompts(made.store, "models/tuned", ["1+1", "2"], {"max_new_tokens": 5}, "torch")
    record = model_record(made.store, ref)
    assert (record.stage, record.name, record.inputs) == ("pretrained", "output", {})
    keys = {one.key for one in made.store.records()}
    assert model_record(made.store, ref) == record
    # By another path it is the same artifact, and so are its scores.
    assert model_record(made.store, str(folder)).output == record.output
    assert {one.key for one in made.store.records()} - keys == {model_record(made.store, str(folder)).key}
    assert made.asked_of(ref) == ["questions"]
    before = len(list(made.store.records()))
    assert made.asked_of(str(folder)) == ["questions"]
    assert len(list(made.store.records())) == before


def test_names_go_before_folders(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tuned(made)
    (tmp_path / "models" / "tuned").mkdir(parents=True)
    assert model_record(made.store, "models/tuned") == model
    assert model_record(made.store, model.key[:8]) == model
    with pytest.raises(UserError, match=r"there is no model in \./models/tuned|it has no config\.json"):
        model_record(made.store, "./models/tuned")
    # What looks like the name of an artifact is not looked for on the network.
    with pytest.raises(UserError, match=r"is called 'models/tune'; did you mean 'models/tuned'\?"):
        model_record(made.store, "models/tune")
    with pytest.raises(UserError, match=r"is called 'nothing'"):
        model_record(made.store, "nothing")


def test_a_model_from_elsewhere_that_nothing_is_known_of_has_nothing_to_be_asked(
    made: Made, tmp_path: Path, empty_hub: Path
) -> None:
    model = tuned(made)
    folder = published(made, model, tmp_path / "laid-out")
    place = empty_hub / "models" / "some" / "model"
    shutil.copytree(folder, place)
    other = Store.open(str(tmp_path / "other"))
    assert model_record(other, "some/model").output == model_record(made.store, str(folder)).output
    with pytest.raises(UserError, match=r"the documents that 'some/model' was made from are not in the store"):
        evaluate_ref(other, "some/model", "test", "torch", 4)
    with pytest.raises(UserError, match=r"model 'some/other' was not found: not below CAIRN_HUB="):
        model_record(other, "some/other")
