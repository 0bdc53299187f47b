"""Causal attention on a CPU, in the way that is fastest for the length of the rows.

B rows, T positions, H heads, G key-value heads, R = H / G, K head_dim, X = B · H, Y = B · G.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from models.torch_engine.dropout import Share, dropped

_SHORT = 48
"""Positions up to which a row is one product."""
_BLOCK = 128
"""Queries of one product in longer rows."""
_LONGEST_IN_BLOCKS = {torch.float32: 512, torch.bfloat16: 1024}
"""Positions up to which such blocks beat PyTorch's fused attention, which keeps no weights for the way back."""


def causal_attention(
    q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, dropout: float, share_B: Share | None = None
) -> Tensor:
    """What each position reads of those up to itself, (B, H, T, K), with weights dropped at the rate `dropout`; the
    share is that of the rows, where other processes have more of them."""
    length, dtype = q_BHTK.shape[2], q_BHTK.dtype
    if length <= _SHORT:
        return short_attention(q_BHTK, k_BGTK, v_BGTK, dropout, share_B)
    # The fused one has no dropout: PyTorch would write out all weights at once instead.
    if dropout or length <= _LONGEST_IN_BLOCKS[dtype]:
        return block_attention(q_BHTK, k_BGTK, v_BGTK, dropout, share_B)
    # PyTorch's bf16 kernel for CPUs goes backwards several times slower than its fp32 one.
    q_BHTK, k_BGTK, v_BGTK = (x.float() for x in (q_BHTK, k_BGTK, v_BGTK))
    grouped = q_BHTK.shape[1] != k_BGTK.shape[1]
    return F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, is_causal=True, enable_gqa=grouped).to(dtype)


def short_attention(
    q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, dropout: float, share_B: Share | None = None
) -> Tensor:
    """Causal attention by one product over all positions.

    Scores are kept as (key, query) and normalised over the first of them, because PyTorch's softmax over a last
    dimension of odd length is several times slower.
    """
    rows, heads, length, width = q_BHTK.shape
    if k_BGTK.shape[1] != heads:
        repeats = heads // k_BGTK.shape[1]
        k_BGTK, v_BGTK = k_BGTK.repeat_interleave(repeats, 1), v_BGTK.repeat_interleave(repeats, 1)
    q_XTK, k_XTK, v_XTK = (x.reshape(rows * heads, length, width) for x in (q_BHTK, k_BGTK, v_BGTK))
    later = torch.full((length, length), -math.inf, dtype=q_BHTK.dtype).tril(-1)
    weights = torch.baddbmm(later, k_XTK, q_XTK.transpose(1, 2), alpha=1 / math.sqrt(width)).softmax(1)
    if dropout:
        weights = dropped(weights.view(rows, heads, length, length), dropout, share_B).flatten(0, 1)
    return torch.bmm(weights.transpose(1, 2), v_XTK).view(rows, heads, length, width)


def block_attention(
    q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, dropout: float, share_B: Share | None = None
) -> Tensor:
    """Causal attention by one product for each block of queries, over the keys up to the block's end.

    The queries of a group's heads are the rows of one product with the group's keys.
    """
    rows, heads, length, width = q_BHTK.shape
    groups = k_BGTK.shape[1]
    repeats = heads // groups
    q_BGTRK = q_BHTK.view(rows, groups, repeats, length, width).transpose(2, 3)
    q_YQK = q_BGTRK.reshape(rows * groups, length * repeats, width)
    k_YTK, v_YTK = (x.reshape(rows * groups, length, width) for x in (k_BGTK, v_BGTK))
    read = []
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        later = torch.full((end - start, end), -math.inf, dtype=q_BHTK.dtype).triu(start + 1)
        scores = torch.baddbmm(
            later.repeat_interleave(repeats, 0),
            q_YQK[:, start * repeats : end * repeats],
            k_YTK[:, :end].transpose(1, 2),
            alpha=1 / math.sqrt(width),
        )
        weights = scores.softmax(-1)
        if dropout:
            weights = dropped(weights.view(rows, groups, *weights.shape[1:]), dropout, share_B).flatten(0, 1)
        read.append(torch.bmm(weights, v_YTK[:, :end]))
    mixed_BGTRK = torch.cat(read, 1).view(rows, groups, length, repeats, width)
    return mixed_BGTRK.transpose(2, 3).reshape(rows, heads, length, width)
