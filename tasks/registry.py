"""Every stage by its name."""

from common.errors import UserError, suggestion
from tasks import (
    behaviour,
    compare,
    documents,
    dpo,
    evaluate,
    perplexity,
    pretrain,
    publish,
    refine,
    sft,
    stack,
    tokenizer,
    tokens,
)
from tasks.stage import Stage

STAGES: dict[str, Stage] = {
    module.STAGE.name: module.STAGE
    for module in (
        documents,
        tokenizer,
        tokens,
        pretrain,
        stack,
        refine,
        sft,
        dpo,
        evaluate,
        perplexity,
        behaviour,
        publish,
        compare,
    )
}


def stage_named(name: str) -> Stage:
    """The stage of a name. Raises UserError with the nearest name for one that does not exist."""
    if name not in STAGES:
        raise UserError(f"there is no stage '{name}'{suggestion(name, STAGES)}")
    return STAGES[name]
