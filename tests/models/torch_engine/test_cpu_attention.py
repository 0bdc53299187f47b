"""Every way of attending on a CPU against PyTorch's own, forwards and backwards."""

from collections.abc import Callable

import pytest
import torch

from models.torch_engine import cpu_attention
from models.torch_engine.cpu_attention import block_attention, causal_attention, short_attention

Way = Callable[..., torch.Tensor]


def heads(groups: int, length: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Queries, keys and values as the engine has them: (B, T, J, K), seen as (B, J, T, K)."""
    torch.manual_seed(0)
    together = torch.randn(2, length, 4 + 2 * groups, 6).to(dtype).transpose(1, 2).requires_grad_()
    return [together, *torch.split(together, [4, groups, groups], 1)]


def read(way: Way, groups: int, length: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """What is read, and the gradient of it all."""
    together, q, k, v = heads(groups, length, dtype)
    mixed = way(q, k, v)
    weights = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((mixed * weights).sum(), together)
    return [mixed.detach(), gradient]


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 9, 128, 129, 300])
@pytest.mark.parametrize("way", [short_attention, block_attention, causal_attention])
def test_it_is_that_of_pytorch(way: Way, length: int, groups: int) -> None:
    found = read(lambda q, k, v: way(q, k, v, 0.0), groups, length)
    torch.testing.assert_close(found, read(expected, groups, length), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("length", [48, 49, 512, 513, 1024, 1025])
def test_every_length_has_a_way(length: int, groups: int) -> None:
    exact = read(expected, groups, length)
    found = read(lambda q, k, v: causal_attention(q, k, v, 0.0), groups, length)
    torch.testing.assert_close(found, exact, atol=2e-6, rtol=2e-5)
    rough = read(lambda q, k, v: causal_attention(q, k, v, 0.0), groups, length, torch.bfloat16)
    for one, other in zip(rough, exact, strict=True):
        assert float((one.float() - other).norm() / other.norm()) < 0.01


@pytest.mark.parametrize("way", [short_attention, block_attention])
def test_dropout_drops_weights_and_keeps_their_sum(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "_BLOCK", 32)
    _, q, k, _ = heads(2, 100)
    ones = torch.ones(2, 2, 100, 6)
    with torch.no_grad():
        sums = way(q, k, ones, 0.25)
    assert float((sums - 1).abs().max()) > 0.1
    # Where there is much to read, as much is dropped as is enlarged.
    assert float(sums[:, :, 50:].mean()) == pytest.approx(1, abs=0.05)
