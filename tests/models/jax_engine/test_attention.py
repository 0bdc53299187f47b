"""Attention in every way that it is computed, against a loop over positions."""

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

from models.engine import Layout
from models.jax_engine.attention import Kind, causal_attention, kind_for
from models.jax_engine.sharding import Sharding, sharding_of
from tests.models.tiny import tiny

Floats = NDArray[np.float32]
KINDS: list[Kind] = ["xla", "blocks", "splash_interpreted"]


def one_device() -> Sharding:
    return sharding_of(Layout(data=1), tiny("llama"), jax.devices()[:1])


def heads(rows: int, length: int, heads: int, groups: int, width: int = 16, seed: int = 0) -> list[Floats]:
    random = np.random.default_rng(seed)
    return [random.standard_normal((rows, length, count, width), np.float32) for count in (heads, groups, groups)]


def slow(q: Floats, k: Floats, v: Floats, documents: NDArray[np.int32] | None) -> Floats:
    """One position and head at a time, in fp64."""
    rows, length, count, width = q.shape
    found = np.zeros(q.shape)
    for row in range(rows):
        for place in range(length):
            seen = np.arange(length) <= place
            if documents is not None:
                seen &= documents[row] == documents[row, place]
            for head in range(count):
                group = head // (count // k.shape[2])
                scores = k[row, seen, group].astype(np.float64) @ q[row, place, head] / math.sqrt(width)
                weights = np.exp(scores - scores.max())
                found[row, place, head] = weights / weights.sum() @ v[row, seen, group]
    return found.astype(np.float32)


def attention_weights(q: Floats, k: Floats, documents: NDArray[np.int32]) -> Floats:
    """The weights themselves, (B, H, T, T): what is read of values that are 1 at one position and 0 elsewhere."""
    rows, length, count, width = q.shape
    found = np.empty((rows, count, length, length), np.float32)
    for place in range(length):
        values = np.zeros((rows, length, k.shape[2], width), np.float32)
        values[:, place] = 1
        found[..., place] = slow(q, k, values, documents)[..., 0].swapaxes(1, 2)
    return found


def documents_of(rows: int, length: int) -> NDArray[np.int32]:
    ends = np.random.default_rng(5).random((rows, length)) < 0.05
    return ends.cumsum(1, dtype=np.int32)


@pytest.mark.parametrize("in_documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_positions_read_what_they_may(kind: Kind, groups: int, in_documents: bool) -> None:
    q, k, v = heads(2, 128, 4, groups)
    documents = documents_of(2, 128) if in_documents else None
    on_device = None if documents is None else jnp.asarray(documents)
    found = causal_attention(
        jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), on_device, kind=kind, sharding=one_device()
    )
    np.testing.assert_allclose(found, slow(q, k, v, documents), atol=2e-6)


@pytest.mark.parametrize("in_documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("kind", ["blocks", "splash_interpreted"])
def test_gradients_are_those_of_plain_attention(kind: Kind, in_documents: bool) -> None:
    parts = [jnp.asarray(part) for part in heads(2, 256, 4, 2)]
    documents = jnp.asarray(documents_of(2, 256)) if in_documents else None
    weights = jax.random.normal(jax.random.key(1), parts[0].shape)

    def total(kind: Kind, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return (causal_attention(q, k, v, documents, kind=kind, sharding=one_device()) * weights).sum()

    found, expected = (jax.grad(total, argnums=(1, 2, 3))(way, *parts) for way in (kind, "xla"))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("length", [1, 63, 65, 300, 513])
def test_blocks_cover_rows_of_any_length(length: int) -> None:
    q, k, v = map(jnp.asarray, heads(1, length, 2, 1, width=8))
    ways: list[Kind] = ["blocks", "xla"]
    found, expected = (causal_attention(q, k, v, None, kind=kind, sharding=one_device()) for kind in ways)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_blocks_of_bf16_heads_have_an_fp32_softmax() -> None:
    q, k, v = (jnp.asarray(part, jnp.bfloat16) for part in heads(2, 128, 4, 2))
    found = causal_attention(q, k, v, None, kind="blocks", sharding=one_device())
    exact = slow(np.asarray(q, np.float32), np.asarray(k, np.float32), np.asarray(v, np.float32), None)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=2e-2)


def test_dropped_weights_are_those_of_the_key() -> None:
    q, k, v = heads(2, 9, 4, 2)
    documents, key, rate = documents_of(2, 9), jax.random.key(3), 0.25
    found = causal_attention(
        *map(jnp.asarray, (q, k, v, documents)), kind="xla", sharding=one_device(), dropout=rate, key=key
    )
    kept = np.asarray(jax.random.bernoulli(key, 1 - rate, (2, 2, 2, 9, 9))).reshape(2, 4, 9, 9)
    assert 0.7 < kept.mean() < 0.8
    weights = attention_weights(q, k, documents) * kept / (1 - rate)
    expected = np.einsum("bhts,bshk->bthk", weights, v.repeat(2, axis=2))
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (("cpu", jnp.float32, 64, 1024, 0.0, True), "blocks"),
        (("cpu", jnp.float32, 64, 1024, 0.1, False), "xla"),
        (("tpu", jnp.bfloat16, 64, 1024, 0.0, True), "splash"),
        (("tpu", jnp.bfloat16, 64, 1024, 0.1, False), "xla"),
        (("tpu", jnp.bfloat16, 64, 100, 0.0, False), "xla"),
        (("cudnn", jnp.bfloat16, 64, 1024, 0.0, False), "cudnn"),
        (("gpu", jnp.bfloat16, 64, 1024, 0.0, False), "xla"),
        (("cudnn", jnp.bfloat16, 64, 1024, 0.0, True), "xla"),
        (("cudnn", jnp.float32, 64, 1024, 0.0, False), "xla"),
        (("cudnn", jnp.bfloat16, 60, 1024, 0.0, False), "xla"),
    ],
    ids=str,
)
def test_the_way_follows_from_platform_and_shapes(given: tuple[Any, ...], kind: Kind) -> None:
    assert kind_for(given[0], jnp.dtype(given[1]), *given[2:]) == kind
