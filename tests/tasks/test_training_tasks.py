"""Tasks of lm-eval that are asked while a model trains: the same scores as the stage `benchmark` gives, each once."""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from artifacts.record import InputReference, Record
from artifacts.store import Store
from common.errors import StageInterrupted, UserError
from models.config import ModelConfig
from models.engine import EngineName, InferenceEngine, inference_engine, is_installed, training_engine
from models.optimizer import OptimizerConfig
from models.training.config import TrainingConfig
from models.training.events import Note, Validation
from models.training.loop import Interrupted
from models.training.metrics import read_csv
from models.training.state import TaskScore
from models.training.validation import Probe
from models.weights import initial_weights, whole_pieces
from tasks.events import Event, as_event, event_line
from tasks.process import engine_process
from tasks.produce import produce
from tasks.registry import stage_named
from tasks.training_tasks import probes, resolved
from tasks.work import Work
from tests.tasks.conftest import RunStage, context_in
from tests.tasks.training_stages import TOKENIZER, pretraining

pytestmark = pytest.mark.skipif("CAIRN_HUB" not in os.environ, reason="CAIRN_HUB names no folder with data sets")
SOURCE = {"kind": "arithmetic", "maximum": 99, "train": 60, "validation": 30, "test": 3}
HUB_TOKENIZER = {"vocabulary": {"kind": "hub", "id": "HuggingFaceTB/SmolLM2-135M"}}
OPTIMIZER = OptimizerConfig(learning_rate=2.0)
TASKS: dict[str, Any] = {"names": ["copa"], "limit": 8}
MODEL: dict[str, Any] = {
    "architecture": "llama",
    "vocab_size": 49152,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 48,
    "initializer_range": 1.0,
}


def config(tasks: dict[str, Any] | None = TASKS, **changes: Any) -> dict[str, Any]:
    """A training of 8 steps with a validation after every second one."""
    validation = {"every": 2, "rows": 2, **({} if tasks is None else {"tasks": tasks})}
    run = pretraining(validation=validation, optimizer=OPTIMIZER.model_dump(), **changes)
    return {**run, "model": MODEL}


def made(stage: str, keys: dict[str, Any]) -> dict[str, Any]:
    """A config as a recipe is loaded with it."""
    definition = stage_named(stage)
    found = definition.config.model_validate(keys)
    assert definition.resolved is not None
    dumped: dict[str, Any] = definition.resolved(found).model_dump(mode="json")
    return dumped


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tokenizer from the hub, and tokens that were made with it."""
    place = tmp_path_factory.mktemp("prepared")

    def run(name: str, keys: dict[str, Any], **inputs: Path) -> Path:
        context = context_in(place / name, name, inputs)
        definition = stage_named(name)
        definition.run(definition.config.model_validate(keys), inputs, context)
        return context.output

    tokenizer = run("tokenizer", made("tokenizer", HUB_TOKENIZER))
    documents = run("documents", {"source": SOURCE})
    return tokenizer, run("tokens", {}, documents=documents, tokenizer=tokenizer)


@pytest.fixture
def tokenizer(prepared: tuple[Path, Path]) -> Path:
    return prepared[0]


@pytest.fixture
def tokens(prepared: tuple[Path, Path]) -> Path:
    return prepared[1]


class Runs:
    """Starts of one training, which goes on from its checkpoints."""

    def __init__(self, place: Path, keys: dict[str, Any], tokens: Path) -> None:
        self._place, self._tokens = place, tokens
        self._config = stage_named("pretrain").config.model_validate(keys)
        self.events: list[object] = []
        self.logs = place / "0" / "logs"

    def go(self, stop: Callable[[], bool] = lambda: False) -> tuple[Path, dict[str, Any]]:
        place = self._place / str(len(list(self._place.glob("*"))))
        context = context_in(place, "pretrain", {"tokens": self._tokens})
        changed: dict[str, Any] = {
            "scratch": (context.scratch[0], str(self._place.parent / f"{self._place.name}-scratch")),
            "logs": self.logs,
            "report": self.events.append,
            "should_stop": stop,
        }
        metrics = stage_named("pretrain").run(self._config, {"tokens": self._tokens}, replace(context, **changed))
        return context.output, metrics

    @property
    def validations(self) -> list[Validation]:
        return [event for event in self.events if isinstance(event, Validation)]


def asked(metrics: dict[str, Any]) -> list[list[dict[str, Any]]]:
    return [record["tasks"] for record in metrics["validation"]]


def as_benchmark(run_stage: RunStage, engine: EngineName, task: str, model: Path) -> dict[str, Any]:
    """What the stage `benchmark` says of a model, as far as training says it too."""
    _, found = run_stage("benchmark", {"engine": engine, "task": task, "limit": TASKS["limit"]}, model=model)
    (score,) = [score for score in found["scores"] if score["metric"] == "acc"]
    return {name: score[name] for name in ("task", "metric", "value", "standard_error", "n", "chance")}


def test_scores_are_in_the_logs_and_training_is_the_same(run_stage: RunStage, tokens: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs = Runs(tmp_path / "asked", config({**TASKS, "names": ["copa", "arc_easy"], "every": 6}), tokens)
    model, metrics = runs.go()
    columns = read_csv(runs.logs / "validation.csv")
    logged = EventAccumulator(str(runs.logs / "tensorboard"))
    logged.Reload()
    for number, task in enumerate(("copa", "arc_easy")):
        # At every sixth step, and at the last.
        values = [tasks[number]["value"] if tasks else math.nan for tasks in asked(metrics)]
        assert np.isnan(values).tolist() == [True, True, False, False]
        np.testing.assert_array_equal(columns[f"evaluation/{task}"], values)
        expected = as_benchmark(run_stage, "torch", task, model)
        assert asked(metrics)[-1][number] == pytest.approx(expected)
        assert columns[f"chance/{task}"][-1] == expected["chance"] > 0.2
        scalars = logged.Scalars(f"evaluation/{task}")
        assert [one.step for one in scalars] == [6, 8]
        assert [one.value for one in scalars] == pytest.approx(values[2:])
    told = ", ".join(f"{score.task} {score.value:.1%}" for score in runs.validations[-1].tasks)
    assert str(event_line(json.loads(json.dumps(as_event(runs.validations[-1]))))).endswith(f", {told}")
    assert f", {told}" in metrics["summary"]
    unasked, _ = Runs(tmp_path / "unasked", config(None), tokens).go()
    for name in ("model.safetensors", "optimizer.safetensors", "history.json"):
        assert (model / name).read_bytes() == (unasked / name).read_bytes()


@pytest.mark.parametrize("engine", ["jax", "mlx"])
def test_other_engines_ask_too(run_stage: RunStage, tokens: Path, tmp_path: Path, engine: EngineName) -> None:
    if not is_installed(engine):
        pytest.skip(f"{engine} is not installed")
    model, metrics = Runs(tmp_path / "asked", {**config(steps=2), "engine": engine}, tokens).go()
    assert asked(metrics) == [[pytest.approx(as_benchmark(run_stage, engine, "copa", model))]]


def test_a_stopped_run_repeats_no_evaluation_and_loses_none(tokens: Path, tmp_path: Path) -> None:
    keys = config({**TASKS, "names": ["copa", "arc_easy"]})
    whole = Runs(tmp_path / "whole", keys, tokens)
    model, expected = whole.go()
    assert len({event.tasks for event in whole.validations}) > 1
    parts = Runs(tmp_path / "parts", keys, tokens)
    # Beside each step, it is asked before and after each batch of a validation and of a task.
    for asked_times in (5, 14):
        left = iter(range(asked_times))
        with pytest.raises(Interrupted):
            parts.go(lambda left=left: next(left, None) is None)  # type: ignore[misc]
    found, metrics = parts.go()
    assert metrics["validation"] == expected["validation"]
    assert [event.step for event in parts.validations] == [2, 4, 6, 8]
    assert [event.tasks for event in parts.validations] == [event.tasks for event in whole.validations]
    assert (parts.logs / "validation.csv").read_bytes() == (whole.logs / "validation.csv").read_bytes()
    assert (found / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


MakeProbes = Callable[[Path, dict[str, Any], InferenceEngine], list[Probe]]


@pytest.fixture
def told() -> list[object]:
    return []


@pytest.fixture
def made_probes(tmp_path: Path, told: list[object]) -> Iterator[MakeProbes]:
    """Makes what asks a model some tasks, and gives its events to `told`."""
    context = replace(context_in(tmp_path / "asking", "pretrain"), report=told.append)
    with ExitStack() as kept:

        def make(folder: Path, tasks: dict[str, Any], engine: InferenceEngine) -> list[Probe]:
            run = {**pretraining()["training"], "validation": {"every": 1, "tasks": tasks}}
            return kept.enter_context(probes(TrainingConfig.model_validate(run), folder, engine, context))

        yield make
    assert list(context.local_scratch.iterdir()) == []


def random_engine(seed: int = 0, **shape: Any) -> InferenceEngine:
    model = ModelConfig.model_validate({**MODEL, **shape})
    return inference_engine("torch", model, "float32", whole_pieces(initial_weights(model, seed)))


def test_each_asking_begins_anew(made_probes: MakeProbes, tokenizer: Path) -> None:
    pytest.importorskip("torch")
    times = 0

    def heed() -> None:
        nonlocal times
        times += 1

    engine = training_engine("torch", ModelConfig.model_validate(MODEL), OPTIMIZER, "float32")
    asked = made_probes(tokenizer, {"names": ["copa", "arc_easy"], "limit": 20}, engine.inference())
    found: dict[int, list[TaskScore]] = {}
    for seed in (0, 1, 1, 0):
        engine.restore("weights", whole_pieces(initial_weights(ModelConfig.model_validate(MODEL), seed)))
        scores = [ask(heed) for ask in asked]
        assert found.setdefault(seed, scores) == scores
    assert found[0] != found[1]
    assert times >= 8


def test_the_data_of_tasks_are_read_anew(
    made_probes: MakeProbes, told: list[object], tokenizer: Path, hidden_task: str, tmp_path: Path
) -> None:
    """What is in no key is told, and nothing is taken that others have made of it."""
    pytest.importorskip("torch")
    (ask,) = made_probes(tokenizer, {"names": [hidden_task]}, random_engine())
    assert ask(lambda: None).n == 1
    assert list((tmp_path / "asking" / "scratch").rglob("*.arrow"))
    (note,) = told
    assert isinstance(note, Note)
    assert note.text.startswith("'cieacova_choice' reads gplsi/cieacova, which only lm-eval's code names")


def test_what_cannot_be_asked_is_refused_before_the_training(
    made_probes: MakeProbes, run_stage: RunStage, tokenizer: Path
) -> None:
    pytest.importorskip("torch")
    engine = random_engine()
    with pytest.raises(UserError, match=r"^training.validation.tasks: 'wikitext' gives no share of right answers; ask"):
        made_probes(tokenizer, {"names": ["wikitext"], "limit": 2}, engine)
    with pytest.raises(UserError, match=r"a continuation of \d+ tokens is to be scored, and the model has 4 positions"):
        made_probes(tokenizer, {"names": ["copa"]}, random_engine(max_position_embeddings=4))
    with pytest.raises(UserError, match="answers of up to 256 tokens, and the model has 48 positions in all"):
        made_probes(tokenizer, {"names": ["gsm8k"], "limit": 2}, engine)
    characters, _ = run_stage("tokenizer", TOKENIZER)
    with pytest.raises(UserError, match="the tokenizer cannot represent 'The man"):
        made_probes(characters, TASKS, engine)
    with pytest.raises(UserError, match=r"^the stage wants lm-eval 0\.1, and this machine has "):
        made_probes(tokenizer, {**TASKS, "harness": "0.1"}, engine)


def test_what_a_run_asks_is_in_its_key() -> None:
    found = resolved(TrainingConfig.model_validate(config()["training"]))
    assert found.validation is not None
    assert found.validation.tasks is not None
    assert found.validation.tasks.harness is not None
    assert list(found.validation.tasks.data or {}) == ["aps/super_glue"]
    assert resolved(found) == found
    refused: list[tuple[dict[str, Any], str]] = [
        ({"names": ["arc_eazy"]}, "no task 'arc_eazy'; the nearest names are: .*arc_easy"),
        ({"names": ["seed"]}, "'seed' is a group of tasks"),
        ({"names": ["copa"], "data": {"aps/super_glue": "0" * 64}}, "the data of training.validation.tasks are not wh"),
        ({"names": ["copa"], "harness": "0.1"}, "the task is of lm-eval 0.1"),
    ]
    for tasks, message in refused:
        with pytest.raises(UserError, match=message):
            resolved(TrainingConfig.model_validate(config(tasks)["training"]))


def key(keys: dict[str, Any]) -> str:
    references = {"tokens": InputReference(digest="0" * 64, key="1" * 64)}
    return Work(name="base", stage="pretrain", config=made("pretrain", keys), inputs=references, store="").key


def test_keys_of_runs_that_ask_nothing_are_what_they_were() -> None:
    unasked = pretraining(validation={"every": 4, "rows": 2})
    assert key(unasked) == "39347613b120855f5738ff238e1264beba4fbddbc68d9e4afbf901ac26905376"
    assert key(pretraining(validation={"every": 4, "rows": 2, "tasks": None})) == key(unasked)
    assert key(pretraining(validation={"every": 4, "rows": 2, "tasks": TASKS})) != key(unasked)


def reference(record: Record) -> InputReference:
    return InputReference(digest=record.output, key=record.key)


@pytest.fixture
def works(tmp_path: Path) -> Callable[..., Work]:
    """A `pretrain` that asks `copa`, in so many processes; each in a store of its own with the same tokens."""

    def work(name: str, layout: dict[str, Any]) -> Work:
        store = str(tmp_path / name)

        def one(stage: str, keys: dict[str, Any], runtime: dict[str, Any], **inputs: Record) -> Work:
            definition = stage_named(stage)
            whole = made(stage, keys) if definition.resolved else definition.config.model_validate(keys).model_dump()
            references = {name: reference(record) for name, record in inputs.items()}
            return Work.model_validate(
                {
                    "name": stage,
                    "stage": stage,
                    "config": whole,
                    "inputs": references,
                    "runtime": runtime,
                    "store": store,
                }
            )

        def record(stage: str, keys: dict[str, Any], **inputs: Record) -> Record:
            return produce(Store.open(store), one(stage, keys, {}, **inputs), lambda event: None).record

        documents = record("documents", {"source": SOURCE})
        tokens = record("tokens", {}, documents=documents, tokenizer=record("tokenizer", HUB_TOKENIZER))
        runtime = {"layout": layout, "checkpoints": {"every_seconds": 0}}
        return one("pretrain", {"engine": "torch", **config()}, runtime, tokens=tokens)

    return work


@pytest.mark.slow
def test_several_processes_ask_together_and_stop_together(works: Callable[..., Work]) -> None:
    pytest.importorskip("torch")

    def scores(record: Record) -> list[Any]:
        found: Any = record.metrics["validation"]
        return [one["tasks"] for one in found]

    with engine_process() as process:
        expected = process.do(works("one", {"processes": 1}), lambda event: None).record
        together = works("two", {"processes": 2, "fsdp": 2})
        validated: list[Event] = []

        def stop(event: Event) -> None:
            if event["event"] == "Validation":
                validated.append(event)
                process.interrupt()

        with pytest.raises(StageInterrupted, match="it goes on from there when run again"):
            process.do(together, stop)
    with engine_process() as process:
        found = process.do(together, lambda event: None).record
    assert 1 <= len(validated) < 4
    assert [len(tasks) for tasks in scores(found)] == [1] * 4
    for (one,), (other,) in zip(scores(found), scores(expected), strict=True):
        assert one == pytest.approx(other)
