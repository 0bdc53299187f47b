"""The positions of a batch on their way into groups: each of them once, in its place, with little padding."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.engine import Batch
from models.torch_engine import packing
from tests.models.test_engine_documents import LENGTHS, assert_near, packed
from tests.models.test_engines import gradients, trainer
from tests.models.tiny import tiny

CPU = torch.device("cpu")


def documents(random: np.random.Generator, rows: int, length: int) -> Batch:
    begins_BT = random.random((rows, length)) < 0.2
    batch = packed([[length]] * rows)
    counted_BT = random.random((rows, length)) < random.random()
    return batch._replace(loss_mask_BT=counted_BT, documents_BT=begins_BT.cumsum(1, dtype=np.int32))


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 60), st.sampled_from([0, 50, 10**9]))
def test_every_position_that_a_loss_touches_stands_once_in_a_group(
    seed: int, rows: int, length: int, cost: int
) -> None:
    batch = documents(np.random.default_rng(seed), rows, length)
    assert batch.documents_BT is not None
    expected = [
        (row, place)
        for row in range(rows)
        for place in range(length)
        if (batch.loss_mask_BT[row, place:] & (batch.documents_BT[row, place:] == batch.documents_BT[row, place])).any()
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(packing._GROUP_COSTS, "cpu", cost)
        found = packing.contexts(batch.loss_mask_BT, batch.documents_BT)
        arranged, places_N = packing.arranged(batch.tokens_BT, found, True, CPU)
    assert packing.real_count(batch) == len(expected)
    assert sorted(divmod(int(place), length) for place in places_N) == expected
    assert sum(group.positions for group in arranged.groups) == len(expected)
    begin = 0
    for group in arranged.groups:
        (count, longest), places_P = group.size, group.places_P
        taken = torch.arange(count * longest) if places_P is None else places_P
        part = slice(begin, begin + group.positions)
        # The position of a token is its column, and all columns of a row are of one document.
        assert (arranged.positions_N[part] == taken % max(longest, 1)).all()
        numbers = batch.documents_BT.reshape(-1)[places_N[part]]
        for row in range(count):
            mine = (taken // max(longest, 1) == row).numpy()
            assert len(set(numbers[mine])) == 1
            assert (np.diff(places_N[part][mine]) == 1).all()
        begin += group.positions


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(0, 10**6))
def test_groups_waste_no_more_than_one_costs(lengths: list[int], cost: int) -> None:
    falling = np.sort(np.array(lengths, np.int64))[::-1]
    sizes = packing._group_sizes(falling, cost)
    assert sum(sizes) == len(lengths)
    for part in np.split(falling, np.cumsum(sizes)[:-1]):
        assert (int(part.max(initial=0)) ** 2 - part**2).sum() <= cost


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
@pytest.mark.parametrize("size", list(LENGTHS))
def test_how_documents_are_grouped_makes_no_difference(name: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = trainer("torch", tiny(name, max_position_embeddings=120))
    rows, found = packed(LENGTHS[size]), []
    for cost in (0, 1000, 10**9):
        monkeypatch.setitem(packing._GROUP_COSTS, "cpu", cost)
        found.append(gradients(engine, [rows]))
    assert_near(found[1], found[0])
    assert_near(found[2], found[0])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_documents_give_the_same_bits(precision: str) -> None:
    exported = []
    for _ in range(2):
        engine = trainer("torch", tiny("llama", max_position_embeddings=120), precision=precision)  # type: ignore[arg-type]
        for step in range(3):
            engine.step([packed(LENGTHS["long"], seed=step)], 1.0, step)
        exported.append({piece.name: piece.array.tobytes() for piece in engine.export("weights")})
    assert exported[0] == exported[1]
