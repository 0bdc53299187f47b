from pathlib import Path

import pytest
import yaml

from common.errors import UserError
from flows.recipe import known_recipes, load_recipe
from models.engine import is_installed
from models.weights import parameter_count


def test_the_default_recipe_is_of_at_most_1_5_million_parameters() -> None:
    models = [stage.model for stage in load_recipe("arithmetic").stages if stage.model is not None]
    assert all(parameter_count(model) <= 1_500_000 for model in models)
    assert [stage.stage for stage in load_recipe("arithmetic").stages if stage.model is not None] == [
        "pretrain",
        "stack",
        "refine",
        "sft",
    ]


def test_overrides_reach_every_depth_and_keys_left_to_their_defaults() -> None:
    recipe = load_recipe(
        "arithmetic-tiny",
        [
            "stages.base.training.steps=7",
            "stages.base.training.schedule={name: cosine}",
            "stages.refined.checkpoints.keep_last=5",
            "stages.refined.training.optimizer.clip=null",
            "precision=bfloat16",
        ],
    )
    base, refined = (next(stage for stage in recipe.stages if stage.name == name) for name in ("base", "refined"))
    assert base.config.training.steps == 7  # type: ignore[attr-defined]
    assert base.config.precision == "bfloat16"  # type: ignore[attr-defined]
    assert refined.runtime.checkpoints.keep_last == 5
    assert refined.config.training.optimizer.clip is None  # type: ignore[attr-defined]
    # The file writes both optimizers once, under an anchor.
    assert base.config.training.optimizer.clip == 1.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "stages.base.training.stepz=4",
            r"stages\.base\.training\.stepz: there is no such key; did you mean 'steps'\?",
        ),
        ("stages.base.trainin.steps=4", r"stages\.base\.trainin: there is no such key; did you mean 'training'\?"),
        ("stages.bas.training.steps=4", r"there is no key 'stages.bas'; did you mean 'base'\?"),
        ("engne=torch", r"engne: there is no such key; did you mean 'engine'\?"),
        ("engine=tensorflow", r"engine: input should be 'torch', 'jax' or 'mlx' \(given: 'tensorflow'\)"),
        (
            "stages.base.training.steps=many",
            r"stages\.base\.training: steps: input should be a number \(given: 'many'\)",
        ),
        ("stages.base.training.steps=true", r"stages\.base\.training: steps: input should be a number \(given: True\)"),
        ("stages.base.training.optimizer.clip='1'", r"clip: input should be a number \(given: '1'\)"),
        ("stages.base.training.steps=1.5", r"stages\.base\.training\.steps: input should be a valid integer"),
        (
            "stages.published.model=base",
            r"stages\.published\.evaluation: 'questions-after' is of the model 'tuned', not of 'base'",
        ),
        ("stages.base.training.steps=0", r"stages\.base\.training\.steps: input should be greater than 0"),
        ("stages.base.model.num_attention_heads=3", r"hidden_size 16 is not divisible by num_attention_heads 3"),
        ("stages.base.training.sequence_length=97", r"sequence_length 97 exceeds .* max_position_embeddings 96"),
        ("stages.refined.training.sequence_length=97", r"stages.refined: .* exceeds .* max_position_embeddings 96"),
        ("stages.base.training.micro_batch_size=5", r"micro_batch_size 5 does not divide batch_size 16"),
        ("stages.base.training.schedule.warmup_steps=99", r"warm-up and decay together exceed the 40 steps"),
        ("stages.base.tokens=tokenz", r"there is no stage 'tokenz' before 'base'; did you mean 'tokens'\?"),
        ("stages.base.tokens=refined", r"there is no stage 'refined' before 'base'"),
        ("stages.base.tokens=expressions", r"stage 'expressions' makes documents, not tokens; use tokens or answers"),
        ("stages.base.tokens=null", r"stages\.base\.tokens is missing: name the stage before it that makes the tokens"),
        ("stages.base.stage=pretrian", r"stages\.base\.stage: 'pretrian' is no stage; did you mean 'pretrain'\?"),
        (
            "stages.base.model.norm=layer_norm",
            r"norm of llama is 'rms_norm', not 'layer_norm'; use architecture: custom",
        ),
        ("stages.expressions.source.maximum=-1", r"minimum 0 exceeds maximum -1"),
        ("stages.base.checkpoints.keep_last=1", r"checkpoints\.keep_last: input should be greater than or equal to 2"),
        ("stages.base.tokens.x=1", r"'stages\.base\.tokens' is a value, which has no keys; give it whole"),
        ("stages.base.two={}", r"stages\.base\.two: there is no such key"),
        ("stages.expressions-before.bits=3", r"stages\.expressions-before\.bits: input should be 4 or 8 \(given: 3\)"),
        ("stages.stacked.factor=1.5", r"stages\.stacked: factor 1\.5 of 1 layers is 1\.5, no whole number of layers"),
        ("stages.stacked.method=middle", r"stages\.stacked: middle keeps a layer before and behind what it repeats"),
        ("stages.stacked.method=upcycle", r"stages\.stacked\.config: method upcycle needs num_local_experts"),
        ("stages.stacked.block=2", r"stages\.stacked\.config: method stack has no use for block; it takes factor"),
        ("steps", r"is not of the form key\.path=value"),
        ("stages.base.training.steps=[", r"the value is no YAML"),
    ],
)
def test_what_is_wrong_is_named_with_its_path(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("arithmetic-tiny", [override])


def test_few_bits_are_refused_where_the_engine_has_none() -> None:
    with pytest.raises(
        UserError, match=r"stages\.expressions-before: engine 'torch' does not read weights of 4 bits; use bits"
    ):
        load_recipe("arithmetic-tiny", ["engine=torch", "stages.expressions-before.bits=4"])


def test_stages_run_where_they_say_or_all_of_them_do() -> None:
    recipe = load_recipe("arithmetic-tiny", ["worker=cpu", "stages.base.worker=cuda", "stages.published.worker=local"])
    where = {entry.name: entry.runtime.worker for entry in recipe.stages}
    assert where["base"] == "cuda"
    assert where["published"] == "local"
    assert {worker for name, worker in where.items() if name not in ("base", "published")} == {"cpu"}
    assert {entry.runtime.worker for entry in load_recipe("arithmetic-tiny").stages} == {"local"}


def test_a_stage_without_an_engine_has_that_of_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whether a worker has its engine is not known here.
    monkeypatch.setattr("models.engine.is_installed", lambda engine: engine == "torch")
    sets = ["stages.base.worker=tpu", "stages.refined.worker=apple", "stages.expressions-before.worker=cuda"]
    engines = {
        entry.name: getattr(entry.config, "engine", None) for entry in load_recipe("arithmetic-tiny", sets).stages
    }
    assert engines["base"] == "jax"
    assert engines["refined"] == "mlx"
    assert engines["expressions-before"] == "torch"
    assert engines["expressions"] is None
    with pytest.raises(UserError, match="'jax' does not compute in float16"):
        load_recipe("arithmetic-tiny", ["stages.base.worker=tpu", "precision=float16"])


def test_whole_weights_are_no_part_of_what_a_key_is_made_of() -> None:
    # Or evaluations that were done before there were bits would all be done again.
    for engine, bits in (("torch", None), ("mlx", 4)):
        changes = {"engine": engine, **({"bits": bits} if bits else {})}
        settings = [f"stages.questions-after.{key}={value}" for key, value in changes.items()]
        if engine == "mlx" and not is_installed("mlx"):
            continue
        config = load_recipe("arithmetic-tiny", ["engine=torch", *settings]).stages[-2].config.model_dump(mode="json")
        assert ("bits" in config) == (bits is not None)
        assert "template" not in config


def test_an_unknown_recipe_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match="there is no recipe 'arithmetik'; did you mean 'arithmetic'"):
        load_recipe("arithmetik")
    with pytest.raises(UserError, match=r"there is no recipe file .*missing\.yaml"):
        load_recipe("missing.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"stages: [", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"- a", "is no mapping"),
        (b"", "is no mapping"),
        (b"description: x", "stages is missing"),
        (b"description: x\ndescription: y", "the key 'description' stands twice"),
        (b"description: 2020-99-99", "cannot be read"),
        (b"description: x\nstages: {a b: {stage: tokenizer}}", r"stages\.a b: a stage's name has letters"),
        (b"description: x\nstages: {}", "stages: "),
        (b"description: x\nstages: {a: 3}", r"stages\.a: "),
        (b"description: x\nstages: {a: {}}", r"stages\.a\.stage: None is no stage"),
        (b"description: x\nstages: &a {b: *a}", "one of its values contains itself"),
        (b"!!python/object/apply:os.system ['true']", "cannot be read"),
    ],
)
def test_files_that_are_no_recipe_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_recipe(str(path))


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(UserError, match="there is no recipe file"):
        load_recipe(str(tmp_path / "folder.yaml"))


def test_stages_may_branch(tmp_path: Path) -> None:
    content = yaml.safe_load(known_recipes()["arithmetic-tiny"].read_text())
    stages = content["stages"]
    stages["scores_of_base"] = {"stage": "evaluate", "model": "base", "documents": "expressions"}
    path = tmp_path / "branches.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    recipe = load_recipe(str(path))
    assert recipe.name == "branches"
    assert recipe.stages[-1].inputs == {"model": "base", "documents": "expressions"}


def test_a_perplexity_reads_documents_or_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAIRN_HUB", raising=False)
    content = yaml.safe_load(known_recipes()["arithmetic-tiny"].read_text())
    stages = content["stages"]
    stages["on-documents"] = {"stage": "perplexity", "model": "base", "documents": "expressions"}
    stages["on-wikitext"] = {"stage": "perplexity", "model": "base"}
    path = tmp_path / "perplexities.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    entries = {entry.name: entry for entry in load_recipe(str(path)).stages}
    # What is read from documents is in the key by their digest alone.
    assert "data" not in entries["on-documents"].config.model_dump(mode="json")
    data = entries["on-wikitext"].config.model_dump(mode="json")["data"]
    assert (data["id"], data["config"], data["split"]) == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    assert len(data["revision"]) == 40
    assert entries["on-wikitext"].inputs == {"model": "base"}
    stages["on-documents"]["data"] = {"kind": "hub", "id": "owner/texts"}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError, match=r"stages\.on-documents: data: it is read where there are no documents; leave"):
        load_recipe(str(path))
