"""Every stage by its name."""

from common.errors import UserError, suggestion
from tasks import (
    behaviour,
    benchmark,
    compare,
    documents,
    dpo,
    evaluate,
    perplexity,
    pretrain,
    pretrained,
    publish,
    refine,
    report,
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
        pretrained,
        pretrain,
        stack,
        refine,
        sft,
        dpo,
        evaluate,
        benchmark,
        perplexity,
        behaviour,
        publish,
        compare,
        report,
    )
}


def stage_named(name: str) -> Stage:
    """The stage of a name. Raises UserError with the nearest name for one that does not exist."""
    if name not in STAGES:
        raise UserError(f"there is no stage '{name}'{suggestion(name, STAGES)}")
    return STAGES[name]
