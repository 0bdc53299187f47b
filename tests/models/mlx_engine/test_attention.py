"""Attention against one query at a time: grouped heads, documents, and the way that dropout takes."""

import numpy as np
import pytest

pytest.importorskip("models.mlx_engine")

import mlx.core as mx  # only where MLX is

from models.mlx_engine.attention import Attention, row_places
from models.mlx_engine.layers import dropped, split_keys
from tests.models.tiny import tiny

LENGTH = 9
DOCUMENTS = np.array([[0] * 4 + [1] * 5, [3] * 9], np.int32)


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, documents: np.ndarray | None) -> np.ndarray:
    """(B, H, T, K), one query at a time."""
    found = np.zeros_like(q)
    share = q.shape[1] // k.shape[1]
    for row, head, place in np.ndindex(q.shape[:3]):
        seen = np.arange(LENGTH) <= place
        if documents is not None:
            seen &= documents[row] == documents[row, place]
        scores = k[row, head // share, seen] @ q[row, head, place] / np.sqrt(q.shape[-1])
        powers = np.exp(scores - scores.max())
        found[row, head, place] = powers @ v[row, head // share, seen] / powers.sum()
    return found


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("rate", [0.0, 1e-12], ids=["kernel", "dropout"])
def test_positions_read_what_they_may(documents: np.ndarray | None, rate: float) -> None:
    attention = Attention(tiny("llama", dropout=rate))
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((2, heads, LENGTH, 6), np.float32) for heads in (4, 2, 2))
    places = row_places(None if documents is None else mx.array(documents), None)
    keys = mx.random.split(mx.random.key(0), 2)
    found = attention._mixed(mx.array(q), mx.array(k), mx.array(v), places.mask_BHTT, keys)
    np.testing.assert_allclose(np.array(found), reference(q, k, v, documents), atol=1e-5)


def test_what_is_dropped_in_a_row_does_not_depend_on_those_beside_it() -> None:
    keys = mx.random.split(mx.random.key(7), 6)
    x = mx.random.normal((6, 50, 40), key=mx.random.key(1))
    whole = dropped(x, 0.3, keys)
    for rows in (slice(0, 1), slice(2, 6)):
        assert mx.array_equal(dropped(x[rows], 0.3, keys[rows]), whole[rows])
    kept = np.array(whole != 0)
    assert kept.mean() == pytest.approx(0.7, abs=0.02)
    assert not (kept[0] == kept[1]).all()
    np.testing.assert_allclose(np.array(whole)[kept], np.array(x)[kept] / 0.7, rtol=1e-6)
    first, second = split_keys(keys, 2)
    assert not mx.array_equal(dropped(x, 0.3, first), dropped(x, 0.3, second))
    assert dropped(x, 0.3, None) is x
