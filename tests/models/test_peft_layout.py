"""Adapters in PEFT's layout and back. That `peft` opens them is held in tests/tasks/test_adapters.py."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from models.lora import adapter_shapes
from models.peft_layout import from_peft, peft_config, to_peft
from models.tuning import LoraConfig, Projection
from tests.models.test_engines import assert_same
from tests.models.test_lora import random_adapters
from tests.models.tiny import tiny

ATTENTION: tuple[Projection, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
_SETTINGS = st.builds(
    LoraConfig,
    rank=st.integers(1, 5),
    alpha=st.floats(0.5, 64),
    targets=st.lists(st.sampled_from(get_args(Projection)), min_size=1, unique=True).map(tuple),
)


@given(settings=_SETTINGS, name=st.sampled_from(["llama", "gpt2", "custom", "mtlm2", "mixtral"]))
def test_what_is_written_is_what_is_read(settings: LoraConfig, name: str) -> None:
    config = tiny(name)
    try:
        adapters = random_adapters(config, settings)
    except UserError:
        return  # targets that the model has not
    laid = to_peft(config, settings, adapters)
    assert_same(dict(from_peft(config, settings, laid)), adapters)
    # Nothing is lost or made up: beside the adapters there are zeros alone.
    assert sum(np.count_nonzero(array) for array in laid.values()) == sum(map(np.count_nonzero, adapters.values()))
    described = peft_config(config, settings)
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in laid}
    assert all(any(module.endswith(f".{target}") for target in described["target_modules"]) for module in modules)


def test_the_names_are_those_of_peft() -> None:
    config, settings = tiny("llama"), LoraConfig(rank=3, alpha=6, targets=("q_proj", "down_proj"))
    laid = to_peft(config, settings, random_adapters(config, settings))
    assert laid["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (3, 16)
    assert laid["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].shape == (16, 3)
    assert len(laid) == 8
    assert peft_config(config, settings, "me/base") == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "me/base",
        "inference_mode": True,
        "r": 3,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["down_proj", "q_proj"],
        "fan_in_fan_out": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def test_a_fused_module_has_the_adapters_of_its_projections_side_by_side() -> None:
    config, settings = tiny("gpt2"), LoraConfig(rank=3, alpha=1.5, targets=("q_proj", "v_proj", "o_proj"))
    adapters = random_adapters(config, settings)
    laid = to_peft(config, settings, adapters)
    a, b = (laid[f"base_model.model.transformer.h.1.attn.c_attn.lora_{kind}.weight"] for kind in "AB")
    assert (a.shape, b.shape) == ((6, 16), (48, 6))
    product = b @ a
    for rows, projection in ((slice(16), "q_proj"), (slice(32, 48), "v_proj")):
        name = f"layers.1.attention.{projection}.weight"
        np.testing.assert_allclose(product[rows], adapters[f"lora_B:{name}"] @ adapters[f"lora_A:{name}"], atol=1e-6)
    assert not product[16:32].any()
    described = peft_config(config, settings)
    assert described["target_modules"] == ["attn.c_attn", "attn.c_proj"]
    assert (described["r"], described["lora_alpha"], described["fan_in_fan_out"]) == (3, 1.5, True)
    assert (described["rank_pattern"], described["alpha_pattern"]) == ({"attn.c_attn": 6}, {"attn.c_attn": 3})


def test_other_arrays_are_named() -> None:
    config, settings = tiny("llama"), LoraConfig(rank=3, targets=ATTENTION)
    laid = dict(to_peft(config, settings, random_adapters(config, settings)))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    with pytest.raises(ValueError, match=r"q_proj\.lora_A\.weight has shape \(2, 16\)"):
        from_peft(config, settings, {**laid, name: np.zeros((2, 16), np.float32)})
    del laid[name]
    with pytest.raises(ValueError, match=r"q_proj\.lora_A\.weight is missing"):
        from_peft(config, settings, laid)
    assert len(adapter_shapes(config, settings)) == len(laid) + 1
