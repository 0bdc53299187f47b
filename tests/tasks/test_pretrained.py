"""Models in the layout of `transformers` become artifacts: those published here, and those that it writes itself."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from artifacts.identity import describe_files
from common.errors import UserError
from flows.recipe import load_recipe
from models.chat import chat_of, write_chat
from models.engine import inference_engine
from models.hub import published_names
from models.tokenizer import Tokenizer, adds_bos, read_settings, write_settings
from models.weights import whole_pieces
from tasks.checkpoint import read_model
from tasks.pretrained import Config, model_of, resolved
from tests.tasks.conftest import RunStage
from tests.tasks.corpus.fake_hub import COMMITS, FakeHub
from tests.tasks.test_publish import ARCHITECTURES, EQUAL, model_folder
from tests.tasks.test_published_code import COMPOSITIONS
from tests.tasks.vocabulary.test_sentencepiece import foreign

ROOT = Path(__file__).parents[2]
COMMON: dict[str, Any] = {
    "vocab_size": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
SIZE: dict[str, Any] = {
    **COMMON,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def gpt2(**more: Any) -> Any:
    return GPT2LMHeadModel(GPT2Config(**COMMON, n_embd=16, n_layer=2, n_head=4, n_positions=32, **more))


def llama(**more: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**{**SIZE, **more}))


def mixtral(**more: Any) -> Any:
    return MixtralForCausalLM(MixtralConfig(**{**SIZE, "num_local_experts": 4, **more}))


THEIRS = {
    "gpt2": lambda: gpt2(),
    "gpt2-untied-silu": lambda: gpt2(tie_word_embeddings=False, activation_function="silu", n_inner=24),
    "llama": lambda: llama(rope_theta=500.0, head_dim=6),
    "llama-biased-tied": lambda: llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rms_norm_eps=1e-4),
    "mixtral": lambda: mixtral(num_experts_per_tok=3),
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A tokenizer of 18 tokens."""
    return model_folder(tmp_path / "any", {"architecture": "llama"})[0] / "tokenizer"


def written(folder: Path, name: str, tokenizer: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model with random weights in a folder that transformers wrote, biases and norms among them."""
    torch.manual_seed(5)
    model: Any = THEIRS[name]().to(torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, **options)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return type(model).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "parts",
    [*ARCHITECTURES.values(), *(parts for _, parts in EQUAL.values()), *list(COMPOSITIONS.values())],
    ids=[*ARCHITECTURES, *(f"equal-{name}" for name in EQUAL), *COMPOSITIONS],
)
def test_what_was_published_comes_back(run_stage: RunStage, tmp_path: Path, parts: dict[str, object]) -> None:
    source, config = model_folder(tmp_path / "model", parts)
    published, _ = run_stage("publish", {"title": "A model"}, model=source)
    assert model_of(resolved(Config(source=str(published))), {}).vocab_size == config.vocab_size
    folder, _ = run_stage("pretrained", {"source": str(published)})
    found, before = read_model(folder), read_model(source)
    # One that was composed part by part is of the class that has the composition, where one has.
    named: dict[str, Any] = {"architecture": found.config.architecture}
    # Experts have no biases, whatever a description says of them.
    named |= {"mlp_bias": found.config.mlp_bias} if config.mlp == "mixture" else {}
    assert found.config == config.model_copy(update=named)
    if parts["architecture"] != "custom" and config.hidden_size % config.num_attention_heads == 0:
        assert found.config == config
        assert describe_files(folder)["model.safetensors"] == describe_files(source)["model.safetensors"]
    if published_names(config) == config:
        assert sorted(found.weights) == sorted(before.weights)
        for name, array in before.weights.items():
            np.testing.assert_array_equal(found.weights[name], array)
    ids_BT = np.arange(3, 15, dtype=np.int32).reshape(2, 6)
    engines = (inference_engine("torch", one.config, "float32", whole_pieces(one.weights)) for one in (found, before))
    ours_BTV, theirs_BTV = (engine.logits(ids_BT) for engine in engines)
    np.testing.assert_array_equal(ours_BTV, theirs_BTV)
    assert (found.history, found.optimizer, found.trained_with) == ((), None, None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / "tokenizer" / name).read_bytes() == (source / "tokenizer" / name).read_bytes()


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("kind", ["whole", "sharded", "bfloat16"])
def test_what_transformers_wrote_gives_the_same_logits(
    run_stage: RunStage, tmp_path: Path, tokenizer: Path, name: str, kind: str
) -> None:
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    options = {"max_shard_size": "4KB"} if kind == "sharded" else {}
    theirs = written(tmp_path / "theirs", name, tokenizer, dtype, **options)
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == (kind == "sharded")
    folder, metrics = run_stage("pretrained", {"source": str(tmp_path / "theirs")})
    model = read_model(folder)
    engine = inference_engine("torch", model.config, "float32", whole_pieces(model.weights))
    ids_BT = np.random.default_rng(3).integers(0, 40, (3, 20), dtype=np.int32)
    with torch.no_grad():
        expected_BTV = theirs(torch.from_numpy(ids_BT).long()).logits.numpy()
    assert float(np.abs(expected_BTV).max()) > 0.3
    np.testing.assert_allclose(engine.logits(ids_BT), expected_BTV, atol=1e-4, rtol=0)
    assert metrics["parameters"] == sum(parameter.numel() for parameter in theirs.parameters())


def test_it_can_be_grown(run_stage: RunStage, tmp_path: Path, tokenizer: Path) -> None:
    written(tmp_path / "theirs", "llama", tokenizer)
    folder, _ = run_stage("pretrained", {"source": str(tmp_path / "theirs")})
    grown, _ = run_stage("stack", {"method": "stack"}, model=folder)
    assert read_model(grown).config.num_hidden_layers == 4
    assert len(read_model(grown).history) == 1


def test_a_recipe_may_begin_with_it(tmp_path: Path, tokenizer: Path) -> None:
    written(tmp_path / "theirs", "llama", tokenizer)
    recipe = tmp_path / "grown.yaml"
    stages = f"  base: {{stage: pretrained, source: {tmp_path / 'theirs'}}}\n  grown: {{stage: stack, model: base}}\n"
    recipe.write_text(f"description: Grows.\nstages:\n{stages}")
    base, grown = load_recipe(str(recipe)).stages
    assert isinstance(base.config, Config)
    assert base.config.digest is not None
    assert base.model is not None
    assert grown.model is not None
    assert (base.model.num_hidden_layers, grown.model.num_hidden_layers) == (2, 4)
    with pytest.raises(UserError, match=r"stages\.grown: width grows by whole factors"):
        load_recipe(str(recipe), ["stages.grown.method=width", "stages.grown.factor=2.5"])


def test_adapters_are_in_the_weights_already(run_stage: RunStage, tmp_path: Path, tokenizer: Path) -> None:
    written(tmp_path / "theirs", "llama", tokenizer)
    digest = resolved(Config(source=str(tmp_path / "theirs"))).digest
    (tmp_path / "theirs" / "adapter").mkdir()
    (tmp_path / "theirs" / "adapter" / "adapter_model.safetensors").write_bytes(b"none")
    assert resolved(Config(source=str(tmp_path / "theirs"))).digest == digest
    folder, _ = run_stage("pretrained", {"source": str(tmp_path / "theirs")})
    assert not (folder / "adapter").exists()


def test_the_digest_is_that_of_what_is_read(run_stage: RunStage, tmp_path: Path, tokenizer: Path) -> None:
    place = tmp_path / "theirs"
    written(place, "llama", tokenizer, max_shard_size="4KB")
    known = resolved(Config(source=str(place)))
    assert resolved(known) == known
    (place / "README.md").write_text("A model.")
    (place / "consolidated.safetensors").write_bytes(b"more")
    assert resolved(known) == known
    shard = next(place.glob("model-00001-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert resolved(Config(source=str(place))).digest != known.digest
    for ask in (resolved, lambda config: run_stage("pretrained", config.model_dump())):
        with pytest.raises(UserError, match=r"^digest: the model in .* is not what its digest says .* run again"):
            ask(known)


def test_below_the_hub_folder_it_is_found_by_its_id(
    run_stage: RunStage, tmp_path: Path, tokenizer: Path, empty_hub: Path
) -> None:
    written(empty_hub / "models" / "some" / "model", "gpt2", tokenizer)
    config = resolved(Config(source="some/model"))
    assert config.digest == resolved(Config(source=str(empty_hub / "models" / "some" / "model"))).digest
    # A revision says what is fetched, where anything has to be.
    assert resolved(Config(source="some/model", revision="main")).digest == config.digest
    folder, metrics = run_stage("pretrained", config.model_dump())
    assert metrics["summary"] == "gpt2, 7,744 parameters, from some/model"
    assert len(Tokenizer(folder / "tokenizer")) == 18
    # A tokenizer alone is no model, and the network is off.
    (empty_hub / "models" / "some" / "model" / "config.json").unlink()
    with pytest.raises(UserError, match=r"^model 'some/model' was not found: not below CAIRN_HUB=.*, and the Hugging"):
        resolved(Config(source="some/model"))
    with pytest.raises(UserError, match=r"it was not asked, for the recipe has the digest of a local copy"):
        resolved(config)
    with pytest.raises(UserError, match=r"'\.\./model' is no id|there is no model in \.\./model"):
        resolved(Config(source="../model"))


@pytest.mark.usefixtures("empty_hub")
def test_what_is_no_model_is_refused(run_stage: RunStage, tmp_path: Path, tokenizer: Path) -> None:
    place = tmp_path / "theirs"
    written(place, "llama", tokenizer)
    source = {"source": str(place)}
    for name in ("tokenizer.json", "config.json"):
        (place / name).rename(tmp_path / name)
        message = rf"model '{place}' has no tokenizer: neither tokenizer\.json nor tokenizer\.model is in {place}"
        with pytest.raises(UserError, match=message if name == "tokenizer.json" else r"it has no config\.json"):
            resolved(Config(source=str(place)))
        (tmp_path / name).rename(place / name)
    (place / "model.safetensors").rename(place / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"a pytorch_model\.bin is a pickle"):
        resolved(Config(source=str(place)))
    (place / "pytorch_model.bin").rename(place / "model.safetensors")
    description = json.loads((place / "config.json").read_bytes())
    (place / "config.json").write_text(json.dumps({**description, "vocab_size": 17}))
    with pytest.raises(UserError, match=r"model\.vocab_size is 17, but the tokenizer has 18 tokens"):
        run_stage("pretrained", source)
    (place / "config.json").write_text(json.dumps({**description, "vocab_size": 41}))
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight has the shape \(40, 16\), not \(41, 16\)"):
        run_stage("pretrained", source)
    (place / "config.json").write_text(
        json.dumps({**description, "model_type": "opt", "auto_map": {"AutoConfig": "x.Y"}})
    )
    (place / "x.py").write_text("raise SystemExit('code of the folder was run')")
    with pytest.raises(UserError, match="the model_type 'opt' cannot be read"):
        resolved(Config(source=str(place)))


def processed(folder: Path, single: str) -> None:
    """Gives the tokenizer in a folder a post-processor."""
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    specials = [(token, backend.token_to_id(token)) for token in ("<bos>", "<eos>")]
    backend.post_processor = TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=specials)
    backend.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("single", "settings", "expected"),
    [
        ("<bos> $A", {}, True),
        ("<bos> $A", {"add_bos_token": False}, True),  # transformers goes by the file from its version 5 on
        ("$A <eos>", {}, False),
        ("<eos> $A", {}, False),
        ("$A", {"add_bos_token": True}, True),
        ("$A", {"add_bos_token": "yes"}, False),
        (None, {}, False),
        (None, {"add_bos_token": True}, True),
    ],
)
def test_whether_bos_stands_before_a_text_is_kept(
    run_stage: RunStage, tmp_path: Path, tokenizer: Path, single: str | None, settings: dict[str, Any], expected: bool
) -> None:
    place = tmp_path / "theirs"
    written(place, "llama", tokenizer)
    if single is not None:
        processed(place, single)
    path = place / "tokenizer_config.json"
    write_settings(path, {**read_settings(path), **settings})
    folder, _ = run_stage("pretrained", {"source": str(place)})
    assert adds_bos(folder / "tokenizer") is expected
    assert ("add_bos_token" in read_settings(folder / "tokenizer" / "tokenizer_config.json")) is expected
    plain = Tokenizer(tokenizer)
    assert Tokenizer(folder / "tokenizer").encode("12+34=") == plain.encode("12+34=")
    # And when it is published and taken in again.
    published, _ = run_stage("publish", {"title": "A model"}, model=folder)
    again, _ = run_stage("pretrained", {"source": str(published)})
    assert adds_bos(again / "tokenizer") is expected


@pytest.mark.parametrize("said", [None, False])
def test_a_sentencepiece_model_alone_puts_bos_unless_it_says_otherwise(
    run_stage: RunStage, tmp_path: Path, tokenizer: Path, said: bool | None
) -> None:
    place = tmp_path / "theirs"
    written(place, "llama", tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / name).unlink()
    (place / "tokenizer.model").write_bytes(foreign("sentencepiece_unigram"))
    if said is not None:
        write_settings(place / "tokenizer_config.json", {"add_bos_token": said})
    with pytest.raises(UserError, match=r"model\.vocab_size is 40, but the tokenizer has"):
        run_stage("pretrained", {"source": str(place)})
    llama(vocab_size=4000).save_pretrained(place)
    folder, _ = run_stage("pretrained", {"source": str(place)})
    assert adds_bos(folder / "tokenizer") is (said is None)
    assert (folder / "tokenizer" / "tokenizer.model").is_file()


def test_roles_may_be_named_by_the_model_alone(run_stage: RunStage, tmp_path: Path, tokenizer: Path) -> None:
    place = tmp_path / "theirs"
    written(place, "gpt2", tokenizer)
    write_settings(place / "tokenizer_config.json", {"model_max_length": 1024})
    folder, _ = run_stage("pretrained", {"source": str(place)})
    found = Tokenizer(folder / "tokenizer")
    assert (found.bos_id, found.eos_id, found.pad_id) == (1, 2, 0)
    description = json.loads((place / "config.json").read_bytes())
    (place / "config.json").write_text(json.dumps({**description, "eos_token_id": [2, 1], "bos_token_id": -1}))
    again, _ = run_stage("pretrained", {"source": str(place)})
    assert Tokenizer(again / "tokenizer").eos_id == 2
    (place / "config.json").write_text(json.dumps({**description, "eos_token_id": 1 << 40}))
    with pytest.raises(UserError, match="names no eos_token"):
        run_stage("pretrained", {"source": str(place)})


def test_a_chat_model_stays_one(run_stage: RunStage, tmp_path: Path) -> None:
    made, _ = run_stage("tokenizer", {"vocabulary": {"kind": "bytes"}})
    write_chat(made, "chatml", bos=True)
    source, _ = model_folder(tmp_path / "model", {**ARCHITECTURES["gpt2"], "max_position_embeddings": 64}, made)
    published, _ = run_stage("publish", {"title": "A model"}, model=source)
    folder, _ = run_stage("pretrained", {"source": str(published)})
    ours, theirs = chat_of(folder / "tokenizer"), chat_of(made)
    assert ours is not None
    assert theirs is not None
    question: Any = [{"role": "user", "content": "How?"}]
    assert ours.prompt_ids(question) == theirs.prompt_ids(question)
    assert ours.tokenizer.stop_ids == theirs.tokenizer.stop_ids
    settings = read_settings(folder / "tokenizer" / "tokenizer_config.json")
    assert settings == read_settings(made / "tokenizer_config.json")
    write_settings(published / "tokenizer_config.json", {**settings, "cairn_template": {"name": "evil", "bos": 1}})
    with pytest.raises(UserError, match="which names no template"):
        run_stage("pretrained", {"source": str(published)})


CLIENT = """
import json, sys
from pathlib import Path
from common.errors import UserError
from tasks.pretrained import Config, model_of, resolved, run
from tests.tasks.conftest import context_in
try:
    config = Config.model_validate(json.loads(sys.argv[1]))
    config = resolved(config) if sys.argv[2] == "load" else config
    model = model_of(config, {})
    metrics = run(config, {}, context_in(Path(sys.argv[3]), "base")) if sys.argv[2] == "run" else {}
    print(json.dumps({"config": config.model_dump(), "layers": model.num_hidden_layers, "metrics": metrics}))
except UserError as error:
    print(json.dumps({"error": str(error)}))
"""


def test_what_is_on_the_network_is_fetched_at_a_commit(tmp_path: Path, tokenizer: Path, empty_hub: Path) -> None:
    for commit in COMMITS:
        place = tmp_path / "network" / commit / "far" / "model"
        written(place, "llama", tokenizer, max_shard_size="12KB")
        for name in ("pytorch_model.bin", "consolidated.safetensors", "modeling_far.py"):
            (place / name).write_bytes(b"not to be fetched")
    shards = {path.name: path.stat().st_size for path in place.glob("model-*.safetensors")}
    # The server tells files of one commit by their sizes.
    assert len(set(shards.values())) == len(shards) > 1
    runs = iter(range(100))

    def ask(network: FakeHub, keys: dict[str, Any], when: str, **environment: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, json.dumps(keys), when, str(tmp_path / f"run-{next(runs)}")],
            cwd=ROOT,
            env={**os.environ, "HF_ENDPOINT": network.url, "HF_HOME": str(tmp_path / "home"), **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    with FakeHub(tmp_path / "network").served() as network:
        loaded = ask(network, {"source": "far/model"}, "load")
        assert loaded["config"] == {"source": "far/model", "revision": COMMITS[-1], "digest": None}
        assert loaded["layers"] == 2
        assert not any(".safetensors" in asked and "index" not in asked for asked in network.asked)
        made = ask(network, loaded["config"], "run")
        fetched = {asked.split()[1].rpartition("/")[2] for asked in network.asked if asked.startswith("GET")}
        assert {name for name in fetched if name.startswith("model-")} == shards.keys()
        assert not fetched & {"pytorch_model.bin", "consolidated.safetensors", "modeling_far.py"}
        # What was fetched needs no network, whatever lies below a worker's own folder.
        written(empty_hub / "models" / "far" / "model", "gpt2", tokenizer)
        assert ask(network, loaded["config"], "run", HF_HUB_OFFLINE="1")["metrics"] == made["metrics"]
