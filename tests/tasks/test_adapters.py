"""Models with adapters as artifacts: trained, read, published, and opened by `peft`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoModelForCausalLM

from artifacts.identity import describe_files
from common.errors import UserError
from models.config import ModelConfig
from models.engine import inference_engine
from models.lora import merged
from models.training.events import Note
from models.training.loop import Interrupted, Start
from models.tuning import LoraConfig, Tuning
from models.weights import read_arrays, whole_pieces, write_arrays
from tasks import refine
from tasks.checkpoint import ADAPTER, ADAPTER_WEIGHTS, Adapters, ModelFolder, read_model, write_model
from tasks.stage import Context
from tasks.training import TrainingStageConfig, run_training
from tests.models.test_engines import assert_same
from tests.models.test_lora import random_adapters
from tests.models.tiny import Arrays
from tests.tasks.conftest import RunStage, context_in
from tests.tasks.test_publish import ARCHITECTURES, GPT2, model_folder, random_weights
from tests.tasks.training_stages import TOKENIZER, pretraining

ALL = LoraConfig(rank=3, alpha=6)
SOME = LoraConfig(rank=2, alpha=5, targets=("q_proj", "v_proj", "down_proj"))
ATTENTION = LoraConfig(rank=2, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
OWN_CLASS = {**GPT2, "norm": "rms_norm", "attention_bias": False}


def tuned_folder(folder: Path, parts: dict[str, Any], lora: LoraConfig) -> tuple[Path, ModelConfig, Arrays]:
    """A model that knows nothing, with adapters that know nothing either."""
    made, config = model_folder(folder, parts)
    model = read_model(made)
    adapters = random_adapters(config, lora)
    write_model(made, model._replace(adapters=Adapters(lora, dict(adapters))))
    return made, config, adapters


def logits_of(model: Any, tokens_BT: NDArray[np.int32]) -> NDArray[np.float32]:
    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.from_numpy(tokens_BT).long()).logits.numpy()
    return found


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)


# What PEFT 0.21 asks of transformers 5.23.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("parts", "lora"),
    [
        (ARCHITECTURES["llama"], ALL),
        (ARCHITECTURES["llama-tied-biased"], SOME),
        (ARCHITECTURES["gpt2"], ALL),
        (ARCHITECTURES["gpt2-untied"], SOME),
        (GPT2, ALL),
        (ARCHITECTURES["mixtral"], ATTENTION),
        (OWN_CLASS, ALL),
    ],
    ids=["llama", "llama-some", "gpt2", "gpt2-some", "equal-gpt2", "mixtral", "own-class"],
)
def test_peft_opens_them_on_the_base_model(
    run_stage: RunStage, tmp_path: Path, parts: dict[str, Any], lora: LoraConfig
) -> None:
    """With the logits of the published model, which has them in its weights, and of the engine."""
    base, _ = model_folder(tmp_path / "base", parts)
    tuned, config, adapters = tuned_folder(tmp_path / "tuned", parts, lora)
    base_folder, _ = run_stage("publish", {"title": "A model"}, model=base)
    folder, _ = run_stage("publish", {"title": "A model", "base_model": str(base_folder)}, model=tuned)
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (3, 9), dtype=np.int32)
    beneath = opened(base_folder)
    plain = logits_of(beneath, tokens_BT)
    with_peft: Any = PeftModel.from_pretrained(beneath, folder / ADAPTER)
    assert with_peft.peft_config["default"].base_model_name_or_path == str(base_folder)
    found = logits_of(with_peft, tokens_BT)
    np.testing.assert_allclose(found, logits_of(opened(folder), tokens_BT), atol=1e-5, rtol=0)
    arrays = merged(config, lora, dict(random_weights(config)), adapters)
    ours = inference_engine("torch", config, "float32", whole_pieces(arrays))
    np.testing.assert_allclose(found, ours.logits(tokens_BT), atol=1e-5, rtol=0)
    assert abs(found - plain).max() > 0.1


def test_a_model_is_read_merged_unless_asked_otherwise(tmp_path: Path) -> None:
    folder, config, adapters = tuned_folder(tmp_path / "model", ARCHITECTURES["gpt2"], SOME)
    base = dict(random_weights(config))
    assert_same(dict(read_arrays(folder / "model.safetensors")), base)
    apart = read_model(folder, merge=False)
    assert apart.adapters is not None
    assert apart.adapters.config == SOME
    assert_same(dict(apart.adapters.arrays), adapters)
    assert_same(dict(apart.weights), base)
    whole = read_model(folder)
    assert whole.adapters is None
    assert_same(dict(whole.weights), dict(merged(config, SOME, base, adapters)))
    # Moments are of the adapters: of no use to what they were merged into.
    state = {"updates": np.array(3)}
    assert apart._replace(optimizer=state).merged().optimizer is None
    assert ModelFolder(config, dict(base), state, None, ()).merged().optimizer == state


def test_adapters_of_another_kind_are_refused_in_a_line(tmp_path: Path) -> None:
    folder, _, _ = tuned_folder(tmp_path / "model", ARCHITECTURES["llama"], SOME)
    path = folder / ADAPTER / ADAPTER_WEIGHTS
    write_arrays(path, {"stranger": np.zeros(3, np.float32)})
    with pytest.raises(
        UserError, match=r"holds other adapters than the model's \(stranger is unexpected.*make it again"
    ):
        read_model(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is no readable safetensors file"):
        read_model(folder)


def test_the_card_says_how_it_was_tuned(run_stage: RunStage, tmp_path: Path) -> None:
    folder, _, _ = tuned_folder(tmp_path / "model", ARCHITECTURES["llama"], SOME)
    named, _ = run_stage("publish", {"title": "A model", "base_model": "me/base"}, model=folder)
    card = (named / "README.md").read_text()
    assert "Tuned with LoRA: rank 2, alpha 5, on q_proj, v_proj, down_proj." in card
    assert "as `peft` opens them, for `me/base`: on the weights here they would count twice." in card
    again, _ = run_stage("publish", {"title": "A model", "base_model": "me/base"}, model=folder)
    assert describe_files(again) == describe_files(named)
    unnamed, _ = run_stage("publish", {"title": "A model"}, model=folder)
    assert "for the model that they were trained on:" in (unnamed / "README.md").read_text()
    described = json.loads((unnamed / ADAPTER / "adapter_config.json").read_bytes())
    assert described["base_model_name_or_path"] is None
    plain, _ = model_folder(tmp_path / "plain", ARCHITECTURES["llama"])
    without, _ = run_stage("publish", {"title": "A model"}, model=plain)
    assert "LoRA" not in (without / "README.md").read_text()
    assert not (without / ADAPTER).exists()


@pytest.fixture
def base(run_stage: RunStage) -> dict[str, Path]:
    """A model that was trained for a few steps, and what on."""
    source = {"kind": "arithmetic", "maximum": 99, "train": 60, "validation": 9, "test": 6}
    documents, _ = run_stage("documents", {"source": source})
    tokenizer, _ = run_stage("tokenizer", TOKENIZER)
    tokens, _ = run_stage("tokens", {}, documents=documents, tokenizer=tokenizer)
    model, _ = run_stage("pretrain", pretraining(), tokens=tokens)
    return {"model": model, "tokens": tokens, "documents": documents}


def tune(context: Context, base: dict[str, Path], lora: LoraConfig = SOME) -> dict[str, Any]:
    """As a tuning stage does it."""
    model = read_model(base["model"])
    training = {**pretraining(steps=40, validation={"every": 20})["training"], "optimizer": {"learning_rate": 0.03}}
    config = TrainingStageConfig.model_validate({"training": training})
    inputs = {"tokens": base["tokens"]}
    return run_training(config, model.config, Start(model.weights), inputs, context, model.history, Tuning(lora=lora))


def test_a_training_stage_leaves_weights_and_adapters(
    run_stage: RunStage, base: dict[str, Path], tmp_path: Path
) -> None:
    context = context_in(tmp_path / "tuned", "tune", base)
    metrics = tune(context, base)
    before, after = read_model(base["model"]), read_model(context.output, with_optimizer=True, merge=False)
    assert_same(dict(after.weights), dict(before.weights))
    assert after.adapters is not None
    assert metrics["trained_parameters"] == sum(array.size for array in after.adapters.arrays.values()) == 2 * 2 * 24
    assert after.optimizer is not None
    assert "exp_avg:lora_B:layers.0.attention.q_proj.weight" in after.optimizer
    assert len(after.history) == len(before.history) + 1
    losses = [record["loss"] for record in metrics["validation"]]
    assert losses[-1] < losses[0]
    # What everything else reads is the merged model.
    for stage in ("evaluate", "publish"):
        inputs = {"model": context.output} | ({"documents": base["documents"]} if stage == "evaluate" else {})
        run_stage(stage, {"max_new_tokens": 4} if stage == "evaluate" else {"title": "A model"}, **inputs)
    grown, grown_metrics = run_stage("stack", {"factor": 2}, model=context.output)
    assert "not of all weights" in grown_metrics["notes"][0]
    whole = read_model(context.output)
    name = "transformer.h.0.mlp.c_proj.weight"
    assert (whole.weights[name] != before.weights[name]).any()
    np.testing.assert_array_equal(read_model(grown).weights[name.replace("h.0", "h.1")], whole.weights[name])
    assert not (grown / ADAPTER).exists()
    events: list[object] = []
    config = refine.Config.model_validate({"training": pretraining()["training"]})
    further = context_in(tmp_path / "further", "refine", base)
    inputs = {"model": context.output, "tokens": base["tokens"]}
    refine.run(config, inputs, replace(further, report=events.append))
    assert [event.text for event in events if isinstance(event, Note) and "adapters" in event.text] == [
        "the moments are of adapters, which are now part of the weights: adamw starts anew"
    ]


def test_a_stage_that_was_interrupted_goes_on_from_adapters_alone(base: dict[str, Path], tmp_path: Path) -> None:
    straight = context_in(tmp_path / "straight", "tune", base)
    tune(straight, base)
    first = context_in(tmp_path / "first", "tune", base)
    asked = iter([False] * 5 + [True] * 100)
    with pytest.raises(Interrupted):
        tune(replace(first, should_stop=lambda: next(asked)), base)
    (checkpoint,) = Path(first.scratch[1]).rglob("model.safetensors")
    assert all(name.startswith("lora_") for name in read_arrays(checkpoint))
    second = context_in(tmp_path / "second", "tune", base)
    tune(replace(second, scratch=first.scratch), base)
    assert describe_files(second.output) == describe_files(straight.output)


def test_targets_that_the_model_has_not_are_refused(base: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lora\.targets: the model has no gate_proj"):
        tune(context_in(tmp_path / "tuned", "tune", base), base, LoraConfig(targets=("gate_proj",)))
