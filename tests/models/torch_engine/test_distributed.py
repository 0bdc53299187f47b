"""Training in several processes is training in one: DDP, FSDP2 and both, over gloo on the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from models.engine import Layout
from tests.models.tiny import COMPOSITIONS, Arrays, batch, cut, tiny
from tests.models.training import bigrams

torch = pytest.importorskip("torch")

from models.torch_engine.parallel import cross_entropy  # noqa: E402  # only where torch is
from models.torch_engine.world import World, divided  # noqa: E402  # only where torch is
from tests.models.torch_engine import together  # noqa: E402

Found = tuple[dict[str, Any], Arrays]
# Every composition in both ways, and each with the other optimizer.
TWO = [
    f"train:{name}:{('adamw', 'muon')[(place + turn) % 2]}:{way}"
    for place, name in enumerate(COMPOSITIONS)
    for turn, way in enumerate(("data", "fsdp2"))
]
TWO += [
    "train:mixtral:adamw:remade",
    "train:gpt2:muon:remade-fsdp2",
    "restore:data",
    "restore:fsdp2",
    "skip:fsdp2",
    "dropout:mixtral:muon:data",
    "dropout:gpt2:adamw:fsdp2",
    "lora:llama:adamw:data",
    "lora:gpt2:adamw:fsdp2",
    "lora:mixtral:adamw:remade-fsdp2",
]
PAIRS = ["pairs:gpt2:0:data", "pairs:mixtral:0:fsdp2", "pairs:llama:0.3:data", "pairs:gpt2:0.3:fsdp2"]
PAIRS += ["lora-pairs:gpt2:0:data", "lora-pairs:llama:0.3:fsdp2"]
TWO += PAIRS
FOUR = [
    "train:llama:muon:fsdp2",
    "train:mixtral:muon:fsdp4",
    "train:gpt2:adamw:fsdp4",
    "train:custom:adamw:data",
    "restore:data",
    "restore:fsdp4",
    "restore:fsdp2",
    "skip:fsdp4",
    "dropout:gpt2:adamw:data",
    "dropout:mixtral:muon:fsdp2",
    "lora:llama:adamw:fsdp2",
    "lora:gpt2:adamw:fsdp4",
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Found]:
    """What two processes and four came to, started once each."""
    folder = tmp_path_factory.mktemp("together")
    results: dict[tuple[int, str], Found] = {}
    for count, names in ((2, TWO), (4, FOUR)):
        results |= {
            (count, name): result for name, result in together.together(folder / str(count), count, names).items()
        }
    return results


@pytest.fixture(scope="module")
def alone() -> dict[str, Found]:
    return {}


def by_one(alone: dict[str, Found], name: str) -> Found:
    kind, composition, optimizer, _ = name.split(":")
    name = f"{kind}:{composition}:{optimizer}:alone"
    if name not in alone:
        alone[name] = together.do(name)
    return alone[name]


def assert_gradients_agree(one: Arrays, other: Arrays) -> None:
    names = [name for name in one if name.startswith("gradient ")]
    whole = float(np.sqrt(sum((one[name] ** 2).sum() for name in names)))
    for name in names:
        difference = float(np.linalg.norm(one[name] - other[name]))
        assert difference <= 1e-4 * max(float(np.linalg.norm(one[name])), 1e-3 * whole), name


TRAINED = ("train:", "dropout:", "lora:")
CASES = [(2, name) for name in TWO if name.startswith(TRAINED)] + [
    (4, name) for name in FOUR if name.startswith(TRAINED)
]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "name"), CASES)
def test_losses_are_those_of_one_process(
    found: dict[tuple[int, str], Found], alone: dict[str, Found], count: int, name: str
) -> None:
    (expected, arrays), (seen, parts) = by_one(alone, name), found[count, name]
    tolerance = 1e-4 if ":muon:" in name else 1e-5
    np.testing.assert_allclose(seen["losses"], expected["losses"], atol=tolerance, rtol=0)
    np.testing.assert_allclose(seen["norms"], expected["norms"], rtol=1e-3)
    assert seen["loss"][1] == expected["loss"][1]
    assert seen["loss"][0] / seen["loss"][1] == pytest.approx(expected["loss"][0] / expected["loss"][1], abs=tolerance)
    assert seen["written"] == expected["written"]
    assert seen["device"] == f"{count} × cpu"
    assert_gradients_agree(arrays, parts)
    assert parts.keys() == arrays.keys()
    assert all(parts[part].shape == array.shape for part, array in arrays.items())
    assert int(parts["updates"]) == together.STEPS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "name"),
    [(2, "restore:data"), (2, "restore:fsdp2"), (4, "restore:data"), (4, "restore:fsdp4"), (4, "restore:fsdp2")],
)
def test_what_is_restored_is_what_was_given_and_a_step_repeats(
    found: dict[tuple[int, str], Found], count: int, name: str
) -> None:
    seen, _ = found[count, name]
    assert seen["same"]
    assert seen["results"][0] == seen["results"][1]
    assert seen["other"] != seen["results"][0][0]
    assert seen["updates"] == 6


@pytest.mark.slow
@pytest.mark.parametrize(("count", "name"), [(2, "skip:fsdp2"), (4, "skip:fsdp4")])
def test_all_skip_what_is_not_finite_in_one(found: dict[tuple[int, str], Found], count: int, name: str) -> None:
    assert found[count, name][0] == {"skipped": 1.0, "unchanged": True}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_preferred_as_by_one_process(found: dict[tuple[int, str], Found], name: str) -> None:
    (told, arrays), (told_alone, arrays_alone) = found[2, name], together.do(name.rpartition(":")[0] + ":alone")
    for key, values in told_alone.items():
        np.testing.assert_allclose(told[key], values, atol=1e-4, err_msg=key)
    assert_gradients_agree(arrays, arrays_alone)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    for name in ("whole", "parts"):
        bigrams.write_chain(tmp_path / name / "train", masked=True)
        bigrams.write_chain(tmp_path / name / "validation", shards=1, seed=1, masked=True)
    whole, arrays = together.do(f"loop:alone:{tmp_path / 'whole'}:")
    first, _ = together.do(f"loop:alone:{tmp_path / 'parts'}:7")
    second_name, third_name = f"loop:data:{tmp_path / 'parts'}:8", f"loop:fsdp2:{tmp_path / 'parts'}:"
    second, _ = together.together(tmp_path / "two", 2, [second_name])[second_name]
    third, parts = together.together(tmp_path / "four", 4, [third_name])[third_name]
    assert [first["interrupted"], second["interrupted"], third["interrupted"]] == [7, 15, None]
    assert [second["notes"][0], third["notes"][0]] == [
        "going on from the checkpoint of step 7",
        "going on from the checkpoint of step 15",
    ]
    assert second["told_by_others"] == third["told_by_others"] == 0
    assert first["seen"] + second["seen"] + third["seen"] == whole["seen"]
    np.testing.assert_allclose(third["losses"], whole["losses"], atol=1e-5, rtol=0)
    for name, array in arrays.items():
        np.testing.assert_allclose(parts[name], array, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_rematerialized_gradients_are_the_same(name: str, dropout: float) -> None:
    """Bit for bit: the same operations in the same order, with the same random numbers."""
    config = tiny(name, dropout=dropout)
    one, other = (together.engine_for(config, together.MUON, layout) for layout in ("alone", "remade"))
    for rows in ([batch()], cut(batch(), 2)):
        expected, found = ({piece.name: piece.array for piece in engine.gradients(rows, 4)} for engine in (one, other))
        assert expected.keys() == found.keys()
        for part, array in expected.items():
            np.testing.assert_array_equal(found[part], array, err_msg=part)
    assert all(mixture.routing is None for mixture in other._model.mixtures())


def test_a_rematerialized_block_remembers_its_input_alone() -> None:
    """What autograd keeps of the forward pass, counted in bytes."""
    kept = {}
    for layout in ("alone", "remade"):
        engine = together.engine_for(tiny("llama", num_hidden_layers=6), together.ADAMW, layout)
        engine._model.train()
        sizes: dict[int, int] = {}

        def keep(tensor: Any, sizes: dict[int, int] = sizes) -> Any:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {parameter.untyped_storage().data_ptr() for parameter in engine._model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            engine._parallel.trained(engine._packed(batch(rows=32, length=20, padded=False)), cross_entropy(1.0))
        kept[layout] = sum(size for place, size in sizes.items() if place not in weights)
    assert kept["remade"] < 0.4 * kept["alone"]


@pytest.mark.parametrize(
    ("layout", "processes", "message"),
    [
        (Layout(tensor=2), 1, r"layout\.tensor 2: engine 'torch' does not .* use layout\.fsdp, or engine: jax"),
        (Layout(fsdp=2), 1, r"fsdp 2 does not fit 1 process; set layout\.processes to 2 or a multiple of it"),
        (Layout(fsdp=3), 4, r"fsdp 3 does not fit 4 processes; set layout\.processes to 3 or a multiple of it"),
        (Layout(data=2, fsdp=2), 2, r"data 2 × fsdp 2 does not fit 2 processes; set layout\.processes to 4"),
        (Layout(data=2), 4, r"data 2 × fsdp 1 does not fit 4 processes; set layout\.processes to 2$"),
    ],
)
def test_layouts_that_do_not_fit_say_what_would(layout: Layout, processes: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        divided(layout, processes)


def test_layouts_that_fit() -> None:
    assert divided(Layout(), 1) == (1, 1)
    assert divided(Layout(), 4) == (4, 1)
    assert divided(Layout(fsdp=2), 4) == (2, 2)
    assert divided(Layout(data=1, fsdp=4), 4) == (1, 4)


@pytest.mark.parametrize("at_a_time", [1, 2])
@pytest.mark.parametrize(("groups", "size"), [(7, 4), (3, 4), (8, 2), (0, 2)])
def test_every_row_is_somebodys(groups: int, size: int, at_a_time: int) -> None:
    whole = batch(rows=groups * at_a_time)
    parts = [World(rank, size, 1, None).rows(whole, at_a_time) for rank in range(size)]
    np.testing.assert_array_equal(np.concatenate([part.tokens_BT for part in parts]), whole.tokens_BT)
    sizes = [len(part.tokens_BT) for part in parts]
    assert max(sizes) - min(sizes) <= at_a_time
    assert not any(size % at_a_time for size in sizes)
