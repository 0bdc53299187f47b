"""The one torch module of every architecture: parameters named and shaped as `models.weights.parameters` says.

Rows of text are packed before they enter: only real positions are computed on, and padding exists in attention
alone. Shape suffixes:

N packed positions, M positions that are read out (all N, or those whose target counts), D hidden_size,
S query_size, K head_dim, V vocab_size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.config import ModelConfig
from models.torch_engine.attention import Attention, Cache, Group, LayerCache, Rotation, rotation_table
from models.torch_engine.dropout import Share, dropped
from models.torch_engine.layers import Dense, Gated, Linear, Norm
from models.torch_engine.mixture import Mixture


class Rows(NamedTuple):
    """Packed positions, on the model's device, and the groups of rows that they stand in."""

    tokens_N: Tensor
    """int32 or int64."""
    positions_N: Tensor
    """int64; place in its row."""
    groups: Sequence[Group]
    """Their positions follow one another in N, and within each those of its rows."""
    read_M: Tensor | None
    """int64; the packed positions whose hidden states are wanted, or None for all."""
    share_N: Share | None = None
    """Of the positions of all processes, for dropout; None where all are here."""
    share_M: Share | None = None
    """The same of the read positions, where `read_M` is given."""


class Embedding(nn.Module):
    """A table of vectors, uninitialised: `weight` (rows, D)."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, indices_N: Tensor) -> Tensor:
        return F.embedding(indices_N, self.weight)


class Block(nn.Module):
    """One layer: attention, then an MLP, each read through a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, rematerialize: bool) -> None:
        super().__init__()
        self.dropout, self.rematerialize = config.dropout, rematerialize
        self.input_norm = Norm(config)
        self.attention = Attention(config)
        self.post_attention_norm = Norm(config)
        self.mlp = {"dense": Dense, "gated": Gated, "mixture": Mixture}[config.mlp](config)

    def forward(
        self,
        x_ND: Tensor,
        rows: Rows,
        rotation: Rotation | None,
        cache: LayerCache | None,
        compute: torch.dtype,
        read_M: Tensor | None,
    ) -> Tensor:
        """The residual stream after the block, at `read_M` alone where given."""
        if not (self.rematerialize and torch.is_grad_enabled()):
            return self._through(x_ND, rows, rotation, cache, compute, read_M)
        # Inside of the block, so that FSDP2's hooks around it see one pass forward and one backward.
        done_ND: Tensor = checkpoint(
            *(self._through, x_ND, rows, rotation, cache, compute, read_M),
            use_reentrant=False,
            preserve_rng_state=self.dropout > 0,
        )
        return done_ND

    def _through(
        self,
        x_ND: Tensor,
        rows: Rows,
        rotation: Rotation | None,
        cache: LayerCache | None,
        compute: torch.dtype,
        read_M: Tensor | None,
    ) -> Tensor:
        mixed_NS = self.attention.mix(self.input_norm(x_ND).to(compute), rows.groups, rotation, cache)
        share_N = rows.share_N
        if read_M is not None:
            x_ND, mixed_NS, share_N = x_ND.index_select(0, read_M), mixed_NS.index_select(0, read_M), rows.share_M
        x_ND = x_ND + self._dropped(self.attention.o_proj(mixed_NS), share_N)
        return x_ND + self._dropped(self.mlp(self.post_attention_norm(x_ND).to(compute)), share_N)

    def _dropped(self, x_ND: Tensor, share_N: Share | None) -> Tensor:
        return dropped(x_ND, self.dropout, share_N) if self.dropout and self.training else x_ND


class Transformer(nn.Module):
    """A decoder-only transformer; weights are fp32 and uninitialised, `compute` is the dtype of its products.

    The residual stream, norms, router and loss stay in fp32 whatever `compute` is. Dropout follows `train()`.
    """

    def __init__(self, config: ModelConfig, compute: torch.dtype, rematerialize: bool = False) -> None:
        """`rematerialize`: whether blocks are computed again on the way back instead of being remembered."""
        super().__init__()
        self.config = config
        self.compute = compute
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding == "learned":
            self.embed_positions = Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, rematerialize) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.vocab_size, config.hidden_size, bias=False)
        self._tables: tuple[Tensor, Tensor] | None = None

    @property
    def head_VD(self) -> nn.Parameter:
        """The output head's matrix."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, rows: Rows, cache: Cache | None = None) -> Tensor:
        """Logits (M, V) in `compute`'s dtype at the positions that `rows.read_M` names."""
        return F.linear(self.read(rows, cache), self.head_VD.to(self.compute))

    def read(self, rows: Rows, cache: Cache | None = None) -> Tensor:
        """What the head reads, (M, D) in `compute`'s dtype, at the positions that `rows.read_M` names."""
        x_ND = self.embed_tokens(rows.tokens_N)
        if self.config.position_embedding == "learned":
            x_ND = x_ND + self.embed_positions(rows.positions_N)
        if self.config.dropout and self.training:
            x_ND = dropped(x_ND, self.config.dropout, rows.share_N)
        rotation = self._rotation(rows)
        last = len(self.layers) - 1
        for number, block in enumerate(self.layers):
            # A mixture's last router has to see every real position for its balance; other blocks' ends need not.
            read_M = rows.read_M if number == last and self.config.mlp != "mixture" else None
            layer_cache = None if cache is None else cache.of_layer(number)
            x_ND = block(x_ND, rows, rotation, layer_cache, self.compute, read_M)
        if rows.read_M is not None and self.config.mlp == "mixture":
            x_ND = x_ND.index_select(0, rows.read_M)
        x_MD: Tensor = self.norm(x_ND)
        return x_MD.to(self.compute)

    def mixtures(self) -> list[Mixture]:
        """The mixtures of experts, by layer; none where the MLPs are dense."""
        return [block.mlp for block in self.layers if isinstance(block.mlp, Mixture)]

    def _rotation(self, rows: Rows) -> Rotation | None:
        config = self.config
        if config.rope_theta is None:
            return None
        if self._tables is None or self._tables[0].device != rows.positions_N.device:
            device = rows.positions_N.device
            tables = rotation_table(config.max_position_embeddings, config.head_dim, config.rope_theta, device)
            self._tables = (tables[0].to(self.compute), tables[1].to(self.compute))
        cosine, sine = self._tables
        return Rotation(cosine.index_select(0, rows.positions_N), sine.index_select(0, rows.positions_N))
