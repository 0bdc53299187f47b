"""The head's loss in parts, against PyTorch's over all logits at once."""

import pytest
import torch

from models.torch_engine import head

PARTS = [1, 5, 256]
"""Positions at a time."""


def inputs(positions: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(positions, 6).to(dtype).requires_grad_()
    return x, torch.randn(11, 6).requires_grad_(), torch.randint(0, 11, (positions,))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("positions", [0, 1, 23])
def test_losses_and_gradients_are_those_of_pytorch(part: int, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head._LOGITS, "cpu", 1)
    monkeypatch.setitem(head._POSITIONS, "cpu", part)
    x, weight, targets = inputs(positions, torch.float32)
    whole = 0.3 * torch.nn.functional.cross_entropy(x @ weight.T, targets, reduction="sum")
    loss = head.summed_loss(x, weight, targets, 0.3)
    torch.testing.assert_close(loss, whole)
    # Gradients of something that the loss is only a part of.
    found, expected = (torch.autograd.grad(2 * value + 1, (x, weight)) for value in (loss, whole))
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(head.summed_loss(x, weight, targets, 0.3), whole)
        logs = head.target_log_probabilities(x, weight, targets)
    torch.testing.assert_close(-0.3 * logs.sum(), whole)


@pytest.mark.parametrize("part", PARTS)
def test_bf16_is_as_near_to_fp32_as_that_of_pytorch(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head._LOGITS, "cpu", 1)
    monkeypatch.setitem(head._POSITIONS, "cpu", part)
    x, weight, targets = inputs(50, torch.bfloat16)
    exact = torch.nn.functional.cross_entropy(x.float() @ weight.bfloat16().float().T, targets, reduction="sum") / 50
    theirs = torch.nn.functional.cross_entropy((x @ weight.bfloat16().T).float(), targets, reduction="sum") / 50
    ours = head.summed_loss(x, weight, targets, 1 / 50)
    gradients = [torch.autograd.grad(loss, (x, weight)) for loss in (exact, theirs, ours)]
    for best, other, found in zip(*gradients, strict=True):
        assert found.dtype == best.dtype
        error, allowed = (float((value - best).float().norm()) for value in (found, other))
        assert error < 1.5 * allowed + 1e-6


@pytest.mark.parametrize("part", PARTS)
def test_the_likeliest_of_equals_is_the_first(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head._LOGITS, "cpu", 1)
    monkeypatch.setitem(head._POSITIONS, "cpu", part)
    torch.manual_seed(0)
    x, weight = torch.randint(-2, 3, (50, 2)).float(), torch.randint(-2, 3, (11, 2)).float()
    targets = torch.randint(0, 11, (50,))
    logits = (x @ weight.T).numpy()  # whole numbers: many are equal
    targets[:25] = torch.from_numpy(logits[:25].argmax(-1))
    logs, greedy = head.target_scores(x, weight, targets)
    assert torch.equal(greedy, torch.from_numpy(logits.argmax(-1)) == targets)
    assert (greedy.numpy() < (logits[range(50), targets] == logits.max(-1))).any()
    assert torch.equal(logs, head.target_log_probabilities(x, weight, targets))


def test_large_logits_overflow_nothing() -> None:
    x, weight, targets = inputs(4, torch.float32)
    loss = head.summed_loss(x * 1e4, weight, targets, 1.0)
    assert torch.isfinite(
        torch.stack([loss, *(part.abs().sum() for part in torch.autograd.grad(loss, (x, weight)))])
    ).all()
