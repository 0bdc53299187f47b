"""The optimizers' one definition: which parameters they take, their numbers, and the state that they leave.

Engines implement exactly this, in fp32 throughout, so that a run can change engines between two steps.

**AdamW** (Loshchilov and Hutter, 2019), for a gradient g at update t (counted from 1):
    m ← β1·m + (1−β1)·g        v ← β2·v + (1−β2)·g²
    w ← w·(1 − lr·decay) − lr · (m/(1−β1^t)) / (sqrt(v/(1−β2^t)) + eps)

**Muon** (Jordan et al., 2024), for the blocks' matrices as (out, in), each expert on its own:
    b ← momentum·b + (1−momentum)·g        u ← (1−momentum)·g + momentum·b
    w ← w·(1 − lr·decay) − lr · sqrt(max(1, out/in)) · orthogonalised(u)
`orthogonalised` divides by the Frobenius norm (at least 1e-7), transposes where out > in, takes
`newton_schulz_steps` of X ← a·X + (b·A + c·A²)·X with A = X·Xᵀ and (a, b, c) = NEWTON_SCHULZ, in fp32 or bf16,
and transposes back.

Gradients are clipped together by their global norm first: g ← g · min(1, clip / (norm + 1e-6)). An update whose
loss or gradient norm is not finite is skipped whole, state and count included.
"""

from typing import Literal

from pydantic import Field

from common.config import FrozenModel

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
UPDATES = "updates"
"""The name of the number of updates done (t above), an int64 array of shape (), in an optimizer's exported state."""
LOSS_SCALE, LOSS_SCALE_UPDATES = "loss_scale", "loss_scale_updates"
"""What an exported state has more where training was in float16: the factor of the loss (fp32), and for how many
updates it has been that (int64), arrays of shape (). A state without them is whole, too; see `OPTIONAL`."""
OPTIONAL = frozenset({LOSS_SCALE, LOSS_SCALE_UPDATES})
"""Names in an exported state that an engine passes over where it has no use for them, and does without where they are
missing: training goes on in any precision from what any other left."""
ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")
MUON_MOMENTS = ("momentum_buffer",)
"""The prefixes of moments in an exported state: `exp_avg:model.norm.weight`."""


class OptimizerConfig(FrozenModel):
    """AdamW alone, or Muon for the blocks' matrices with AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    """The optimizer of the blocks' matrices; everything else always has AdamW."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate of AdamW."""
    muon_learning_rate: float = Field(default=0.01, gt=0)
    """Peak learning rate of Muon."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay of every matrix (embeddings included), times the learning rate; norms and biases have none."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon's momentum, in Nesterov's form."""
    newton_schulz_steps: int = Field(default=5, gt=0)
    """Muon's Newton–Schulz iterations."""
    newton_schulz_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of Muon's Newton–Schulz iterations."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest global norm of the gradient; null for no clipping."""


def is_decayed(shape: tuple[int, ...]) -> bool:
    """Whether weight decay applies: to matrices and stacks of them, not to norms and biases."""
    return len(shape) >= 2


def moments_of(config: OptimizerConfig, name: str) -> tuple[str, ...]:
    """The prefixes of the moments that the engine parameter `name` has."""
    return MUON_MOMENTS if takes_muon(config, name) else ADAMW_MOMENTS


def takes_muon(config: OptimizerConfig, name: str) -> bool:
    """Whether the engine parameter `name` is Muon's: the projections of the blocks, not embeddings, head or router."""
    return config.name == "muon" and name.startswith("layers.") and "_proj" in name and not name.endswith(".bias")
