"""Preference tuning with the PyTorch engine: `models.preference` on packed rows.

The gradient of a pair's loss −log σ(z) is that of a cross-entropy whose targets weigh beta · σ(−z) in the chosen row,
and as much less than nothing in the rejected one. So the head is gone through twice, for the log-probabilities and
then with those weights, but the blocks once: dropout drops the same for both.

M read positions, B rows, T positions, P = B / 2 pairs.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models import weights
from models.config import ModelConfig
from models.engine import Batch
from models.preference import pairs_that_count
from models.torch_engine.head import summed_loss, target_log_probabilities
from models.torch_engine.model import Transformer
from models.torch_engine.packing import Packed, on_device
from models.torch_engine.parallel import End, Ended, Parallel
from models.torch_engine.world import World
from models.weights import Piece


class Pairs(NamedTuple):
    """How the read positions of packed rows stand in them."""

    places_M: Tensor
    """int64; row · T + position."""
    shape: tuple[int, int]
    """(B, T)."""
    counted_P: Tensor
    """fp32; 1 where a pair counts, else 0."""

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> "Pairs":
        """Of a batch whose rows are all packed."""
        counted_P = on_device(pairs_that_count(batch).astype(np.float32), device)
        rows, length = batch.tokens_BT.shape
        return cls(on_device(np.flatnonzero(batch.loss_mask_BT), device), (rows, length), counted_P)

    def summed(self, values_M: Tensor) -> Tensor:
        """Sums over rows, (B,), that come out the same each time: `index_add` would add in any order on a GPU."""
        rows, length = self.shape
        return values_M.new_zeros(rows * length).index_copy(0, self.places_M, values_M).view(rows, length).sum(1)

    def spread(self, values_P2: Tensor) -> Tensor:
        """Each read position's row's value, (M,)."""
        return values_P2.flatten()[self.places_M // self.shape[1]]


def log_probabilities(pairs: Pairs) -> End:
    """The end that finds the rows' log-probabilities, (B,), without a gradient."""

    def end(x_MD: Tensor, head_VD: Tensor, targets_M: Tensor) -> Ended:
        found_B = pairs.summed(target_log_probabilities(x_MD.detach(), head_VD.detach(), targets_M))
        return Ended(found_B.sum(), found_B)

    return end


def preference(pairs: Pairs, reference_B: Tensor, beta: float, scale: float) -> End:
    """The end whose loss has the gradients of the pairs' losses times `scale`; it finds the figures' sums times it.

    reference_B: the reference's log-probabilities of the rows.
    """

    def end(x_MD: Tensor, head_VD: Tensor, targets_M: Tensor) -> Ended:
        policy_B = log_probabilities(pairs)(x_MD, head_VD, targets_M).found
        rewards_P2 = (beta * (policy_B - reference_B)).view(-1, 2)
        margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
        weights_P = beta * torch.sigmoid(-margins_P) * pairs.counted_P
        weights_M = pairs.spread(torch.stack([weights_P, -weights_P], 1))
        loss = summed_loss(x_MD, head_VD, targets_M, scale, weights_M)
        losses_P = torch.nn.functional.softplus(-margins_P)
        figures_PF = torch.stack([losses_P, (margins_P > 0).float(), *rewards_P2.unbind(1)], 1)
        return Ended(loss, (figures_PF * pairs.counted_P[:, None]).sum(0) * scale)

    return end


class Reference:
    """The model that preferences are measured against, as it was given."""

    def __init__(self, config: ModelConfig, compute: torch.dtype, world: World, device: torch.device) -> None:
        with torch.device(device):
            model = Transformer(config, compute).requires_grad_(False).eval()
        self._parallel = Parallel(model, world, frozen=True)

    def load(self, pieces: Iterable[Piece]) -> None:
        """Takes over canonical weights; ValueError names what is missing, unexpected or misshapen."""
        self._parallel.load(weights.gather(pieces, weights.canonical_shapes(self._parallel.model.config)))

    @torch.no_grad()
    def log_probabilities(self, part: Packed, pairs: Pairs) -> Tensor:
        """The rows' log-probabilities, (B,)."""
        found_B = self._parallel.evaluated(part, log_probabilities(pairs)).found
        self._parallel.settle()
        return found_B
