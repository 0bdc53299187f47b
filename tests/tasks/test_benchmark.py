import importlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import StageInterrupted, UserError
from models.engine import inference_engine
from models.generation import NotFinite
from models.tokenizer import Tokenizer
from models.training.events import Note
from models.weights import whole_pieces
from tasks.benchmark import STAGE, Asked, Config, resolved
from tasks.checkpoint import read_model
from tasks.events import Counted
from tasks.harness.catalogue import task_path
from tasks.harness.data import offline_first
from tasks.scores import RESULTS, SAMPLES, Score
from tests.tasks.conftest import RunStage, context_in
from tests.tasks.harness.against_hf import Model, ours, random_model
from tests.tasks.harness.test_results import small_task

pytestmark = [
    pytest.mark.skipif("CAIRN_HUB" not in os.environ, reason="CAIRN_HUB names no folder with data sets"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return random_model(tmp_path_factory.mktemp("random"), "llama")


def asked(task: str, **keys: Any) -> dict[str, Any]:
    return resolved(Config.model_validate({"task": task, **keys})).model_dump(mode="json")


def test_results_say_what_was_measured_and_how(run_stage: RunStage, model: Model) -> None:
    output, metrics = run_stage("benchmark", asked("arc_easy", limit=30), model=model.artifact)
    results = json.loads((output / RESULTS).read_bytes())
    assert results["lm_eval"] == "0.4.13"
    assert results["n"] == results["limit"] == 30
    assert (results["num_fewshot"], results["task_version"], results["bos"]) == (0, 1.0, False)
    assert list(results["data"]) == ["allenai/ai2_arc"]
    assert results["template"]["doc_to_text"] == "Question: {{question}}\nAnswer:"
    scores = {dumped["metric"]: Score.of(dumped) for dumped in results["scores"]}
    assert set(scores) == {"acc", "acc_norm"}
    acc = scores["acc"]
    assert acc.n == 30
    assert acc.value is not None
    assert acc.standard_error == pytest.approx(np.sqrt(acc.value * (1 - acc.value) / 29))
    assert acc.chance == pytest.approx(0.25, abs=0.02)
    assert acc.majority is not None
    assert acc.majority > float(acc.chance or 1)
    assert metrics["summary"].startswith("acc ")


def test_samples_have_what_was_asked_and_answered(run_stage: RunStage, model: Model) -> None:
    output, metrics = run_stage("benchmark", asked("arc_easy", limit=12), model=model.artifact)
    rows = pq.read_table(output / SAMPLES).to_pylist()
    assert len({row["id"] for row in rows}) == 12
    for row in rows:
        assert row["prompt"].startswith("Question: ")
        assert row["target"] in row["choices"]
        assert row["prediction"] == row["choices"][int(np.argmax(row["log_probabilities"]))]
        assert row["correct"] == (row["prediction"] == row["target"]) == (row["acc"] == 1.0)
    acc = next(score["value"] for score in metrics["scores"] if score["metric"] == "acc")
    assert acc == pytest.approx(np.mean([row["acc"] for row in rows]))


@pytest.mark.parametrize(
    ("task", "chance"), [("winogrande", 0.5), ("truthfulqa_mc1", None), ("truthfulqa_mc2", None), ("copa", 0.5)]
)
def test_chance_is_what_choosing_blindly_gives(
    run_stage: RunStage, model: Model, task: str, chance: float | None
) -> None:
    output, metrics = run_stage("benchmark", asked(task, limit=20), model=model.artifact)
    rows = pq.read_table(output / SAMPLES).to_pylist()
    # Of mc2, the choices that are true come first, and its chance is their share.
    expected = chance if chance is not None else np.mean([1 / len(row["choices"]) for row in rows])
    found = metrics["scores"][0]["chance"]
    if task == "truthfulqa_mc2":
        assert expected < found < 1
    else:
        assert found == pytest.approx(expected)
    if task == "winogrande":
        assert all(row["target"] in row["choices"] for row in rows)


def test_texts_are_held_against_a_vocabulary_of_equal_tokens(run_stage: RunStage, model: Model) -> None:
    _, metrics = run_stage("benchmark", asked("wikitext", limit=3), model=model.artifact)
    scores = {score["metric"]: score for score in metrics["scores"]}
    assert set(scores) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    bits = scores["bits_per_byte"]
    assert not bits["higher_is_better"]
    assert 3 < bits["chance"] < 5
    assert bits["standard_error"] > 0


def test_examples_stand_before_each_question(run_stage: RunStage, model: Model) -> None:
    output, metrics = run_stage("benchmark", asked("copa", limit=4, num_fewshot=2), model=model.artifact)
    assert metrics["num_fewshot"] == 2
    prompts = pq.read_table(output / SAMPLES)["prompt"].to_pylist()
    assert all(prompt.count("\n\n") == 2 for prompt in prompts)


def test_bos_may_be_asked_for(run_stage: RunStage, model: Model) -> None:
    scores = []
    for bos in (None, False, True):
        output, metrics = run_stage("benchmark", asked("copa", limit=4, bos=bos), model=model.artifact)
        scores.append(pq.read_table(output / SAMPLES)["log_probabilities"].to_pylist())
        assert metrics["bos"] is bool(bos)
    assert scores[0] == scores[1] != scores[2]


def test_a_task_that_is_written_is_scored_too(tmp_path: Path, run_stage: RunStage) -> None:
    long = random_model(tmp_path, "llama", max_position_embeddings=300)
    output, metrics = run_stage("benchmark", asked("gsm8k", limit=2), model=long.artifact)
    assert {score["metric"] for score in metrics["scores"]} == {
        "exact_match (strict-match)",
        "exact_match (flexible-extract)",
    }
    assert metrics["num_fewshot"] == 5
    assert metrics["truncated"] == 2
    rows = pq.read_table(output / SAMPLES).to_pylist()
    assert [row["correct"] for row in rows] == [False, False]


GPQA = "gpqa_main_zeroshot"


@pytest.fixture
def shuffled_task(empty_hub: Path) -> str:
    """A task of lm-eval that shuffles the choices of each document when it is loaded, with data of the test's."""
    folder = empty_hub / "Idavidrein" / "gpqa"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: gpqa_main\n  data_files: gpqa_main.csv\n---\n")
    rows = [f"Question {n}?,right {n},wrong {n},worse {n},worst {n}" for n in range(12)]
    head = "Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3"
    (folder / "gpqa_main.csv").write_text("\n".join([head, *rows, ""]))
    return GPQA


def test_what_a_task_shuffles_when_it_is_loaded_is_in_lm_evals_order(
    tmp_path: Path, run_stage: RunStage, shuffled_task: str, model: Model
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    config = asked(shuffled_task)
    with offline_first(config["data"], tmp_path / "cache"):
        manager = TaskManager(include_defaults=False)
        expected = simple_evaluate(ours(model), tasks=[str(task_path(shuffled_task))], task_manager=manager)
    assert expected is not None
    for seed in (5, 6):
        random.seed(seed)  # as whatever ran before in the process may have left it
        output, metrics = run_stage("benchmark", config, model=model.artifact)
        rows = pq.read_table(output / SAMPLES).to_pylist()
        assert [json.loads(row["document"]) for row in rows] == [
            sample["doc"] for sample in expected["samples"][shuffled_task]
        ]
        assert {score["metric"]: score["value"] for score in metrics["scores"]} == {
            name: pytest.approx(expected["results"][shuffled_task][f"{name},none"]) for name in ("acc", "acc_norm")
        }
    assert len({row["target"] for row in rows}) > 1


def test_data_that_are_in_no_key_are_told(tmp_path: Path, hidden_task: str, model: Model) -> None:
    told: list[Any] = []
    config = Config.model_validate(asked(hidden_task))
    assert config.data == {}
    context = replace(context_in(tmp_path / "told", hidden_task), report=told.append)
    metrics = STAGE.run(config, {"model": model.artifact}, context)
    (note,) = metrics["notes"]
    assert note == (
        "'cieacova_choice' reads gplsi/cieacova, which only lm-eval's code names: it is in no key, and where it "
        "changes, what was found is reused"
    )
    assert Note(note) in told
    assert "notes" not in json.loads((context.output / RESULTS).read_bytes())


def test_data_that_are_in_the_key_are_not(run_stage: RunStage, model: Model) -> None:
    _, metrics = run_stage("benchmark", asked("copa", limit=2), model=model.artifact)
    assert "notes" not in metrics


def test_files_of_a_data_set_are_in_the_key(empty_hub: Path) -> None:
    with pytest.raises(UserError, match=r"dataset 'EleutherAI/arithmetic' was not found: not below CAIRN_HUB="):
        resolved(Config(task="arithmetic_2da"))
    folder = empty_hub / "EleutherAI" / "arithmetic" / "data"
    folder.mkdir(parents=True)
    keys = []
    for answer in "23":
        (folder / "two_digit_addition.jsonl").write_text(json.dumps({"context": "1 + 1 =", "completion": answer}))
        keys.append(asked("arithmetic_2da")["data"])
    assert list(keys[0]) == ["EleutherAI/arithmetic"]
    assert keys[0] != keys[1]


def test_a_package_that_is_missed_while_answers_are_scored(tmp_path: Path, model: Model) -> None:
    def score(document: Any, results: Any) -> Any:
        return importlib.import_module("absent_package").score(document, results)

    rows = [{"text": "1 + 1 =", "label": 0}]
    choices = {"output_type": "multiple_choice", "doc_to_choice": ["2", "3"], "doc_to_target": "label"}
    task = small_task(tmp_path, rows, ["acc"], doc_to_text="{{text}}", process_results=score, **choices)
    read = read_model(model.artifact)
    engine = inference_engine("torch", read.config, "float32", whole_pieces(read.weights))
    tokenizer = Tokenizer(model.artifact / "tokenizer")
    with pytest.raises(UserError, match="'small' needs the package 'absent_package', which is not installed"):
        Asked(engine, tokenizer, False, 4096, lambda done, total: None).evaluate(task, None)


def changed(model: Model, place: Path, change: Callable[[Path], None]) -> Path:
    folder = place / "changed"
    shutil.copytree(model.artifact, folder)
    change(folder)
    return folder


def test_weights_that_are_no_numbers(tmp_path: Path, run_stage: RunStage, model: Model) -> None:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"] = np.full_like(weights["model.norm.weight"], np.nan)
        save_file(weights, folder / "model.safetensors")

    with pytest.raises(NotFinite, match="the model 'benchmark' says"):
        run_stage("benchmark", asked("copa", limit=2), model=changed(model, tmp_path, spoil))


def test_a_model_without_a_tokenizer(tmp_path: Path, run_stage: RunStage, model: Model) -> None:
    bare = changed(model, tmp_path, lambda folder: shutil.rmtree(folder / "tokenizer"))
    with pytest.raises(UserError, match="tokenizer"):
        run_stage("benchmark", asked("copa", limit=2), model=bare)


def test_data_that_are_not_there(empty_hub: Path) -> None:
    with pytest.raises(UserError, match=r"dataset 'allenai/ai2_arc' was not found: not below CAIRN_HUB="):
        resolved(Config(task="arc_easy"))


def test_names_that_stand_for_nothing_or_for_several() -> None:
    with pytest.raises(UserError, match="has no task 'arc_eazy'; the nearest names are:"):
        resolved(Config(task="arc_eazy"))
    with pytest.raises(UserError, match=r"'seed' is a group of tasks \(winogrande, copa, "):
        resolved(Config(task="seed"))


def test_a_task_that_runs_programs_is_refused() -> None:
    with pytest.raises(UserError, match="'humaneval' runs what a model writes as a program, unfenced"):
        resolved(Config(task="humaneval"))


def test_other_data_or_another_version_than_the_recipe_was_loaded_with(
    tmp_path: Path, run_stage: RunStage, model: Model
) -> None:
    config = asked("copa", limit=2)
    with pytest.raises(UserError, match=r"wants lm-eval 0\.4\.1, and this machine has 0\.4\.13"):
        run_stage("benchmark", {**config, "harness": "0.4.1"}, model=model.artifact)
    other = dict.fromkeys(config["data"], "0" * 64)
    with pytest.raises(UserError, match="data set 'aps/super_glue' below CAIRN_HUB is not what it was"):
        run_stage("benchmark", {**config, "data": other}, model=model.artifact)
    with pytest.raises(UserError, match="the data of 'copa' are not what they were"):
        resolved(Config.model_validate({**config, "data": other}))
    assert resolved(Config.model_validate(config)) == Config.model_validate(config)


def test_it_tells_how_far_it_is_and_stops_when_told(tmp_path: Path, model: Model) -> None:
    told: list[Any] = []
    config = Config.model_validate(asked("copa", limit=8, batch_tokens=64))
    context = replace(context_in(tmp_path / "told", "copa"), report=told.append)
    STAGE.run(config, {"model": model.artifact}, context)
    counts = [event for event in told if isinstance(event, Counted)]
    assert counts[-1].done == counts[-1].total == 16
    stopped = replace(context_in(tmp_path / "stopped", "copa"), should_stop=lambda: True)
    with pytest.raises(StageInterrupted, match="copa"):
        STAGE.run(config, {"model": model.artifact}, stopped)


def test_the_key_has_all_that_changes_a_score() -> None:
    config = asked("arc_easy")
    assert config["harness"] == "0.4.13"
    assert len(config["data"]["allenai/ai2_arc"]) == 64
