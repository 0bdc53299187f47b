"""The recipes that come with Cairn: each is sound, and has the sizes that are published of its model."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common.errors import UserError
from flows.recipe import known_recipes, load_recipe
from models.hub import hub_config
from models.weights import parameter_count
from tasks.stage import Kind

SIZES = {
    ("mtlm1-200m", "base"): 98_916_096,
    ("mtlm1-200m", "refined"): 173_255_424,
    ("mtlm2-40m", "base"): 41_529_216,
    ("elite-112m", "base"): 112_085_760,
    ("mlx-stories", "base"): 175_596_288,
}
TOKENS = {"mtlm1-200m": 3.5e9, "mtlm2-40m": 14.56e9, "elite-112m": 2.5e9, "mlx-stories": 6.55e9}


@pytest.mark.parametrize("name", known_recipes())
def test_it_is_sound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAIRN_HUB", raising=False)
    recipe = load_recipe(name, resolve=False)
    used = {source for entry in recipe.stages for source in entry.inputs.values()}
    ends = [entry.name for entry in recipe.stages if entry.name not in used]
    # Whatever a recipe makes, something reads it: a stage that nobody needs is a slip of the pen.
    assert ends == [recipe.stages[-1].name]


@pytest.mark.parametrize("name", known_recipes())
def test_its_models_are_as_large_as_their_transformers_class(name: str) -> None:
    for model in (stage.model for stage in load_recipe(name, resolve=False).stages if stage.model is not None):
        if model.architecture == "custom":
            continue  # no class of transformers has its composition
        with torch.device("meta"):
            make: Any = AutoModelForCausalLM.from_config
            theirs = make(AutoConfig.for_model(**hub_config(model, 1, 2, 0)))
        assert parameter_count(model) == theirs.num_parameters()


@pytest.mark.parametrize(("name", "stage"), SIZES)
def test_its_model_has_the_published_size(name: str, stage: str) -> None:
    entry = next(entry for entry in load_recipe(name, resolve=False).stages if entry.name == stage)
    assert entry.model is not None
    assert parameter_count(entry.model) == SIZES[name, stage]


@pytest.mark.parametrize("name", TOKENS)
def test_its_steps_have_the_published_tokens(name: str) -> None:
    entry = next(entry for entry in load_recipe(name, resolve=False).stages if entry.name == "base")
    training = entry.config.model_dump()["training"]
    seen = training["steps"] * training["batch_size"] * training["sequence_length"]
    assert seen == pytest.approx(TOKENS[name], rel=1e-3)


def test_books_is_small_enough_for_two_cores() -> None:
    (model,) = (entry.model for entry in load_recipe("books", resolve=False).stages if entry.name == "base")
    assert model is not None
    assert 4_000_000 <= parameter_count(model) <= 8_000_000


@pytest.mark.parametrize("name", ["books", "books-tiny"])
def test_data_that_are_on_no_hub_are_asked_for_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAIRN_HUB", raising=False)
    with pytest.raises(UserError, match="CAIRN_HUB is not set"):
        load_recipe(name)


@pytest.mark.parametrize("name", ["books", "books-tiny"])
def test_the_data_are_made_fast(name: str) -> None:
    if not os.environ.get("CAIRN_HUB"):
        pytest.skip("CAIRN_HUB is not set")
    for entry in load_recipe(name).stages:
        if entry.definition.output == Kind.DOCUMENTS:
            source = entry.config.model_dump()["source"]
            assert Path(os.environ["CAIRN_HUB"], source["id"]).is_dir()
            assert len(source["digest"]) == 64
