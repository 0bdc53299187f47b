"""The recipes that come with Cairn: each is sound, and has the sizes that are published of its model."""

import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common.errors import UserError
from flows.entry import training_of
from flows.recipe import known_recipes, load_recipe
from models.config import ModelConfig
from models.engine import inference_engine
from models.hub import hub_config, native_class
from models.training.config import TrainingConfig
from models.training.flops import training_flops_per_token
from models.training.schedule import learning_rate_scale
from models.weights import parameter_count, read_arrays, whole_pieces
from tasks.stage import Kind
from tests.flows.conftest import Cairn
from tests.tasks.alone import run_alone

SIZES = {
    ("mtlm1-200m", "base"): 98_916_096,
    ("mtlm1-200m", "refined"): 173_255_424,
    ("mtlm2-40m", "base"): 41_529_216,
    ("elite-112m", "base"): 112_085_760,
    ("elite-112m", "tuned"): 112_085_760,
    ("elite-112m-dolly", "tuned"): 112_085_760,
    ("mlx-stories", "base"): 175_596_288,
    ("mlx-stories-small", "base"): 14_486_784,
}
TOKENS = {
    "mtlm1-200m": 3.5e9,
    "mtlm2-40m": 14.56e9,
    "elite-112m": 2.5e9,
    "mlx-stories": 6.55e9,
    "mlx-stories-small": 163.84e6,
}


@pytest.mark.parametrize("name", known_recipes())
def test_it_is_sound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAIRN_HUB", raising=False)
    recipe = load_recipe(name, resolve=False)
    used = {source for entry in recipe.stages for source in entry.inputs.values()}
    ends = [entry for entry in recipe.stages if entry.name not in used]
    # Whatever a recipe makes, something reads it: a stage that nobody needs is a slip of the pen. Scores and reports
    # people read.
    people = (Kind.EVALUATION, Kind.REPORT)
    unread = [entry.name for entry in ends if entry.definition.output not in people or entry == recipe.stages[-1]]
    assert unread == [recipe.stages[-1].name]


def published_class(model: ModelConfig) -> Any:
    """The model that `transformers` makes of what would be published, with no weights."""
    described = hub_config(model, 1, 2, 0)
    with torch.device("meta"):
        if native_class(model) is not None:
            make: Any = AutoModelForCausalLM.from_config
            return make(AutoConfig.for_model(**described))
        # Imported here alone: in a published folder these are files of their own.
        from models.published.configuration_cairn import CairnConfig
        from models.published.modeling_cairn import CairnForCausalLM

        return CairnForCausalLM(CairnConfig(**described))


@pytest.mark.parametrize("name", known_recipes())
def test_its_models_are_as_large_as_their_published_class(name: str) -> None:
    for model in (stage.model for stage in load_recipe(name, resolve=False).stages if stage.model is not None):
        assert parameter_count(model) == published_class(model).num_parameters()


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


def test_mtlm1_is_what_its_source_says() -> None:
    stages = {entry.name: entry for entry in load_recipe("mtlm1-200m", resolve=False).stages}
    base, refined = (stages[name].config.model_dump() for name in ("base", "refined"))
    assert base["model"] == {
        **base["model"],
        "architecture": "llama",
        "vocab_size": 32_000,
        "hidden_size": 768,
        "intermediate_size": 1280,
        "num_hidden_layers": 14,
        "num_attention_heads": 12,
        "max_position_embeddings": 1024,
        "norm": "rms_norm",
        "norm_eps": 1e-6,
        "mlp": "gated",
        "tie_word_embeddings": True,
        "dropout": 0.05,
    }
    grown = stages["refined"].model
    assert grown is not None
    assert grown.num_hidden_layers == 28
    for stage in (base, refined):
        training = stage["training"]
        assert stage["precision"] == "bfloat16"
        assert training["batch_size"] * training["sequence_length"] == 98_304
        assert training["steps"] * 98_304 == pytest.approx(3.5e9, rel=1e-4)
        optimizer = {"name": "adamw", "learning_rate": 8e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.01}
        assert training["optimizer"] == {**training["optimizer"], **optimizer, "clip": 1.0}
        assert training["schedule"] == {"name": "cosine", "warmup_steps": 300, "decay_steps": None, "floor": 0.1}


def test_mtlm1_with_a_head_of_its_own_has_the_size_of_its_name() -> None:
    untied = load_recipe("mtlm1-200m", ["stages.base.model.tie_word_embeddings=false"], resolve=False)
    (refined,) = (entry.model for entry in untied.stages if entry.name == "refined")
    assert refined is not None
    assert parameter_count(refined) == 197_831_424


def test_the_control_of_mtlm1_costs_what_is_said() -> None:
    recipe = load_recipe("mtlm1-200m", ["stages.refined.control=scratch"], resolve=False)
    assert [entry.name for entry in recipe.stages if entry.name.startswith("refined")] == [
        "refined",
        "refined-scratch",
        "refined-growth",
    ]
    (control,) = (entry for entry in recipe.stages if entry.name == "refined-scratch")
    training = control.config.model_dump()["training"]
    assert training["schedule"] == {"name": "cosine", "warmup_steps": 300, "decay_steps": None, "floor": 0.1}
    assert training["steps"] == 55_647


def test_mtlm2_is_what_its_source_says_but_for_eos() -> None:
    stages = {entry.name: entry for entry in load_recipe("mtlm2-40m", resolve=False).stages}
    base = stages["base"].config.model_dump()
    assert base["model"] == {
        **base["model"],
        "architecture": "custom",
        "vocab_size": 32_000,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 48,
        "max_position_embeddings": 1024,
        "norm": "rms_norm",
        "norm_eps": 1e-6,
        "position_embedding": "learned",
        "mlp": "dense",
        "hidden_act": "gelu_new",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "dropout": 0.1,
    }
    training = base["training"]
    assert (training["batch_size"], training["sequence_length"], training["steps"]) == (256, 1024, 55_554)
    optimizer = {
        "name": "adamw",
        "learning_rate": 4e-4,
        "beta1": 0.9,
        "beta2": 0.999,
        "weight_decay": 0.01,
        "clip": 1.0,
    }
    assert {key: training["optimizer"][key] for key in optimizer} == optimizer
    assert training["schedule"] == {"name": "cosine", "warmup_steps": 200, "decay_steps": None, "floor": 0.1}
    # Theirs leaves <eos> out of the loss.
    tokens = stages["tokens"].config.model_dump()
    assert tokens["eos"]
    assert tokens["loss_on"] == "text"
    for engine in ("torch", "jax", "mlx"):
        chosen = {entry.name: entry for entry in load_recipe("mtlm2-40m", [f"engine={engine}"], resolve=False).stages}
        assert chosen["base"].config.model_dump()["engine"] == engine


@pytest.mark.parametrize(("name", "other"), [("books-chat", "books"), ("elite-112m-dolly", "elite-112m")])
def test_a_base_is_that_of_another_recipe(name: str, other: str) -> None:
    ours, theirs = (
        {entry.name: entry for entry in load_recipe(recipe, resolve=False).stages} for recipe in (name, other)
    )
    reached, new = set(), {"base"}
    while new:
        reached |= new
        new = {source for stage in new for source in ours[stage].inputs.values()} - reached
    assert len(reached) > 3
    for stage in reached:
        assert ours[stage] == theirs[stage]


@pytest.mark.parametrize(
    ("name", "stage", "peak", "warmup", "plateau", "end"),
    [
        ("elite-112m", "base", 8e-4, 200, 2400, 1e-4),
        ("elite-112m-dolly", "base", 8e-4, 200, 2400, 1e-4),
        ("elite-112m-dolly", "tuned", 7e-5, 20, 386, 1e-5),
    ],
)
def test_elite_falls_as_its_source_says(
    name: str, stage: str, peak: float, warmup: int, plateau: int, end: float
) -> None:
    entry = next(entry for entry in load_recipe(name, resolve=False).stages if entry.name == stage)
    training = TrainingConfig.model_validate(entry.config.model_dump()["training"])
    assert training.optimizer.learning_rate == peak
    steps = training.steps
    rate = {step: peak * learning_rate_scale(training.schedule, step, steps) for step in range(steps + 1)}
    begins = warmup + plateau
    assert rate[warmup - 1] == rate[begins] == peak
    assert rate[warmup - 2] < peak > rate[begins + 1]
    # Their function, over the steps that are left.
    for step in (begins + 1, (begins + steps) // 2, steps - 1, steps):
        done = (step - begins) / (steps - begins)
        assert rate[step] == pytest.approx(end + (1 + math.cos(math.pi * done)) / 2 * (peak - end), rel=1e-5)


@pytest.mark.parametrize("name", ["elite-112m", "elite-112m-dolly"])
def test_elite_has_the_batches_of_its_source(name: str) -> None:
    entry = next(entry for entry in load_recipe(name, resolve=False).stages if entry.name == "base")
    training = entry.config.model_dump()["training"]
    assert (training["batch_size"], training["micro_batch_size"]) == (8 * 16, 8)


def test_elite_is_tuned_as_its_source_says() -> None:
    for name, sources, run in (
        ("elite-112m", 2, {"steps": 50, "batch_size": 256}),
        ("elite-112m-dolly", 3, {"steps": 772, "batch_size": 8}),
    ):
        stages = {entry.name: entry for entry in load_recipe(name, resolve=False).stages}
        tuned = stages["tuned"].config.model_dump()
        training = tuned["training"]
        assert {key: training[key] for key in run} == run
        assert (training["sequence_length"], training["packing"]) == (2048, "whole")
        optimizer = {"elite-112m": (3e-4, 0.1), "elite-112m-dolly": (7e-5, 0.05)}[name]
        assert (training["optimizer"]["learning_rate"], training["optimizer"]["weight_decay"]) == optimizer
        assert (tuned["optimizer_state"], tuned["lora"], tuned["vocab_size"]) == ("reset", None, None)
        tokens = [stages[source] for key, source in stages["tuned"].inputs.items() if key.startswith("tokens")]
        assert len(tokens) == len(tuned["blend"]) == sources
        assert sum(portion["weight"] for portion in tuned["blend"]) == pytest.approx(1)
        for entry in tokens:
            assert entry.config.model_dump()["template"] == "plain"
            assert entry.config.model_dump()["max_tokens"] == training["sequence_length"] + 1
        assert stages["published"].inputs["model"] == "tuned"


def test_the_small_stories_are_what_their_source_says() -> None:
    large, small = (
        {e.name: e for e in load_recipe(f"mlx-stories{end}", resolve=False).stages} for end in ("", "-small")
    )
    # Documents, tokenizer and tokens are reused from one to the other.
    for stage in ("documents", "tokenizer", "tokens"):
        assert small[stage].config == large[stage].config
    base = small["base"].config.model_dump()
    shape = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 1024}
    shape |= {"max_position_embeddings": 512, "vocab_size": 32_000}
    assert {key: base["model"][key] for key in shape} == shape
    assert (base["model"]["dropout"], base["model"]["tie_word_embeddings"]) == (0.1, True)
    training = base["training"]
    assert (training["batch_size"], training["micro_batch_size"], training["steps"]) == (32, 8, 10_000)
    optimizer = {"name": "adamw", "learning_rate": 5e-4, "beta2": 0.999, "weight_decay": 0.1, "clip": 1.0}
    assert {key: training["optimizer"][key] for key in optimizer} == optimizer
    assert training["schedule"] == {"name": "cosine", "warmup_steps": 500, "decay_steps": None, "floor": 0.1}
    untied = small["base"].model.model_copy(update={"tie_word_embeddings": False})  # type: ignore[union-attr]
    assert parameter_count(untied) == 22_678_784


@pytest.mark.parametrize(
    ("name", "claimed", "counted"), [("mlx-stories", "350M", "176M"), ("mlx-stories-small", "25M", "14.5M")]
)
def test_sizes_that_a_source_calls_otherwise_are_said(name: str, claimed: str, counted: str) -> None:
    recipe = load_recipe(name, resolve=False)
    for text in (recipe.description, recipe.stages[-1].config.model_dump()["description"]):
        assert claimed in text
        assert counted in text


MTLM2_TINY = {
    "documents.source": "{kind: hub, id: local/openstax-textbooks}",
    "documents.max_documents": "60",
    "documents.split.validation": "0.1",
    "wikitext.source": "{kind: hub, id: EleutherAI/wikitext_document_level, config: wikitext-2-raw-v1, "
    "column: page, split: test}",
    "wikitext.max_documents": "1",
    "base.model.hidden_size": "32",
    "base.model.intermediate_size": "48",
    "base.model.num_hidden_layers": "2",
    "base.model.num_attention_heads": "2",
    "base.model.max_position_embeddings": "48",
    "base.training.steps": "8",
    "base.training.batch_size": "4",
    "base.training.micro_batch_size": "2",
    "base.training.sequence_length": "48",
    "base.training.schedule.warmup_steps": "2",
    "base.training.validation": "{every: 4, rows: 4, samples: 1}",
    "evaluation.stride": "24",
}


@pytest.mark.slow
def test_mtlm2_runs_to_a_folder_that_opens_without_cairn(cairn: Cairn, tmp_path: Path) -> None:
    if not os.environ.get("CAIRN_HUB"):
        pytest.skip("CAIRN_HUB is not set")
    changes = [f"stages.{key}={value}" for key, value in MTLM2_TINY.items()]
    places = {"CAIRN_STORE": str(tmp_path / "store"), "CAIRN_CACHE": str(tmp_path / "cache")}
    code, output = cairn("run", "mtlm2-40m", *(word for change in changes for word in ("--set", change)), **places)
    assert code == 0, output
    folder = tmp_path / "models" / "mtlm2" / "published"
    shutil.copytree(tmp_path / "published" / "mtlm2-40m", folder)
    random = np.random.default_rng(0)
    ids_BT = random.integers(3, 32_000, (3, 8), dtype=np.int32)
    np.savez(folder.parent / "inputs.npz", ids=ids_BT, lengths=[3, 8, 5], new=4)
    run_alone(tmp_path / "models", tmp_path)
    outputs = np.load(folder.parent / "outputs.npz")
    model = next(entry.model for entry in load_recipe("mtlm2-40m", changes).stages if entry.name == "base")
    assert model is not None
    engine = inference_engine("torch", model, "float32", whole_pieces(read_arrays(folder / "model.safetensors")))
    np.testing.assert_allclose(outputs["logits"], engine.logits(ids_BT), atol=1e-4, rtol=0)
    card = (folder / "README.md").read_text()
    assert 'license: "odc-by"' in card
    assert "rms_norm, learned positions, dense MLP" in card
    assert "perplexity per token" in card


def test_books_is_small_enough_for_two_cores() -> None:
    (model,) = (entry.model for entry in load_recipe("books", resolve=False).stages if entry.name == "base")
    assert model is not None
    assert 4_000_000 <= parameter_count(model) <= 8_000_000


def test_the_growth_study_has_every_operator_with_every_policy_and_a_control_of_each_size() -> None:
    stages = {entry.name: entry for entry in load_recipe("growth-study", resolve=False).stages}
    compared = list(stages["operators"].inputs.values())
    assert len(set(compared)) == len(compared) == 29
    grown = [name for name in compared if stages[name].stage == "refine" and name != "not-grown"]
    growths = [stages[stages[name].inputs["model"]].config.model_dump() for name in grown]
    methods = ("stack", "interleave", "middle", "zero", "random", "overlap", "width", "upcycle")
    policies = ("copy", "copy-momentum", "reset")
    assert sorted((growth["method"], growth["optimizer_state"]) for growth in growths) == sorted(
        (method, policy) for method in methods for policy in policies
    )
    for name in grown:
        assert stages[name].config.model_dump()["training"] == stages[grown[0]].config.model_dump()["training"]
    controls = {stages[name].model for name in compared if stages[name].stage == "pretrain"}
    assert controls == {stages[name].model for name in grown}
    late = list(stages["late"].inputs.values())
    steps = [stages[name].config.model_dump()["training"]["steps"] for name in late[-2:]]
    assert steps[1] == pytest.approx(1.54 * steps[0], abs=1)


@pytest.mark.parametrize(("name", "grown"), [("not-grown", "stack-copy"), ("late-not-grown", "late-stack-copy")])
def test_the_growth_study_trains_a_base_on_for_what_its_growth_costs(name: str, grown: str) -> None:
    stages = {entry.name: entry for entry in load_recipe("growth-study", resolve=False).stages}

    def flops(stage: str) -> float:
        training = training_of(stages[stage])
        model = stages[stage].model
        assert model is not None
        return training.steps * training.batch_size * training_flops_per_token(model, training.sequence_length)

    assert flops(name) == pytest.approx(flops(grown), abs=flops(name) / training_of(stages[name]).steps)
    assert stages[name].inputs["model"] == stages[stages[grown].inputs["model"]].inputs["model"]


@pytest.mark.parametrize("name", ["books", "books-chat", "books-tiny", "growth-study"])
def test_data_that_are_on_no_hub_are_asked_for_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAIRN_HUB", raising=False)
    with pytest.raises(UserError, match="CAIRN_HUB is not set"):
        load_recipe(name)


@pytest.mark.parametrize("name", ["books", "books-chat", "books-tiny", "growth-study"])
def test_the_data_are_made_fast(name: str) -> None:
    if not os.environ.get("CAIRN_HUB"):
        pytest.skip("CAIRN_HUB is not set")
    for entry in load_recipe(name).stages:
        if entry.definition.output == Kind.DOCUMENTS:
            source = entry.config.model_dump()["source"]
            assert Path(os.environ["CAIRN_HUB"], source["id"]).is_dir()
            assert len(source["digest"]) == 64
