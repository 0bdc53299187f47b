"""Weights in the layout of `transformers`: names as files have them, shards, types, and files that are not to be
trusted."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from common.errors import UserError
from models.config import ModelConfig
from models.hub import from_hub_weights, hub_weights
from models.hub_files import HUB_INDEX, HUB_WEIGHTS, read_weights, weight_files
from tests.models.tiny import VARIANTS, random_weights, tiny

Arrays = dict[str, NDArray[Any]]


def equal(found: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> None:
    assert sorted(found) == sorted(expected)
    for name, array in found.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def saved(folder: Path, arrays: Mapping[str, NDArray[Any]], name: str = HUB_WEIGHTS) -> None:
    save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, folder / name)


def sharded(folder: Path, arrays: Mapping[str, NDArray[Any]], count: int = 3) -> dict[str, str]:
    """Writes shards and their index; gives where each array is."""
    placed = {name: f"model-{number % count:05}-of-{count:05}.safetensors" for number, name in enumerate(arrays)}
    for file in set(placed.values()):
        saved(folder, {name: array for name, array in arrays.items() if placed[name] == file}, file)
    write_index(folder, placed)
    return placed


def write_index(folder: Path, placed: Mapping[str, Any]) -> None:
    (folder / HUB_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


@pytest.fixture
def model() -> tuple[ModelConfig, Arrays]:
    config = tiny("llama")
    return config, random_weights(config, 3)


@pytest.mark.parametrize("name", VARIANTS)
def test_renaming_comes_back(name: str) -> None:
    config = tiny(name)
    # Composed part by part as GPT-2 is: the published names are others.
    parts = config.model_dump() | ({"architecture": "custom"} if name == "gpt2" else {})
    for one in (config, ModelConfig.model_validate(parts)):
        weights = random_weights(one, 3)
        equal(from_hub_weights(one, hub_weights(one, weights)), weights)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "custom"])
def test_names_may_lack_the_prefix_and_buffers_are_left_out(tmp_path: Path, name: str) -> None:
    config = tiny(name)
    weights = random_weights(config, 3)
    bare = {key.removeprefix("transformer.").removeprefix("model."): array for key, array in weights.items()}
    masks = {"h.0.attn.bias": np.ones((1, 1, 24, 24), np.bool_), "h.1.attn.masked_bias": np.array(-1e4, np.float32)}
    buffers = masks if name == "gpt2" else {"layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    saved(tmp_path, {**bare, **buffers})
    equal(read_weights(tmp_path, config), weights)
    prefix = "transformer." if name == "gpt2" else "model."
    saved(tmp_path, {**weights, **{prefix + key: array for key, array in buffers.items()}})
    equal(read_weights(tmp_path, config), weights)


def test_shards_are_read_by_their_index(tmp_path: Path, model: tuple[ModelConfig, Arrays]) -> None:
    config, weights = model
    sharded(tmp_path, weights)
    assert len(weight_files(tmp_path)) == 3
    equal(read_weights(tmp_path, config), weights)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_widths_become_float32(tmp_path: Path, model: tuple[ModelConfig, Arrays], dtype: Any) -> None:
    config, weights = model
    others = {name: array.astype(dtype) for name, array in weights.items()}
    saved(tmp_path, others)
    equal(read_weights(tmp_path, config), {name: array.astype(np.float32) for name, array in others.items()})


def test_bfloat16_is_read_bit_by_bit(tmp_path: Path, model: tuple[ModelConfig, Arrays]) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    config, weights = model
    halves = {name: torch.from_numpy(array).to(torch.bfloat16) for name, array in weights.items()}
    save_torch(halves, tmp_path / HUB_WEIGHTS)
    equal(read_weights(tmp_path, config), {name: half.float().numpy() for name, half in halves.items()})


def test_a_tied_head_may_be_written_out_if_it_is_the_embedding(tmp_path: Path) -> None:
    config = tiny("gpt2")
    weights = random_weights(config, 3)
    embedding = weights["transformer.wte.weight"]
    saved(tmp_path, {**weights, "lm_head.weight": embedding})
    equal(read_weights(tmp_path, config), weights)
    saved(tmp_path, {**weights, "lm_head.weight": embedding + 1})
    with pytest.raises(UserError, match=r"lm_head\.weight that is not the token embedding, though its config\.json"):
        read_weights(tmp_path, config)


def test_arrays_that_do_not_fit_are_named(tmp_path: Path, model: tuple[ModelConfig, Arrays]) -> None:
    config, weights = model
    del weights["lm_head.weight"]
    weights["model.norm.weight"] = np.ones(7, np.float32)
    weights["model.layers.1.input_layernorm.weight"] = np.ones(16, np.int8)
    weights["score.weight"] = np.ones(2, np.float32)
    weights["embed_tokens.weight"] = weights["model.embed_tokens.weight"]
    saved(tmp_path, weights)
    with pytest.raises(UserError) as error:
        read_weights(tmp_path, config)
    message = str(error.value)
    for part in (
        "lm_head.weight is missing",
        "model.norm.weight has the shape (7,), not (16,)",
        "model.layers.1.input_layernorm.weight is of the type I8, which is none of F64, F32, F16, BF16",
        "score.weight is unexpected",
        "model.embed_tokens.weight is there twice",
    ):
        assert part in message
    assert "\n" not in message


def test_a_pickle_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(UserError, match=r"a pytorch_model\.bin is a pickle, which runs code when it is read"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/tmp/secret.safetensors",
        "a/b.safetensors",
        "..",
        "a.bin",
        "",
        7,
        None,
        "a\\b.safetensors",
    ],
)
def test_an_index_names_files_of_its_folder_alone(
    tmp_path: Path, model: tuple[ModelConfig, Arrays], shard: Any
) -> None:
    config, weights = model
    folder = tmp_path / "model"
    folder.mkdir()
    saved(tmp_path, weights, "secret.safetensors")
    write_index(folder, dict.fromkeys(weights, shard))
    with pytest.raises(UserError, match="which is no safetensors file of its folder"):
        read_weights(folder, config)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000])
def test_an_index_that_is_none_is_refused(tmp_path: Path, model: tuple[ModelConfig, Arrays], text: str) -> None:
    (tmp_path / HUB_INDEX).write_text(text)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json (cannot be read|has no weight_map)"):
        read_weights(tmp_path, model[0])


def test_an_index_that_is_wrong_is_refused(tmp_path: Path, model: tuple[ModelConfig, Arrays]) -> None:
    config, weights = model
    placed = sharded(tmp_path, weights, 2)
    first, second = sorted(set(placed.values()))
    name = next(key for key, file in placed.items() if file == first)
    write_index(tmp_path, {**placed, name: second})
    with pytest.raises(UserError, match=rf"has the array {name}, which .* does not place there"):
        read_weights(tmp_path, config)
    write_index(tmp_path, {**placed, "more": second})
    with pytest.raises(UserError, match=rf"{second} has no array more, which"):
        read_weights(tmp_path, config)
    (tmp_path / first).unlink()
    write_index(tmp_path, placed)
    with pytest.raises(UserError, match=rf"{first} is no readable safetensors file"):
        read_weights(tmp_path, config)


@settings(deadline=None)
@given(st.data())
def test_a_damaged_file_is_read_as_it_is_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    config = tiny("llama")
    saved(folder, random_weights(config, 3))
    whole = bytearray((folder / HUB_WEIGHTS).read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=4)):
        whole[place] = data.draw(st.integers(0, 255))
    (folder / HUB_WEIGHTS).write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    with contextlib.suppress(UserError):
        assert sorted(read_weights(folder, config)) == sorted(load_file(folder / HUB_WEIGHTS))


def test_endless_layers_are_refused_before_they_are_counted(tmp_path: Path, model: tuple[ModelConfig, Arrays]) -> None:
    config, weights = model
    saved(tmp_path, weights)
    with pytest.raises(UserError, match=r"arrays, too few for the 1000000000000 layers of its config\.json"):
        read_weights(tmp_path, config.model_copy(update={"num_hidden_layers": 10**12}))
