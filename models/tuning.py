"""What a training run minimises, and which parameters it moves: everything beside the model and its optimizer."""

from typing import Literal

from pydantic import Field

from common.config import FrozenModel

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoraConfig(FrozenModel):
    """Low-rank adapters (Hu et al., arXiv 2106.09685): W + (alpha/rank)·B·A, of which A and B alone are trained.

    A is drawn as `initial_adapters` says and B is zero, so the model begins as it was.
    """

    rank: int = Field(default=8, gt=0)
    """Rows of A and columns of B."""
    alpha: float = Field(default=16.0, gt=0)
    """Their product counts alpha / rank times."""
    targets: tuple[Projection, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )
    """The projections that get adapters, in every layer; those that the architecture has not are passed over."""

    @property
    def scale(self) -> float:
        """What B·A counts times."""
        return self.alpha / self.rank


class PreferenceConfig(FrozenModel):
    """Direct preference optimization (Rafailov et al., arXiv 2305.18290)."""

    beta: float = Field(default=0.1, gt=0)
    """How much a pair's margin over the reference model counts: the larger, the closer the model stays to it."""


class Tuning(FrozenModel):
    """How an engine trains, where that is not cross-entropy with all parameters."""

    lora: LoraConfig | None = None
    """Adapters that are trained in place of the weights; null for the weights themselves."""
    preference: PreferenceConfig | None = None
    """Pairs of rows, a chosen and then a rejected one, in place of cross-entropy; null for that."""


WHOLE = Tuning()
"""Cross-entropy over all parameters."""
