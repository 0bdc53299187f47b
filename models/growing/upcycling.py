"""Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055): a gated MLP becomes a mixture of copies of itself.

The router is fresh. Whichever experts it chooses are equal and their weights are made to sum to one, so the function is
what it was. Experts need no noise: each is sent tokens of its own, so their gradients differ from the first step on.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from pydantic import ValidationError

from common.errors import UserError
from models.config import ModelConfig
from models.growing.growth import WEIGHT, Kind, prefix_of
from models.weights import Array, Parameter, Piece, from_canonical, initial_parameter, parameters, to_canonical


@dataclass(frozen=True)
class Upcycled:
    """A model whose MLPs become mixtures; see `models.growing.growth.Growth`.

    Of n experts of which k are chosen, one sees k of n tokens, each with a weight of 1/k on average: its gradient is
    1/n of the old one in the mean, and so is its first moment. Its second moment is 1/(n·k) of the old one, as that of
    a sum of independent tokens is: for small batches, noise outweighs the mean.

    The router has no momentum, and as its second moments the mean over those of the norm that it reads, whose
    gradients were found as large as those of a router between experts that differ; second moments of zero would, with
    a count of many updates, let the first ones be several times too large.
    """

    model: ModelConfig
    """The old model."""
    experts: int
    """The experts of each mixture."""
    chosen: int
    """Experts that each token is sent to."""
    seed: int = 0
    """Of the routers."""

    @cached_property
    def grown(self) -> ModelConfig:
        """The model that comes out: a Mixtral where Mixtral has its parts, else a custom composition.

        Raises UserError where the old model's MLP cannot be an expert.
        """
        model = self.model
        if model.mlp != "gated":
            kind = "has experts already" if model.mlp == "mixture" else "has a dense MLP"
            raise UserError(f"upcycle makes experts of a gated MLP, as llama has; {model.architecture} {kind}")
        if model.mlp_bias:
            raise UserError("upcycle makes experts, which have no biases; the model's MLP has: mlp_bias is true")
        native = model.architecture == "llama" and not model.attention_bias
        changes = {
            "architecture": "mixtral" if native else "custom",
            "mlp": "mixture",
            "num_local_experts": self.experts,
            "num_experts_per_tok": self.chosen,
        }
        try:
            return ModelConfig.model_validate({**model.model_dump(), **changes})
        except ValidationError as error:
            raise UserError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error

    @cached_property
    def _old(self) -> dict[str, Parameter]:
        return {parameter.name: parameter for parameter in parameters(self.model)}

    def pieces(self, parameter: Parameter, kind: Kind, old: Mapping[str, Array]) -> Iterator[Piece]:
        """The parameter or its moment out of the old arrays."""
        prefix = prefix_of(kind)
        if ".router." in parameter.name:
            yield from to_canonical(parameter, self._router(parameter, kind, old), prefix)
            return
        block, experts, projection = parameter.name.partition(".experts.")
        source = self._old[f"{block}.{projection}.weight" if experts else parameter.name]
        shares = {WEIGHT: 1, "exp_avg_sq": self.experts * self.chosen}
        share = shares.get(kind, self.experts) if experts else 1
        (origin,) = source.placements
        array = old[prefix + origin.name]
        shared = array if share == 1 else array.astype(np.float32, copy=False) / share
        for place in parameter.placements:
            yield Piece(prefix + place.name, (), shared)

    def _router(self, parameter: Parameter, kind: Kind, old: Mapping[str, Array]) -> Array:
        if kind == WEIGHT:
            return initial_parameter(self.grown, parameter, self.seed)
        norm = self._old[parameter.name.replace("mlp.router", "post_attention_norm")]
        mean = from_canonical(norm, old.__getitem__, prefix_of(kind)).mean() if kind == "exp_avg_sq" else 0.0
        return np.full(parameter.shape, mean, np.float32)
