"""The figures of groups, against lm-eval's own."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr, unweighted_mean_stderr

from tasks.benchmark import Config, resolved
from tasks.groups import Measure, TaskGroup, _tree, group_scores, groups_in
from tasks.harness.catalogue import definition, leaves, task_path
from tasks.harness.data import offline_first
from tasks.scores import Score
from tests.tasks.conftest import RunStage
from tests.tasks.harness.against_hf import ours, random_model
from tests.tasks.made_group import SIZES, write_group_data

MEMBERS = st.tuples(st.floats(0, 1), st.floats(0, 0.2), st.integers(2, 5000))


def made(task: str, value: float | None = 0.5, error: float | None = 0.1, n: int = 9, **fields: Any) -> Score:
    return Score.model_validate(
        {"task": task, "metric": "acc", "value": value, "standard_error": error, "n": n} | fields
    )


def group(*tasks: str, weight_by_size: bool = True, **measure: Any) -> TaskGroup:
    own = Measure.model_validate({"metric": "acc", "weight_by_size": weight_by_size} | measure)
    return TaskGroup(name="own", tasks=tasks, measures=(own,))


@given(st.lists(MEMBERS, min_size=1, max_size=9), st.booleans())
def test_the_mean_and_its_error_are_lm_evals(members: list[tuple[float, float, int]], weight_by_size: bool) -> None:
    scores = [made(str(number), *one, chance=0.25) for number, one in enumerate(members)]
    ((found, tasks),) = group_scores(group(*(one.task for one in scores), weight_by_size=weight_by_size), scores)
    values, errors, sizes = (list(column) for column in zip(*members, strict=True))
    assert found.value == pytest.approx(aggregate_subtask_metrics(values, sizes, weight_by_size))
    expected = pooled_sample_stderr(errors, sizes) if weight_by_size else unweighted_mean_stderr(errors)
    assert found.standard_error == pytest.approx(expected)
    assert (found.task, found.metric, found.n, len(tasks)) == ("own", "acc", sum(sizes), len(members))
    assert found.chance == pytest.approx(0.25)


def test_what_is_not_known_of_a_task_is_not_known_of_its_group() -> None:
    for unknown in (made("b", error=None), made("b", n=1, error=None)):
        (found,) = group_scores(group("a", "b"), [made("a"), unknown])
        assert (found.score.value, found.score.standard_error) == (0.5, None)
    (found,) = group_scores(group("a", "b"), [made("a", chance=0.25), made("b", value=None)])
    assert (found.score.value, found.score.chance) == (None, None)


def test_a_figure_is_of_the_tasks_that_have_its_metric() -> None:
    parts = [made("a", group="a part", value=0.0), made("c"), made("elsewhere", value=1.0)]
    scores = [made("a", 0.2), made("b", 0.9, metric="exact_match (strict)"), *parts]
    (found,) = group_scores(group("a", "b", "c"), scores)
    assert found.score.value == pytest.approx(0.35)
    assert found.tasks == ("a", "c")
    filtered = [made("a", 0.2, metric="em (strict)"), made("a", 0.4, metric="em (loose)"), made("a", metric="emu")]
    assert [one.score.value for one in group_scores(group("a", metric="em"), filtered)] == [0.2, 0.4]
    (found,) = group_scores(group("a", metric="em", filters=("loose",)), filtered)
    assert (found.score.metric, found.score.value) == ("em (loose)", 0.4)
    assert group_scores(group("a", metric="em", filters=("none",)), filtered) == []


def test_groups_are_found_with_those_within_them() -> None:
    found = {one.name: one for one in groups_in(["mmlu", "mmlu_stem", "copa"])}
    inner = ["mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"]
    assert list(found) == ["mmlu", *inner]
    assert found["mmlu"].tasks == tuple(leaf.name for leaf in leaves(["mmlu"]))
    assert sum((found[name].tasks for name in inner), ()) == found["mmlu"].tasks
    assert {one.measures for one in found.values()} == {(Measure(metric="acc"),)}
    assert groups_in(["blimp"])[0].measures == (Measure(metric="acc", weight_by_size=False),)
    assert groups_in(["mmlu_pro"])[0].measures == (Measure(metric="exact_match", filters=("custom-extract",)),)


def test_tags_tasks_and_the_group_seed_have_no_figure() -> None:
    assert groups_in(["seed", "ai2_arc", "copa"]) == []


@pytest.mark.skipif("CAIRN_HUB" not in os.environ, reason="CAIRN_HUB names no folder with tokenizers")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_figures_are_those_that_lm_eval_gives(
    run_stage: RunStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    model = random_model(tmp_path, "llama")
    monkeypatch.setenv("CAIRN_HUB", str(write_group_data(tmp_path / "hub")))
    by_size, alike = ([{"metric": "acc", "weight_by_size": weighted}] for weighted in (True, False))
    inner = {"group": "inner", "task": ["wmdp_chem", "wmdp_cyber"], "aggregate_metric_list": alike}
    path = tmp_path / "groups" / "outer.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump({"group": "outer", "task": ["wmdp_bio", inner], "aggregate_metric_list": by_size}))
    with offline_first({}, tmp_path / "cache"):
        # Its whole index takes 20 seconds.
        known = TaskManager(include_path=[task_path("wmdp_bio").parent, path.parent], include_defaults=False)
        theirs = evaluate(ours(model), known.load(["outer"]), log_samples=False)
    assert theirs is not None
    scores = []
    for task, size in SIZES.items():
        config = resolved(Config(task=task)).model_dump(mode="json")
        _, metrics = run_stage("benchmark", config, model=model.artifact)
        scores += [Score.of(dumped) for dumped in metrics["scores"]]
        assert scores[-1].n == size
    groups = _tree("outer", definition(path)).groups
    assert [one.name for one in groups] == ["outer", "outer::inner"]
    for one in groups:
        (found,) = group_scores(one, scores)
        expected = theirs["results"][one.name]
        assert found.score.value == pytest.approx(expected["acc,none"])
        assert found.score.standard_error == pytest.approx(expected["acc_stderr,none"])
        assert found.score.n == expected["sample_len"]
        assert 0 < float(found.score.value or 0) < 1


def test_a_weight_that_is_misspelt_is_read_as_lm_eval_reads_it() -> None:
    (found,) = (one for one in groups_in(["score_robustness"]) if one.name == "score_option_order_robustness_agieval")
    assert found.measures[0].weight_by_size
