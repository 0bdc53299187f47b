"""One description of a model for every architecture and engine."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from common.config import FrozenModel

# What the `transformers` class of each architecture fixes; a recipe may name these keys, but only with these values.
_FIXED: dict[str, dict[str, Any]] = {
    "gpt2": {
        "norm": "layer_norm",
        "position_embedding": "learned",
        "mlp": "dense",
        "hidden_act": "gelu_new",
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama": {"norm": "rms_norm", "position_embedding": "rope", "mlp": "gated", "hidden_act": "silu"},
    "mixtral": {
        "norm": "rms_norm",
        "position_embedding": "rope",
        "mlp": "mixture",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    },
}
# The defaults of each `transformers` class, where a recipe may differ.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"norm_eps": 1e-5, "tie_word_embeddings": True},
    "llama": {
        "norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "mixtral": {"norm_eps": 1e-5, "rope_theta": 1_000_000.0, "tie_word_embeddings": False},
}


class ModelConfig(FrozenModel):
    """A decoder-only transformer, in the words of `transformers` configs.

    `architecture` names a `transformers` class and brings that class's composition and defaults; `custom` names
    none, and every part of the composition has to be given.
    """

    architecture: Literal["gpt2", "llama", "mixtral", "custom"]
    """The `transformers` class that the model is: GPT2LMHeadModel, LlamaForCausalLM, MixtralForCausalLM; or custom."""
    vocab_size: int = Field(gt=0)
    """Rows of the token embedding; at least the tokenizer's size."""
    hidden_size: int = Field(gt=0)
    """Width of the residual stream."""
    intermediate_size: int = Field(gt=0)
    """Inner width of the MLP, or of each expert."""
    num_hidden_layers: int = Field(gt=0)
    """Number of transformer blocks."""
    num_attention_heads: int = Field(gt=0)
    """Number of query heads."""
    num_key_value_heads: int = Field(gt=0)
    """Number of key and value heads (grouped-query attention); as many as query heads unless given."""
    head_dim: int = Field(gt=0)
    """Width of one head; hidden_size / num_attention_heads unless given."""
    max_position_embeddings: int = Field(gt=0)
    """The longest sequence that the model takes."""
    norm: Literal["layer_norm", "rms_norm"]
    """LayerNorm with bias, or RMSNorm."""
    norm_eps: float = Field(gt=0)
    """Epsilon of every norm (`layer_norm_epsilon` and `rms_norm_eps` in transformers)."""
    position_embedding: Literal["learned", "rope"]
    """Learned absolute positions, or rotary ones in the half-split layout of transformers."""
    rope_theta: float | None = Field(default=None, gt=0)
    """Base of the rotary frequencies; only with rope."""
    mlp: Literal["dense", "gated", "mixture"]
    """Two matrices, three with a gate (SwiGLU), or a mixture of gated experts."""
    hidden_act: Literal["gelu_new", "silu"]
    """Activation of the MLP: GELU in its tanh form, or SiLU."""
    attention_bias: bool
    """Whether the attention projections have biases."""
    mlp_bias: bool
    """Whether the MLP projections have biases."""
    tie_word_embeddings: bool
    """Whether the output head is the token embedding."""
    num_local_experts: int | None = Field(default=None, gt=0)
    """Number of experts of a mixture."""
    num_experts_per_tok: int | None = Field(default=None, gt=0)
    """Experts that each token is sent to."""
    router_aux_loss_coef: float = Field(default=0.01, ge=0)
    """Weight of the load-balancing loss of a mixture."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial matrices; GPT-2 scales residual projections by 1/sqrt(2·layers)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the embeddings, the attention weights and both residual branches, in training alone."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        architecture = str(values.get("architecture"))
        given = {name: value for name, value in values.items() if value is not None}
        fixed = _FIXED.get(architecture, {})
        for name, value in fixed.items():
            if given.get(name, value) != value:
                raise ValueError(
                    f"{name} of {architecture} is {value!r}, not {given[name]!r}; use architecture: custom"
                )
        filled = {**_DEFAULTS.get(architecture, {}), **fixed, **given}
        heads, width = filled.get("num_attention_heads"), filled.get("hidden_size")
        if isinstance(heads, int) and isinstance(width, int) and heads > 0:
            filled.setdefault("num_key_value_heads", heads)
            if "head_dim" not in filled:
                if width % heads:
                    raise ValueError(
                        f"hidden_size {width} is not divisible by num_attention_heads {heads}; "
                        f"give head_dim or change one of them"
                    )
                filled["head_dim"] = width // heads
        return filled

    @model_validator(mode="after")
    def _check(self) -> Self:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ValueError(f"num_key_value_heads {groups} does not divide num_attention_heads {heads}")
        if self.architecture == "gpt2" and (groups != heads or self.head_dim * heads != self.hidden_size):
            raise ValueError("gpt2 has as many key-value heads as heads, of hidden_size / num_attention_heads each")
        rotary = self.position_embedding == "rope"
        if rotary and self.rope_theta is None:
            raise ValueError("rope_theta is missing")
        if not rotary and self.rope_theta is not None:
            raise ValueError("rope_theta is given, but the positions are learned; remove it")
        if rotary and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {self.head_dim}")
        experts, chosen = self.num_local_experts, self.num_experts_per_tok
        if self.mlp == "mixture":
            if experts is None or chosen is None:
                raise ValueError("a mixture needs num_local_experts and num_experts_per_tok")
            if chosen > experts:
                raise ValueError(f"num_experts_per_tok {chosen} exceeds num_local_experts {experts}")
        elif experts is not None or chosen is not None:
            raise ValueError(f"num_local_experts and num_experts_per_tok belong to a mixture, not to {self.mlp!r}")
        return self

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_key_value_heads * self.head_dim
