# SPDX-License-Identifier: MIT
"""The configuration of a language model that Cairn trained, for `transformers`.

This file and `modeling_cairn.py` beside it are all that `transformers` needs to open the model, with
`trust_remote_code=True`. They import PyTorch and `transformers` and nothing else, read no file and open no connection.
"""

from typing import Any

from transformers import PretrainedConfig


class CairnConfig(PretrainedConfig):
    """A decoder-only transformer whose parts are chosen one by one.

    The defaults are those of no model in particular; a published `config.json` gives every value.
    """

    model_type = "cairn"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  # transformers reads a list

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 384,
        intermediate_size: int = 1024,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 1024,
        norm: str = "rms_norm",
        norm_eps: float = 1e-6,
        position_embedding: str = "rope",
        rope_theta: float = 10_000.0,
        mlp: str = "gated",
        hidden_act: str = "silu",
        attention_bias: bool = False,
        mlp_bias: bool = False,
        num_local_experts: int | None = None,
        num_experts_per_tok: int | None = None,
        dropout: float = 0.0,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        """The parts of a model; what else is given goes to `PretrainedConfig`.

        vocab_size: rows of the token embedding.
        hidden_size: width of the residual stream.
        intermediate_size: inner width of the MLP, or of each expert.
        num_key_value_heads: key and value heads, each shared by as many query heads; as many as query heads if None.
        head_dim: width of one head; hidden_size / num_attention_heads if None.
        norm: "layer_norm" (with bias) or "rms_norm".
        position_embedding: "learned" (added to the tokens' embeddings) or "rope" (rotary, of base `rope_theta`).
        mlp: "dense" (two matrices), "gated" (three) or "mixture" (gated experts behind a router).
        hidden_act: "gelu_new" (GELU in its tanh form) or "silu".
        attention_bias, mlp_bias: whether the projections have biases; experts have none.
        dropout: on the embeddings, the attention weights and both residual branches, in training.
        tie_word_embeddings: whether the output head is the token embedding.
        """
        known = {
            "norm": (norm, ("layer_norm", "rms_norm")),
            "position_embedding": (position_embedding, ("learned", "rope")),
            "mlp": (mlp, ("dense", "gated", "mixture")),
            "hidden_act": (hidden_act, ("gelu_new", "silu")),
        }
        for key, (value, choices) in known.items():
            if value not in choices:
                raise ValueError(f"{key} is {value!r}, not one of {', '.join(choices)}")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.norm = norm
        self.norm_eps = norm_eps
        self.position_embedding = position_embedding
        self.rope_theta = rope_theta
        self.mlp = mlp
        self.hidden_act = hidden_act
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.num_local_experts = num_local_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.dropout = dropout
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(**kwargs)
        self.tie_word_embeddings = tie_word_embeddings
