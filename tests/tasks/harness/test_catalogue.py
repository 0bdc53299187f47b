from pathlib import Path

import pytest
import yaml
from lm_eval.tasks import TaskManager

from common.errors import UserError
from tasks.harness import catalogue
from tasks.harness.catalogue import GROUPS, Leaf, definition, leaves, task_path


@pytest.fixture(scope="module")
def index() -> TaskManager:
    """lm-eval's own index, which takes seconds."""
    return TaskManager()


@pytest.mark.slow
def test_every_name_is_found_where_lm_eval_finds_it(index: TaskManager) -> None:
    assert catalogue._all_names() - set(GROUPS) == set(index.all_tasks)
    paths = {name: entry.yaml_path for name, entry in index.task_index.items()}
    for name in index.all_subtasks[::97]:
        assert task_path(name) == paths[name]
    for tag in index.all_tags[::7]:
        assert {leaf.name for leaf in leaves([tag])} == index.task_index[tag].tags


def test_definitions_have_what_they_include_and_import_nothing() -> None:
    challenge = definition(task_path("arc_challenge"))
    assert (challenge["dataset_path"], challenge["dataset_name"]) == ("allenai/ai2_arc", "ARC-Challenge")
    hellaswag = definition(task_path("hellaswag"))
    assert isinstance(hellaswag["process_docs"], str)


def test_groups_stand_for_their_members() -> None:
    assert [leaf.name for leaf in leaves(["seed"])] == list(GROUPS["seed"])
    assert leaves(["arc_easy", "seed", "arc_easy"])[0] == Leaf("arc_easy")
    assert len(leaves(["arc_easy", "seed"])) == len(GROUPS["seed"])
    stem = {leaf.name for leaf in leaves(["mmlu_stem"])}
    assert "mmlu_astronomy" in stem
    assert stem < {leaf.name for leaf in leaves(["mmlu"])}
    assert {leaf.name for leaf in leaves(["ai2_arc"])} == {"arc_easy", "arc_challenge"}


def test_a_group_may_say_how_many_examples_there_are() -> None:
    assert list(catalogue._member({"task": "arc_easy", "num_fewshot": 25}, ("own",))) == [Leaf("arc_easy", 25)]
    with pytest.raises(UserError, match="'openllm' changes fewshot_split of 'arc_challenge'; name the tasks"):
        leaves(["openllm"])


def test_unknown_names_are_told_the_three_nearest() -> None:
    with pytest.raises(UserError, match=r"has no task 'arc_eazy'; the nearest names are: .*arc_easy") as raised:
        leaves(["arc_eazy"])
    assert str(raised.value).count(",") == 2
    with pytest.raises(UserError, match="has no task 'mmlu_stemm'"):
        task_path("mmlu_stemm")
    with pytest.raises(UserError, match="has no task ''"):
        leaves([""])


def test_a_file_that_includes_itself(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump({"task": "one", "include": "one.yaml"}))
    with pytest.raises(UserError, match="includes itself"):
        definition(path)
