"""Continuations without their padding: every target still sees its prefix and its own document up to itself."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from models.continuations import continuations
from models.engine import Batch
from tests.models.tiny import VOCABULARY, tiny


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 10), st.booleans(), st.floats(0, 1))
def test_each_target_sees_its_prefix_and_its_own_document(
    seed: int, rows: int, length: int, several: bool, share: float
) -> None:
    random = np.random.default_rng(seed)
    tokens_BT, targets_BT = random.integers(0, VOCABULARY, (2, rows, length), dtype=np.int32)
    documents_BT = (random.random((rows, length)) < 0.4).cumsum(1, dtype=np.int32)
    mask_BT, lengths_B = random.random((rows, length)) < share, random.integers(1, 12, rows)
    batch = Batch(tokens_BT, targets_BT, mask_BT, documents_BT if several else None)
    found, known = continuations(batch, lengths_B, tiny("gpt2")), int(lengths_B.max()) + 1
    mask_BSU = found.mask_BSU(lengths_B, known)
    assert mask_BSU.any(-1).all()
    assert len(found.targets_M) == mask_BT.sum()
    for number, (row, place) in enumerate(np.argwhere(mask_BT)):
        assert found.rows_M[number] == row
        assert found.targets_M[number] == targets_BT[row, place]
        seen_U = mask_BSU[row, found.places_M[number]]
        assert np.flatnonzero(seen_U[:known]).tolist() == list(range(lengths_B[row]))
        own = [at for at in range(place + 1) if not several or documents_BT[row, at] == documents_BT[row, place]]
        assert found.tokens_BS[row][seen_U[known:]].tolist() == tokens_BT[row, own].tolist()
        assert found.positions_BS[row][seen_U[known:]].tolist() == [lengths_B[row] + at for at in range(len(own))]
    # Nothing is left that no target sees.
    real_BS = found.documents_BS >= 0
    seen = [mask_BSU[row, place, known:] for row, place in zip(found.rows_M, found.places_M, strict=True)]
    for row in range(rows):
        of_row = [one for one, at in zip(seen, found.rows_M, strict=True) if at == row]
        assert (np.any(of_row, axis=0) if of_row else np.zeros_like(real_BS[row])).tolist() == real_BS[row].tolist()


def test_what_is_found_goes_back_to_where_the_targets_stood() -> None:
    mask_BT = np.array([[False, True, False], [True, False, True]])
    batch = Batch(np.ones((2, 3), np.int32), np.ones((2, 3), np.int32), mask_BT)
    scored = continuations(batch, np.array([1, 2]), tiny("gpt2")).scored(
        np.array([-1, -2, -3], np.float32), np.array([True, False, True])
    )
    assert scored.log_probabilities_BT.tolist() == [[0, -1, 0], [-2, 0, -3]]
    assert scored.greedy_BT.tolist() == [[False, True, False], [False, False, True]]
