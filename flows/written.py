"""A stage as a recipe writes it, and several rounds of growth, which a recipe writes as one stage.

`grown: {stage: grow, model: base, tokens: tokens, training: {…}, rounds: [{stack: {…}, refine: {…}}, …]}` stands for
the stages `grown-1-stacked`, `grown-1-refined`, `grown-2-stacked`, … and `grown`, which is the last round's refinement:
later stages name what came of it by the name that is written. What stands beside `rounds` (tokens, training, control,
worker, …) is for the refinements: `control` for the last, everything else for all that do not say otherwise. Each round
reads the rows in an order of its own, as a control goes on through them: where `training.seed` does not stand in the
round itself, it is the first from the shared one (or 0) on that no training before it has.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import Field, ValidationError

from common.config import FrozenModel
from common.errors import UserError
from flows.entry import StageEntry, training_of, trainings
from flows.problems import first_problem
from models.training.config import TrainingConfig

GROW = "grow"
"""The kind of stage that stands for several."""


class Written(NamedTuple):
    """A stage, and where its keys stand."""

    name: str
    """The stage's name."""
    keys: Mapping[str, Any]
    """Its keys."""
    where: str
    """The path of what holds them."""
    elsewhere: Mapping[str, str] = {}
    """The paths of what holds those that stand elsewhere, by key."""

    def place(self, problem: str) -> str:
        """A problem, or a key, that begins with a key's path in the stage, with its path in the recipe."""
        key = problem.partition(":")[0].partition(".")[0].partition(" ")[0]
        return f"{self.elsewhere.get(key, self.where)}.{problem}"


class Round(FrozenModel):
    """A round of growth."""

    stack: dict[str, Any] = {}  # noqa: RUF012 - frozen
    """The keys of its stage `stack`."""
    refine: dict[str, Any] = {}  # noqa: RUF012 - frozen
    """The keys of its stage `refine` that are not those of every round. A `training.seed` that stands here is kept;
    without, each round has another."""


class Rounds(FrozenModel):
    """Several rounds of growth, as they are written."""

    model: str
    """The stage whose model grows."""
    rounds: list[Round] = Field(min_length=1)
    """The rounds in order."""


def written(stages: Mapping[str, Mapping[str, Any]], before: Mapping[str, StageEntry]) -> Iterator[Written]:
    """The stages of a recipe in order, rounds of growth as the stages that they stand for.

    `before`: the entries of all stages that were given so far; the caller adds each before it asks for the next.

    Raises UserError for rounds that are not written as such, and for names that stand for two stages.
    """
    for name, keys in stages.items():
        grows = keys.get("stage") == GROW
        for one in _expanded(name, keys, before) if grows else [Written(name, keys, f"stages.{name}")]:
            if one.name != name and one.name in stages:
                raise UserError(f"stages.{name} makes a stage '{one.name}', which is there already; rename that")
            yield one


def _expanded(name: str, keys: Mapping[str, Any], before: Mapping[str, StageEntry]) -> Iterator[Written]:
    where = f"stages.{name}"
    try:
        rounds = Rounds.model_validate({key: keys[key] for key in ("model", "rounds") if key in keys})
    except ValidationError as error:
        raise UserError(f"{where}.{first_problem(error, Rounds)}") from error
    shared = {key: value for key, value in keys.items() if key not in ("stage", "model", "rounds", "control")}
    source, model_at = rounds.model, where
    for number, one in enumerate(rounds.rounds, 1):
        at = f"{where}.rounds.{number - 1}"
        for kind in ("stack", "refine"):
            for key in {"stage", "model"} & getattr(one, kind).keys():
                raise UserError(f"{at}.{kind}.{key}: a round grows what came before it, and refines that; leave it out")
        last = number == len(rounds.rounds)
        stacked, refined = f"{name}-{number}-stacked", name if last else f"{name}-{number}-refined"
        yield Written(stacked, {"stage": "stack", "model": source, **one.stack}, f"{at}.stack", {"model": model_at})
        own = {"control": keys["control"]} if last and "control" in keys else {}
        beside = {key: value for key, value in {**shared, **own}.items() if key not in one.refine}
        refine = {"stage": "refine", "model": stacked, **beside, **one.refine}
        training = refine.get("training")
        if isinstance(training, dict) and not ("training" in one.refine and "seed" in training):
            refine["training"] = _reseeded(training, before[stacked], before)
        yield Written(refined, refine, f"{at}.refine", dict.fromkeys(beside, where))
        source, model_at = refined, at


def _reseeded(training: dict[str, Any], grown: StageEntry, before: Mapping[str, StageEntry]) -> dict[str, Any]:
    """The training of a round, with a seed that none before it has."""
    seed = training.get("seed", TrainingConfig.model_fields["seed"].default)
    taken = [training_of(one).seed for one in trainings(grown, before)]
    while seed in taken:
        seed += 1
    return {**training, "seed": seed}
