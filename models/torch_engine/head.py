"""The output head together with its cross-entropy, a part of the positions at a time.

The logits of a batch are its largest array by far: 4,096 positions of a vocabulary of 8,192 are 134 MB in fp32, and
softmax and gradients as much again. Here no more than some megabytes of them exist at once.

M read positions, C those of a part, D hidden_size, V vocab_size.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_LOGITS = {"cpu": 1 << 21, "cuda": 1 << 27, "mps": 1 << 25}
"""Logits that are computed at a time: 8 MB in fp32, 512 MB on a GPU, or 128 MB where it shares the memory."""
_POSITIONS = {"cpu": 256, "cuda": 2048, "mps": 1024}
"""Positions that are, even so: each part adds to the gradient of the whole head."""


def target_log_probabilities(x_MD: Tensor, head_VD: Tensor, targets_M: Tensor) -> Tensor:
    """The log-probability of each target, (M,) in fp32, without a gradient."""
    found_M = torch.empty(len(x_MD), device=x_MD.device)
    for part, logits_CV in _logits(x_MD, head_VD):
        found_M[part] = _log_probabilities(logits_CV, targets_M[part])
    return found_M


def target_scores(x_MD: Tensor, head_VD: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and whether each target is the likeliest token, of equals the first: (M,) boolean."""
    found_M = torch.empty(len(x_MD), device=x_MD.device)
    greedy_M = torch.empty(len(x_MD), device=x_MD.device, dtype=torch.bool)
    for part, logits_CV in _logits(x_MD, head_VD):
        found_M[part] = _log_probabilities(logits_CV, targets_M[part])
        greedy_M[part] = logits_CV.argmax(-1) == targets_M[part]
    return found_M, greedy_M


def summed_loss(
    x_MD: Tensor, head_VD: Tensor, targets_M: Tensor, scale: float, weights_M: Tensor | None = None
) -> Tensor:
    """The sum of the targets' cross-entropies times `scale`, a 0-d fp32 tensor.

    x_MD: normed hidden states in the dtype of the products; head_VD: the fp32 parameter; weights_M: fp32, how much
    each target counts; None for 1.
    """
    if not torch.is_grad_enabled():
        logs_M = target_log_probabilities(x_MD, head_VD, targets_M)
        return -(logs_M if weights_M is None else logs_M * weights_M).sum() * scale
    loss: Tensor = _SummedLoss.apply(x_MD, head_VD, targets_M, scale, weights_M)  # type: ignore[no-untyped-call]
    return loss


class _SummedLoss(torch.autograd.Function):
    """Takes the gradients on the way forward, while a part's logits are there."""

    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, head_VD: Tensor, targets_M: Tensor, scale: float, weights_M: Tensor | None
    ) -> Tensor:
        cast_VD = head_VD.to(x_MD.dtype)
        dx_MD = torch.empty_like(x_MD)
        dhead_VD = torch.zeros_like(head_VD) if ctx.needs_input_grad[1] else None
        total, nothing = torch.zeros((), device=x_MD.device), x_MD.new_zeros(())
        for part in _parts(x_MD, head_VD):
            x_CD, targets_C1 = x_MD[part], targets_M[part].unsqueeze(1)
            logs_CV = torch.log_softmax(x_CD @ cast_VD.T, -1, dtype=torch.float32)
            chosen_C1 = logs_CV.gather(1, targets_C1)
            total -= (chosen_C1 if weights_M is None else chosen_C1 * weights_M[part].unsqueeze(1)).sum()
            # The gradient by the logits: the probabilities, less 1 at the target.
            dlogits_CV = logs_CV.exp_().scatter_add_(
                1, targets_C1, torch.full_like(targets_C1, -1, dtype=torch.float32)
            )
            if weights_M is not None:
                dlogits_CV *= weights_M[part].unsqueeze(1)
            dlogits_CV = dlogits_CV.to(x_MD.dtype)
            # Scaled in the products' fp32 sums, before bf16 rounds them.
            dx_MD[part] = torch.addmm(nothing, dlogits_CV, cast_VD, beta=0, alpha=scale)
            if dhead_VD is None:
                continue
            if x_MD.dtype == torch.float32:
                dhead_VD.addmm_(dlogits_CV.T, x_CD, alpha=scale)
            else:
                dhead_VD.add_(dlogits_CV.T @ x_CD, alpha=scale)
        ctx.save_for_backward(dx_MD, dhead_VD)
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        dx_MD, dhead_VD = ctx.saved_tensors
        return dx_MD * gradient.to(dx_MD.dtype), None if dhead_VD is None else dhead_VD * gradient, None, None, None


def _logits(x_MD: Tensor, head_VD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Parts of the positions, and the logits (C, V) of each."""
    cast_VD = head_VD.to(x_MD.dtype)
    return ((part, x_MD[part] @ cast_VD.T) for part in _parts(x_MD, head_VD))


def _log_probabilities(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    logs_CV = torch.log_softmax(logits_CV, -1, dtype=torch.float32)
    return logs_CV.gather(1, targets_C.unsqueeze(1)).squeeze(1)


def _parts(x_MD: Tensor, head_VD: Tensor) -> Iterator[slice]:
    place = x_MD.device.type
    size = max(_POSITIONS[place], _LOGITS[place] // len(head_VD))
    return (slice(start, start + size) for start in range(0, len(x_MD), size))
