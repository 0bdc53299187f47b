"""What growth did, as tables that fit 80 columns: of each growth of a run, and of models side by side."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from artifacts.record import Record
from tasks.comparison import Compared, flops_text, lowest, verdict
from tasks.growth_record import GrowthRecord

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def growth_table(records: Mapping[str, Record]) -> Table | None:
    """What the growths of a run did to loss, parameters and FLOPs, by the stage that refined each; None without any."""
    found = {
        stage: GrowthRecord.model_validate(record.metrics["growth"])
        for stage, record in records.items()
        if record.metrics.get("growth") is not None
    }
    if not found:
        return None
    table = _table("What growth did")
    for column in ("stage", "grown by"):
        table.add_column(column, overflow="fold")
    for column in ("parameters", "FLOPs/token", "before", "after", "end", "back at"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage, growth in found.items():
        table.add_row(
            Text(stage),
            Text(growth.operator),
            f"{_short(growth.parameters_before)}→{_short(growth.parameters_after)}",
            f"{_short(growth.flops_per_token_before)}→{_short(growth.flops_per_token_after)}",
            *(_loss(loss) for loss in (growth.loss_before, growth.loss_right_after, growth.loss_at_end)),
            _back(growth),
        )
    every = sorted({growth.validated_every for growth in found.values() if growth.validated_every is not None})
    spacing = f", validated every {' or '.join(f'{steps:,}' for steps in every)}" if every else ""
    lines = [
        f"Losses before growth, right after, at the end; back at: refinement steps until it is as before{spacing}.",
        *(f"{stage}: {growth.note}" for stage, growth in found.items() if growth.note),
    ]
    table.caption = Text("\n".join(lines))
    return table


def comparison_table(record: Record) -> Table:
    """Models side by side, and what growth saved or cost against controls."""
    rows: Any = record.metrics["models"]
    models = [Compared.model_validate({**row, "phases": []}) for row in rows]
    table = _table(record.name)
    for column in ("model", "grown by", "moments"):
        table.add_column(column, overflow="fold")
    verdicts = [said for model in models if (said := verdict(model)) is not None]
    for column in ("before", "after", "end", "FLOPs", *(("of\nscratch", "loss\nbeside") if verdicts else ())):
        table.add_column(column, justify="right", no_wrap=True)
    best = lowest(models)
    for model in models:
        last = model.growths[-1] if model.growths else None
        table.add_row(
            Text(model.name),
            Text(", ".join(growth.operator for growth in model.growths)),
            Text(_moments(last)),
            *(("", "") if last is None else (_loss(last.loss_before), _loss(last.loss_right_after))),
            Text(_loss(model.loss), style="bold" if model is best else ""),
            flops_text(model.flops),
            *(_against(model) if verdicts else ()),
        )
    legend = (
        "Losses before growth, right after, at the end. Of scratch: FLOPs as a part of what training from scratch "
        "takes to the same loss. Loss beside: how much more it is than from scratch with the same FLOPs."
    )
    table.caption = Text("\n".join([legend, *(verdicts if len(verdicts) <= 4 else ())]) if verdicts else "")
    return table


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        header_style="dim",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0),
        pad_edge=False,
    )


def _moments(growth: GrowthRecord | None) -> str:
    """What became of the optimizer's state, short."""
    return (
        {"copy-momentum": "momentum"}.get(growth.optimizer_state or "", growth.optimizer_state or "?") if growth else ""
    )


def _against(model: Compared) -> tuple[Any, Any]:
    against = model.against
    if against is None:
        return "", ""
    part: Any = "—"
    if against.flops_for_same_loss is None:
        part = Text(f"<{model.flops / against.flops_at_most:.0%}", style="green")
    elif against.ratio is not None:
        part = Text(f"{against.ratio:.0%}", style="green" if against.ratio < 1 else "red")
    if against.difference is None:
        return part, "—"
    return part, Text(f"{against.difference:+.3f}", style="green" if against.difference < 0 else "red")


def _loss(loss: float | None) -> str:
    return "—" if loss is None else f"{loss:.3f}"


def _back(growth: GrowthRecord) -> str:
    if growth.steps_until_back is not None:
        return f"{growth.steps_until_back:,}"
    return "—" if growth.loss_before is None else "never"


def _short(number: float) -> str:
    """Three figures: 98.9M."""
    for limit, unit in _UNITS:
        if number >= 0.9995 * limit:  # what rounds to 1000 is one of the next unit
            return f"{number / limit:.3g}{unit}"
    return f"{number:.0f}"
