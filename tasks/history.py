"""What a model has been through since its fresh weights: a file of its artifact that every stage adds an entry to."""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from common.config import FrozenModel
from common.errors import UserError
from common.files import canonical_json

HISTORY = "history.json"


class Loss(FrozenModel):
    """A validation loss, which may be infinite or NaN: JSON has no numbers for those."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    step: int
    """Steps of this training that were done."""
    loss: float
    """Mean cross-entropy in nats; of preference tuning, the mean loss of pairs."""


class Trained(FrozenModel):
    """A training stage."""

    kind: Literal["trained"] = "trained"
    parameters: int
    """Parameters of the model, tied ones counted once."""
    steps: int
    """Optimizer steps."""
    tokens: int
    """Positions that it went through, padding included."""
    flops: float
    """Training FLOPs, as `models.training.flops` counts them."""
    fresh_optimizer: bool = False
    """Whether the optimizer began without moments."""
    measured_on: str | None
    """Identity of the validation rows: losses of two entries may be compared where it is the same; None without any,
    and for preference tuning, whose losses are over a reference of its own."""
    validation: tuple[Loss, ...]
    """The validation losses in order; that of step 0 is the loss of the weights that came in."""


class Grown(FrozenModel):
    """A growth."""

    kind: Literal["grown"] = "grown"
    operator: str
    """How, as the stage's config calls it."""
    parameters_before: int
    parameters: int
    """Parameters after it."""
    source_layers: tuple[int | None, ...] = ()
    """The old layer that each new layer is a copy of, None for a fresh one; empty where the layers are the old ones."""
    optimizer_state: str | None = None
    """What became of the moments, as the stage's config calls it; null where it is not known."""


Entry = Annotated[Trained | Grown, Field(discriminator="kind")]
History = tuple[Entry, ...]
_ENTRIES: TypeAdapter[History] = TypeAdapter(History)


def read_history(folder: Path) -> History:
    """The history in a model artifact. Raises UserError where it is not one."""
    path = folder / HISTORY
    try:
        return _ENTRIES.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is no history of a model ({reason}); make the model again") from error


def write_history(folder: Path, history: History) -> None:
    """Writes the history into a model artifact."""
    (folder / HISTORY).write_bytes(canonical_json([json.loads(entry.model_dump_json()) for entry in history]))


def trained_tokens(history: History) -> int:
    """Positions over all training."""
    return sum(entry.tokens for entry in history if isinstance(entry, Trained))


def trained_flops(history: History) -> float:
    """Training FLOPs over all training."""
    return sum(entry.flops for entry in history if isinstance(entry, Trained))
