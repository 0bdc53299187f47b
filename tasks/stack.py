"""Stage `stack`: a larger model out of a trained one, deeper, wider or with experts, and with its optimizer's state.

When growth pays, as far as is known: "Stacking Your Transformers" (arXiv 2405.15319) reached the loss of training from
scratch with about half of the tokens by growing early, up to 4 times, by copies of the whole. Bases that have seen much
more gain little (arXiv 2510.06548, 2605.13405), and one late growth under warm-up–stable–decay was better than several
(arXiv 2511.04981).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from common.config import FrozenModel
from common.errors import UserError
from models.config import ModelConfig
from models.growing.depth import METHODS, Deeper, Method, grown_layers, layer_map
from models.growing.growth import (
    Growth,
    OptimizerPolicy,
    grown_optimizer,
    grown_weights,
    with_new_second_moments,
)
from models.growing.upcycling import Upcycled
from models.growing.width import AXES, Axis, Split, Wider
from models.optimizer import OptimizerConfig
from models.training.events import Note
from models.training.flops import training_flops_per_token
from models.weights import Array, optimizer_shapes, parameter_count
from tasks.checkpoint import ModelFolder, read_model, write_model
from tasks.history import Grown, History, Trained, trained_tokens
from tasks.stage import Context, Kind, Metrics, Stage
from tasks.tokens import copy_tokenizer

_TOKENS_PER_PARAMETER = 20
_FACTOR = 4
_LAYERS = frozenset({"factor", "num_hidden_layers"})
_TAKES: dict[str, frozenset[str]] = {
    **dict.fromkeys(METHODS, _LAYERS),
    "middle": _LAYERS | {"block"},
    "overlap": _LAYERS | {"drop"},
    "random": _LAYERS | {"seed"},
    "width": frozenset({"factor", "axes", "split", "seed"}),
    "upcycle": frozenset({"num_local_experts", "num_experts_per_tok", "seed"}),
}
"""The keys that each method takes, beside those that all take."""


class Config(FrozenModel):
    """How a model grows."""

    method: Method | Literal["width", "upcycle"] = "stack"
    """In depth `stack` (ABCABC), `interleave` (AABBCC), `middle` (ABBC), `overlap` (two copies without the layers at
    the seam), `zero` (copies that add nothing at first) or `random` (fresh layers): see `models.growing.depth`. `width`
    makes the layers wider, `upcycle` makes a mixture of experts out of each MLP; both leave the function as it is."""
    factor: float | None = Field(default=None, gt=1, allow_inf_nan=False)
    """How many times as many layers, or how many times as wide; null for 2, and for `overlap` for 1.5 as in SOLAR."""
    num_hidden_layers: int | None = Field(default=None, gt=0)
    """How many layers, in place of `factor`."""
    block: int | None = Field(default=None, gt=0)
    """How many layers in the middle `middle` repeats; null for as many as are added, or for what divides them."""
    drop: int | None = Field(default=None, gt=0)
    """How many layers each copy of `overlap` loses at the seam, in place of `factor`."""
    axes: tuple[Axis, ...] = Field(default=AXES, min_length=1)
    """What `width` grows; key and value heads grow with the query heads."""
    split: Split = "random"
    """Parts in which the copies of `width` are read: `random` ones grow apart, `even` ones stay equal for ever."""
    num_local_experts: int | None = Field(default=None, gt=0)
    """Experts that `upcycle` makes of each MLP."""
    num_experts_per_tok: int | None = Field(default=None, gt=0)
    """Experts that each token is sent to."""
    seed: int = Field(default=0, ge=0)
    """Of fresh layers, random parts and routers."""
    optimizer_state: OptimizerPolicy = "copy"
    """Whether moments grow with their weights, or first moments alone (`copy-momentum`), or all start anew."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        takes = _TAKES[self.method] | {"method", "optimizer_state"}
        given = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        for name in given:
            if name not in takes:
                raise ValueError(f"method {self.method} has no use for {name}; it takes {', '.join(sorted(takes))}")
        sizes = [name for name in ("factor", "num_hidden_layers", "drop") if getattr(self, name) is not None]
        if len(sizes) > 1:
            raise ValueError(f"{' and '.join(sizes)} say the same; give one of them")
        if self.method == "upcycle" and (self.num_local_experts is None or self.num_experts_per_tok is None):
            raise ValueError("method upcycle needs num_local_experts and num_experts_per_tok")
        return self


def growth_of(config: Config, model: ModelConfig) -> Growth:
    """How a model grows. Raises UserError where it cannot grow like that."""
    if config.method == "width":
        factor = 2 if config.factor is None else config.factor
        if int(factor) != factor:
            raise UserError(f"width grows by whole factors, for whole copies: 2, 3, …, not {factor:g}")
        return Wider(model, int(factor), config.axes, config.split, config.seed)
    if config.method == "upcycle":
        assert config.num_local_experts is not None  # for the type checker: Config refuses to be without
        assert config.num_experts_per_tok is not None
        return Upcycled(model, config.num_local_experts, config.num_experts_per_tok, config.seed)
    layers = layer_map(config.method, model.num_hidden_layers, _target(config, model.num_hidden_layers), config.block)
    return Deeper(model, layers, config.seed)


def _target(config: Config, layers: int) -> int:
    if config.num_hidden_layers is not None:
        return config.num_hidden_layers
    if config.drop is not None:
        if 2 * config.drop >= layers:
            raise UserError(f"two copies of {layers} layers that drop {config.drop} each have no more; drop fewer")
        return 2 * (layers - config.drop)
    usual = 1.5 if config.method == "overlap" else 2
    return grown_layers(layers, usual if config.factor is None else config.factor)


def run(config: Config, inputs: Mapping[str, Path], context: Context) -> Metrics:
    """Writes a model artifact of the grown model."""
    unmerged = read_model(inputs["model"], with_optimizer=config.optimizer_state != "reset", merge=False)
    model = unmerged.merged()
    growth = growth_of(config, model.config)
    old, new = model.config, growth.grown
    before, after = parameter_count(old), parameter_count(new)
    optimizer, notes = _optimizer(growth, unmerged, config.optimizer_state)
    notes += _advice(growth, model.history)
    for note in notes:
        context.report(Note(note))
    layers = growth.layers if isinstance(growth, Deeper) else ()
    sources = tuple(layer.source for layer in layers)
    entry = Grown(
        operator=_operator(config, growth),
        parameters_before=before,
        parameters=after,
        source_layers=sources,
        optimizer_state="reset" if optimizer is None else config.optimizer_state,
    )
    grown = ModelFolder(
        config=new,
        weights=grown_weights(growth, model.weights),
        optimizer=optimizer,
        trained_with=model.trained_with,
        history=(*model.history, entry),
    )
    write_model(context.output, grown)
    copy_tokenizer(inputs["model"] / "tokenizer", context.output)
    positions = old.max_position_embeddings
    return {
        "summary": f"{config.method}: {_changes(old, new)}, {before:,} → {after:,} parameters",
        "method": config.method,
        "source_layers": list(sources),
        "silent_layers": [number for number, layer in enumerate(layers) if layer.state == "silent"],
        "parameters": {"before": before, "after": after},
        "flops_per_token": {
            "sequence_length": positions,
            "before": training_flops_per_token(old, positions),
            "after": training_flops_per_token(new, positions),
        },
        "notes": notes,
    }


def _operator(config: Config, growth: Growth) -> str:
    """The method and how many times as deep or as wide it made the model, and what of it where that is not all."""
    if isinstance(growth, Upcycled):
        return f"upcycle to {growth.experts} experts"
    if isinstance(growth, Wider):
        axes = [axis for axis in AXES if axis in growth.axes]
        of = "" if len(axes) == len(AXES) else f" of {' and '.join(axes)}"
        return f"{config.method} × {growth.factor}{of}"
    return f"{config.method} × {growth.grown.num_hidden_layers / growth.model.num_hidden_layers:.3g}"


def _optimizer(
    growth: Growth, model: ModelFolder, policy: OptimizerPolicy
) -> tuple[dict[str, Array] | None, list[str]]:
    """The grown state of the optimizer, or None where it starts anew, and notes on it."""
    state, trained_with = model.optimizer, model.trained_with
    if policy == "reset" or state is None or trained_with is None:
        return None, []
    if not _is_whole(state, model.config, trained_with):
        return None, ["the optimizer's state is not of all weights, so it does not grow with them: it starts anew"]
    grown = grown_optimizer(growth, state, trained_with)
    return with_new_second_moments(grown, trained_with) if policy == "copy-momentum" else grown, []


def _is_whole(state: Mapping[str, Array], model: ModelConfig, optimizer: OptimizerConfig) -> bool:
    """Whether all weights have their moments; where adapters were trained, they alone have."""
    return optimizer_shapes(model, optimizer).keys() <= state.keys()


def _advice(growth: Growth, history: History) -> list[str]:
    """What is known to speak against this growth."""
    notes = []
    seen = trained_tokens(history) / parameter_count(growth.model)
    if seen > _TOKENS_PER_PARAMETER:
        notes.append(
            f"the base was trained on {seen:,.1f} positions per parameter, padding included: after more than "
            f"{_TOKENS_PER_PARAMETER} tokens, growing was found to gain little or nothing over training from scratch "
            "(arXiv 2510.06548, 2605.13405)"
        )
    if isinstance(growth, Upcycled):
        return notes
    # Experts make a model larger in another way: theirs are no growths that the others count in.
    earlier = [entry for entry in history if isinstance(entry, Grown) and not entry.operator.startswith("upcycle")]
    factor = _whole_factor(growth, earlier)
    if factor > _FACTOR:
        notes.append(
            f"the model grows {factor:.3g} times{' in all' if earlier else ''}: past {_FACTOR} times, the gain over "
            "training from scratch was found to be gone (arXiv 2605.13405, 2510.06548; up to that, it was there: "
            "2405.15319)"
        )
    if earlier and isinstance(history[-1], Trained):
        notes.append(
            "the model has grown and was trained before: one late growth under warm-up–stable–decay was found better "
            "than several (arXiv 2511.04981)"
        )
    return notes


def _whole_factor(growth: Growth, earlier: Sequence[Grown]) -> float:
    """How many times as deep, or as large, a model becomes by this growth and those before it."""
    old, new = growth.model, growth.grown
    larger = math.prod(entry.parameters / entry.parameters_before for entry in earlier)
    # Every method keeps all layers, so the first growth in depth tells how many there were.
    kept = next((entry.source_layers for entry in earlier if entry.source_layers), range(old.num_hidden_layers))
    first_layers = 1 + max(layer for layer in kept if layer is not None)
    return max(new.num_hidden_layers / first_layers, larger * (parameter_count(new) / parameter_count(old)))


def _changes(old: ModelConfig, new: ModelConfig) -> str:
    """The sizes that differ."""
    sizes = {name: value for name, value in new.model_dump().items() if isinstance(value, int)}
    changed = [(name, getattr(old, name), value) for name, value in sizes.items() if getattr(old, name) != value]
    return ", ".join(f"{name} {value}" if was is None else f"{name} {was} → {value}" for name, was, value in changed)


def grown_model(config: Config, inputs: Mapping[str, ModelConfig]) -> ModelConfig:
    """The description of the model that comes out."""
    return growth_of(config, inputs["model"]).grown


STAGE = Stage(
    name="stack",
    version=4,
    config=Config,
    inputs={"model": Kind.MODEL},
    output=Kind.MODEL,
    run=run,
    model_of=grown_model,
)
