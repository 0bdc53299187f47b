"""What is made of lm-eval's samples, over its real evaluation: tasks that it ships, and small ones of each kind."""

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate

from tasks.benchmark import Config, load_task, resolved
from tasks.harness.results import Levels, levels, sample_columns, scores
from tasks.reporting.significance import differences
from tasks.scores import RESULTS, SAMPLES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
needs_hub = pytest.mark.skipif("CAIRN_HUB" not in os.environ, reason="CAIRN_HUB names no folder with data sets")

LogProbability = Callable[[str, str], float]


class Known(LM):  # type: ignore[misc]  # lm-eval has no types
    """A model of which it is known what it says."""

    def __init__(self, log_probability: LogProbability, text: str = "") -> None:
        super().__init__()
        self._log_probability, self._text = log_probability, text

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        found = [self._log_probability(*request.args) for request in requests]
        return [(one, one > np.log(0.5)) for one in found]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return [self._log_probability("", request.args[0]) for request in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [self._text] * len(requests)


class Found:
    """What a model that is known makes of a task."""

    def __init__(self, task: Any, model: LM, limit: int | None = None) -> None:
        self.task, name = task, task.config.task
        found = evaluate(model, {"tasks": {name: task}, "groups": {}}, limit=limit, bootstrap_iters=10)
        assert found is not None
        self.samples: Sequence[Mapping[str, Any]] = found["samples"][name]
        results = {**found["results"][name], "higher_is_better": found["higher_is_better"][name]}
        self.levels: Levels = levels(task, self.samples, lambda text: -len(text))
        self.scores = {one.metric: one for one in scores(name, results, self.samples, self.levels)}
        self.columns = sample_columns(task, self.samples)

    def written(self, folder: Path) -> Path:
        folder.mkdir()
        pq.write_table(pa.table(self.columns), folder / SAMPLES)
        (folder / RESULTS).write_text(json.dumps({"scores": [one.dumped() for one in self.scores.values()]}))
        return folder


def small_task(folder: Path, rows: list[dict[str, Any]], metrics: Sequence[str], **config: Any) -> Any:
    """A task of lm-eval over some rows."""
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    data = {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
    kept = {"task": "small", "num_fewshot": 0, "metric_list": [{"metric": metric} for metric in metrics]}
    return ConfigurableTask(cache_dir=str(folder / "cache"), config={**data, **kept, **config})


def real_task(name: str, folder: Path) -> Any:
    return load_task(resolved(Config(task=name)), folder)[0]


WORDS = [{"text": f"{number} and", "word": word} for number, word in enumerate(["one", "three", "seventeen"])]


def words(folder: Path, per_character: float) -> Found:
    """A task as LAMBADA is, asked of a model that gives every character the same log-probability."""
    task = small_task(
        folder,
        WORDS,
        ["perplexity", "acc"],
        output_type="loglikelihood",
        doc_to_text="{{text}}",
        doc_to_target=" {{word}}",
    )
    return Found(task, Known(lambda context, continuation: per_character * len(continuation)))


def test_a_perplexity_has_the_losses_of_its_documents(tmp_path: Path) -> None:
    good, bad = words(tmp_path, -0.125), words(tmp_path, -2.0)
    assert bad.columns["perplexity"] == [8.0, 12.0, 20.0]
    assert bad.scores["perplexity"].value == pytest.approx(np.exp(40 / 3))
    found = differences(good.written(tmp_path / "good"), bad.written(tmp_path / "bad"), good.scores.values())
    compared = {one.metric: one for one in found}
    assert compared["perplexity"].difference < 0
    assert not compared["perplexity"].is_fall(level=0.2)
    assert compared["perplexity"].is_rise(level=0.2)


def verdicts(folder: Path, metrics: Sequence[str], log_probability: LogProbability, labels: Sequence[int]) -> Found:
    """A question of no (0) or yes (1) for each of some labels."""
    task = small_task(
        folder,
        [{"text": f"{number} is it.", "label": label} for number, label in enumerate(labels)],
        metrics,
        output_type="multiple_choice",
        doc_to_text="{{text}}",
        doc_to_target="label",
        doc_to_choice=["no", "yes"],
    )
    return Found(task, Known(log_probability))


def test_what_a_document_alone_does_not_have_has_no_column(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = verdicts(tmp_path, ["acc", "f1", "mcc"], lambda _, said: -float(len(said)), [0, 1, 0, 1])
    assert set(found.scores) == {"acc", "f1", "mcc"}
    assert found.columns["acc"] == [1, 0, 1, 0]
    assert {"f1", "mcc"}.isdisjoint(found.columns)
    folder = found.written(tmp_path / "found")
    assert [one.metric for one in differences(folder, folder, found.scores.values())] == ["acc"]


def test_texts_have_what_they_are_alone(tmp_path: Path) -> None:
    task = small_task(
        tmp_path,
        [{"text": "some words"}, {"text": "others"}],
        ["word_perplexity", "byte_perplexity", "bits_per_byte"],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
    )
    found = Found(task, Known(lambda _, text: -np.log(4) * len(text)))
    assert found.columns["bits_per_byte"] == pytest.approx([2, 2])
    assert found.columns["byte_perplexity"] == pytest.approx([4, 4])
    assert found.columns["word_perplexity"] == pytest.approx([4**5, 4**6])


def test_the_commonest_answer_is_a_level_and_an_order_is_none(tmp_path: Path) -> None:
    found = verdicts(tmp_path, ["acc"], lambda *_: -1.0, [0, 1, 0, 0, 1])
    assert (found.scores["acc"].chance, found.scores["acc"].majority) == (0.5, 0.6)
    found = verdicts(tmp_path, ["acc"], lambda *_: -1.0, [1, 1, 1])
    assert (found.scores["acc"].chance, found.scores["acc"].majority) == (0.5, None)


@needs_hub
@pytest.mark.parametrize("name", ["truthfulqa_mc1", "truthfulqa_mc2"])
def test_right_choices_that_always_come_first_are_no_majority(name: str, tmp_path: Path) -> None:
    found = Found(real_task(name, tmp_path), Known(lambda *_: -1.0), limit=20)
    acc = found.scores["acc"]
    assert acc.majority is None
    assert acc.chance is not None
    assert 0 < acc.chance < 1
    # Of mc2, acc is the probability of the choices that are true.
    assert (found.columns["correct"] == [None] * 20) == (name == "truthfulqa_mc2")


def test_mutual_information_is_of_the_choices_behind_their_context(tmp_path: Path) -> None:
    likely = {"no": -1.0, "yes": -9.0}

    def log_probability(context: str, said: str) -> float:
        # Without context far more likely, so that the best of all answers is none of the choices.
        return likely[said.strip()] + (6.0 if said.strip() == "yes" else 0.5) * (not context)

    found = verdicts(tmp_path, ["acc", "acc_mutual_info"], log_probability, [0, 1, 1, 1])
    assert found.columns["log_probabilities"] == [[-1, -9]] * 4
    assert [len(choices) for choices in found.columns["choices"]] == [2] * 4
    assert [said.strip() for said in found.columns["prediction"]] == ["no"] * 4
    assert found.columns["acc"] == [1, 0, 0, 0]
    for metric in ("acc", "acc_mutual_info"):
        assert (found.scores[metric].chance, found.scores[metric].majority) == (0.5, 0.75)


def test_answers_that_are_written_have_no_level(tmp_path: Path) -> None:
    task = small_task(
        tmp_path,
        [{"text": "Which of A and B?", "letter": letter} for letter in "ABBB"],
        ["exact_match"],
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="{{letter}}",
    )
    found = Found(task, Known(lambda *_: 0.0, "A"))
    assert found.scores["exact_match"].value == 0.25
    assert (found.scores["exact_match"].chance, found.scores["exact_match"].majority) == (None, None)
    assert not found.scores["exact_match"].near_chance


@needs_hub
def test_a_prediction_is_right_or_wrong_by_the_same_filter(tmp_path: Path) -> None:
    # The first question's answer, in words that the second filter alone reads.
    found = Found(real_task("gsm8k", tmp_path), Known(lambda *_: 0.0, "She makes 18 of them"), limit=2)
    assert found.columns["exact_match (strict-match)"] == [0, 0]
    assert found.columns["exact_match (flexible-extract)"] == [1, 0]
    assert found.columns["prediction"] == ["[invalid]"] * 2
    assert found.columns["correct"] == [False, False]
    found = Found(real_task("gsm8k", tmp_path), Known(lambda *_: 0.0, "#### 18"), limit=2)
    assert found.columns["prediction"] == ["18"] * 2
    assert found.columns["correct"] == [True, False]


@needs_hub
@pytest.mark.parametrize("name", ["winogrande", "wsc273"])
def test_what_is_said_behind_each_choice_is_the_prompt(name: str, tmp_path: Path) -> None:
    found = Found(real_task(name, tmp_path), Known(lambda context, _: -float(len(context))), limit=4)
    for row, sample in enumerate(found.samples):
        contexts, continuations = zip(*sample["arguments"], strict=True)
        assert found.columns["choices"][row] == list(contexts)
        assert found.columns["prompt"][row] == f"…{continuations[0]}"
        assert len(continuations[0]) > 1
        assert found.columns["prediction"][row] == min(contexts, key=len)


def test_the_one_text_that_is_asked_for(tmp_path: Path) -> None:
    found = words(tmp_path, -0.125)
    assert found.columns["target"] == [" one", " three", " seventeen"]
    assert found.columns["log_probability"] == [-0.5, -0.75, -1.25]
    assert found.columns["greedy"] == found.columns["correct"] == [True, False, False]
    assert found.columns["prediction"] == [" one", "", ""]
