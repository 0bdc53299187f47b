# SPDX-License-Identifier: MIT
"""A language model that Cairn trained, for `transformers`: opened with `trust_remote_code=True`.

The file imports PyTorch and `transformers` and nothing else; with `configuration_cairn.py` it is the whole model.
Attention and caches are those of `transformers` (5, or 4.57), so `attn_implementation` may be "sdpa" or "eager", and
`generate` works as for any other model. What is not offered: gradient checkpointing, attention weights among the
outputs, and the load-balancing loss of a mixture.

Shape suffixes: B rows, T new positions, K positions of keys, N = B · T, P positions that an expert was chosen for,
D hidden_size, H heads, G key and value heads, A head_dim, I intermediate_size, E experts, C experts of a position,
V vocab_size.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_cairn import CairnConfig


class CairnRMSNorm(nn.Module):
    """RMSNorm (Zhang and Sennrich, 2019), in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.rms_norm(x_BTD.float(), self.weight.shape, self.weight.float(), self.eps).to(x_BTD.dtype)


def make_norm(config: CairnConfig) -> nn.Module:
    """The norm that the config names."""
    if config.norm == "layer_norm":
        return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
    return CairnRMSNorm(config.hidden_size, config.norm_eps)


def activated(config: CairnConfig, x: Tensor) -> Tensor:
    """SiLU, or GELU in its tanh form (Hendrycks and Gimpel, 2016)."""
    return F.silu(x) if config.hidden_act == "silu" else F.gelu(x, approximate="tanh")


def rotation(config: CairnConfig, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (Su et al., 2021), (B, 1, T, A) each; computed in fp32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions_BT.device) / config.head_dim
    angles = positions_BT.float().unsqueeze(-1) * (1.0 / config.rope_theta**exponents)
    both_B1TA = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return both_B1TA.cos().to(dtype), both_B1TA.sin().to(dtype)


def rotated(x_BHTA: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Heads turned by their positions' angles; pairs are (i, i + A/2)."""
    first, second = x_BHTA.chunk(2, dim=-1)
    cosine, sine = turn
    return x_BHTA * cosine + torch.cat((-second, first), dim=-1) * sine


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, with its softmax in fp32: what the queries read, (B, T, H, A), and the weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores_BHTK = (query @ key.transpose(2, 3)).float() * scaling
    if attention_mask is None:
        attention_mask = torch.ones(scores_BHTK.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attention_mask.dtype == torch.bool:
        scores_BHTK = scores_BHTK.masked_fill(~attention_mask, torch.finfo(torch.float32).min)
    else:
        scores_BHTK = scores_BHTK + attention_mask
    weights_BHTK = F.dropout(scores_BHTK.softmax(-1).to(query.dtype), dropout)
    return (weights_BHTK @ value).transpose(1, 2), weights_BHTK


class CairnAttention(nn.Module):
    """Causal self-attention, with as many key and value heads as the config says."""

    def __init__(self, config: CairnConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.scaling, self.is_causal = config.head_dim, config.head_dim**-0.5, True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        width, bias = config.hidden_size, config.attention_bias
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, queries, bias=bias)
        self.k_proj = nn.Linear(width, keys, bias=bias)
        self.v_proj = nn.Linear(width, keys, bias=bias)
        self.o_proj = nn.Linear(queries, width, bias=bias)

    def forward(
        self, x_BTD: Tensor, turn: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        rows, length, _ = x_BTD.shape
        q_BHTA, k_BGTA, v_BGTA = (
            projection(x_BTD).view(rows, length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if turn is not None:
            q_BHTA, k_BGTA = rotated(q_BHTA, turn), rotated(k_BGTA, turn)
        if cache is not None:
            k_BGTA, v_BGTA = cache.update(k_BGTA, v_BGTA, self.layer_idx)
        if mask is not None and mask.shape[-1] < k_BGTA.shape[2]:
            # A static cache gives all its places, also those that are still empty.
            mask = F.pad(mask, (0, k_BGTA.shape[2] - mask.shape[-1]), value=False)
        attend = eager_attention
        if self.config._attn_implementation not in (None, "eager"):
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.config.dropout if self.training else 0.0
        mixed_BTHA, _ = attend(self, q_BHTA, k_BGTA, v_BGTA, mask, dropout=dropout, scaling=self.scaling)
        attended_BTD: Tensor = self.o_proj(mixed_BTHA.reshape(rows, length, -1))
        return attended_BTD


class CairnMLP(nn.Module):
    """Two projections with an activation between them, or three of which one gates another (Shazeer, 2020)."""

    def __init__(self, config: CairnConfig) -> None:
        super().__init__()
        self.config = config
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias) if config.mlp == "gated" else None
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.gate_proj is None:
            inner_BTI = activated(self.config, self.up_proj(x_BTD))
        else:
            inner_BTI = activated(self.config, self.gate_proj(x_BTD)) * self.up_proj(x_BTD)
        done_BTD: Tensor = self.down_proj(inner_BTI)
        return done_BTD


class CairnExpert(nn.Module):
    """One expert of a mixture: w1 gates w3, w2 leads back."""

    def __init__(self, config: CairnConfig) -> None:
        super().__init__()
        self.config = config
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x_PD: Tensor) -> Tensor:
        done_PD: Tensor = self.w2(activated(self.config, self.w1(x_PD)) * self.w3(x_PD))
        return done_PD


class CairnMixture(nn.Module):
    """Each position goes through its most probable experts, weighted by their renormalised probabilities
    (Jiang et al., 2024)."""

    def __init__(self, config: CairnConfig) -> None:
        super().__init__()
        if config.num_local_experts is None or config.num_experts_per_tok is None:
            raise ValueError("a mixture needs num_local_experts and num_experts_per_tok")
        self.chosen = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList(CairnExpert(config) for _ in range(config.num_local_experts))

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        # The router is always fp32: its choices are discrete, and bf16 flips them (Fedus et al., 2021).
        probabilities_NE = F.linear(x_ND.float(), self.gate.weight.float()).softmax(-1)
        weights_NC, experts_NC = probabilities_NE.topk(self.chosen, dim=-1)
        weights_NC = (weights_NC / weights_NC.sum(-1, keepdim=True)).to(x_ND.dtype)
        done_ND = torch.zeros_like(x_ND)
        for number, expert in enumerate(self.experts):
            places_P, choices_P = (experts_NC == number).nonzero(as_tuple=True)
            part_PD = expert(x_ND[places_P]) * weights_NC[places_P, choices_P].unsqueeze(-1)
            done_ND = done_ND.index_add(0, places_P, part_PD)
        return done_ND.view_as(x_BTD)


class CairnDecoderLayer(nn.Module):
    """Attention, then an MLP or a mixture, each read through a norm and added to the residual stream."""

    def __init__(self, config: CairnConfig, layer_idx: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.input_layernorm = make_norm(config)
        self.self_attn = CairnAttention(config, layer_idx)
        self.post_attention_layernorm = make_norm(config)
        self.is_mixture = config.mlp == "mixture"
        if self.is_mixture:
            self.block_sparse_moe = CairnMixture(config)
        else:
            self.mlp = CairnMLP(config)

    def forward(
        self, x_BTD: Tensor, turn: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        attended_BTD = self.self_attn(self.input_layernorm(x_BTD), turn, mask, cache)
        x_BTD = x_BTD + F.dropout(attended_BTD, self.dropout, self.training)
        mlp = self.block_sparse_moe if self.is_mixture else self.mlp
        return x_BTD + F.dropout(mlp(self.post_attention_layernorm(x_BTD)), self.dropout, self.training)


class CairnPreTrainedModel(PreTrainedModel):
    """What `transformers` has to know of every model here."""

    config: CairnConfig
    config_class = CairnConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["CairnDecoderLayer"]  # noqa: RUF012  # transformers reads a list
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True


class CairnModel(CairnPreTrainedModel):
    """The transformer without its output head."""

    def __init__(self, config: CairnConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(CairnDecoderLayer(config, number) for number in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The last hidden states (B, T, D).

        Padding stands on any side of a row: `attention_mask` says with 0 where, for past and new positions alike, and
        positions that are not given by `position_ids` count the others.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds has to be given")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if (self.config.use_cache if use_cache is None else use_cache) and past_key_values is None:
            past_key_values = DynamicCache()
        _check_cache(past_key_values)
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        mask = _mask(x_BTD, attention_mask, past)
        if position_ids is None:
            position_ids = _positions(x_BTD, attention_mask, past)
        turn = None
        if self.config.position_embedding == "learned":
            x_BTD = x_BTD + self.embed_positions(position_ids)
        else:
            turn = rotation(self.config, position_ids, x_BTD.dtype)
        x_BTD = F.dropout(x_BTD, self.config.dropout, self.training)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = [x_BTD]
        for layer in self.layers:
            x_BTD = layer(x_BTD, turn, mask, past_key_values)
            states += [x_BTD] if wanted else []
        x_BTD = self.norm(x_BTD)
        output = BaseModelOutputWithPast(
            last_hidden_state=x_BTD,
            past_key_values=past_key_values,
            # As other models have it: the last of them is what the head reads.
            hidden_states=(*states[:-1], x_BTD) if wanted else None,
        )
        return output.to_tuple() if return_dict is False else output


def _check_cache(cache: Cache | None) -> None:
    """Raises ValueError for a static cache under transformers 4, where it would have to be told each position."""
    if getattr(cache, "is_compileable", False) and int(transformers.__version__.partition(".")[0]) < 5:
        raise ValueError("this model takes static caches from transformers 5 on; use a dynamic one")


def _mask(x_BTD: Tensor, attention_mask: Tensor | None, past: int) -> Tensor | None:
    """Which keys each query reads, bool (B, 1, T, K), or None where that is all keys up to its own."""
    length = x_BTD.shape[1]
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    if past == 0 and length > 1 and (attention_mask is None or bool(attention_mask.all())):
        return None
    keys_K = torch.arange(past + length, device=x_BTD.device)
    queries_T1 = keys_K[past:].unsqueeze(-1)
    causal_TK = keys_K <= queries_T1
    if attention_mask is None:
        return causal_TK[None, None]
    if attention_mask.shape[1] != past + length:
        raise ValueError(f"attention_mask is {attention_mask.shape[1]} long, and there are {past + length} positions")
    # Padding reads itself, so that its softmax is over something and what it gives is a number.
    read_BTK = causal_TK & attention_mask.bool()[:, None] | (keys_K == queries_T1)
    return read_BTK[:, None]


def _positions(x_BTD: Tensor, attention_mask: Tensor | None, past: int) -> Tensor:
    """The place of each new position among those of its row that are no padding, (B or 1, T)."""
    length = x_BTD.shape[1]
    if attention_mask is None or attention_mask.dim() == 4:
        return torch.arange(past, past + length, device=x_BTD.device).unsqueeze(0)
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -length:]


class CairnForCausalLM(CairnPreTrainedModel, GenerationMixin):
    """The transformer with its output head, untied or tied to the token embedding."""

    # transformers 5 reads what is tied to what, transformers 4 the keys alone.
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: CairnConfig) -> None:
        super().__init__(config)
        self.model = CairnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits (B, T, V), or of the last `logits_to_keep` positions alone; with `labels`, their mean loss too.

        Labels are moved by one inside, as everywhere in `transformers`: give the tokens themselves, with -100 where
        nothing is to be learned.
        """
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(found.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
        )
        return output.to_tuple() if return_dict is False else output
