"""The picture of a comparison: validation loss against training FLOPs, a line for each model."""

import io
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasks.comparison import Compared, Phase, Point

_COLOURS = (
    *("#4c78a8", "#e4572e", "#2a9d6f", "#b279a2", "#eeb42b", "#17a2b8", "#9c6b4e", "#d6568c", "#7a8b2a", "#5b5fc7"),
    *("#f28e6b", "#86bcb6", "#8c8c3a", "#a3a3f0", "#c44e52", "#55a868", "#64b5cd", "#ccb974", "#8172b2", "#6b4c9a"),
)
_CONTROL, _SHARED, _TEXT, _FRAME, _GRID = "#202124", "#9aa0a6", "#3c4043", "#bdc1c6", "#e8eaed"
_DASHES = ((0, (5, 2)), (0, (2, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1.5, 1.5, 1.5, 1.5)))
_MOMENTS: Mapping[str | None, Any] = {"copy": "-", "copy-momentum": (0, (3.5, 1.5)), "reset": (0, (1.2, 1.2))}
_EARLY = 0.15
"""The part of the FLOPs whose losses may lie above the picture: the first ones would flatten all others."""


def draw_comparison(models: Sequence[Compared], title: str = "") -> bytes:
    """A PNG: models that grew in colours, with a mark where they grew; those that never did in black dashes; what
    several share, a base above all, in grey. The legend has the losses in the end."""
    # Imported here: it takes longer than many a short run's set-up. The object interface keeps no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 1 + len(models) // 24
    figure = Figure(figsize=(9 + 2 * columns, max(5.5, 1.5 + 0.19 * len(models) / columns)), dpi=150)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shared = Counter(phase for model in models for phase in model.phases)
    lines = {
        model.name: _draw_model(axes, model, style, shared)
        for model, style in zip(models, _styles(models), strict=True)
    }
    _limit(axes, models)
    _dress(axes, title)
    _legend(axes, models, lines, columns)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _styles(models: Sequence[Compared]) -> Iterator[dict[str, Any]]:
    """How each model is drawn: a colour for each operator, and a line for what became of the moments, where these two
    tell all models apart, else a colour for each; dashes for those that never grew."""
    kinds = Counter(_kind(model) for model in models if model.growths)
    by_kind = max(kinds.values(), default=0) == 1
    colours: dict[object, str] = {}
    controls = itertools.cycle(_DASHES)
    for model in models:
        if not model.growths:
            yield {"color": _CONTROL, "linestyle": next(controls), "linewidth": 1.5}
            continue
        operators, state = _kind(model)
        colour = colours.setdefault(operators if by_kind else model.name, _COLOURS[len(colours) % len(_COLOURS)])
        yield {"color": colour, "linestyle": _MOMENTS.get(state, "-") if by_kind else "-", "linewidth": 1.6}


def _kind(model: Compared) -> tuple[tuple[str, ...], str | None]:
    """The operators that a model grew by, and what became of the moments in the end."""
    return tuple(growth.operator for growth in model.growths), model.growths[-1].optimizer_state


def _draw_model(axes: Any, model: Compared, style: dict[str, Any], shared: Counter[Phase]) -> Any:
    """Draws a model's phases; gives the line that stands for it in the legend."""
    few = len(_finite(model.phases[-1].points)) <= 30
    (line,) = axes.plot([], [], **style, marker="o" if few else None, markersize=3)
    previous: Point | None = None
    for phase in model.phases:
        points = _finite(phase.points)
        if not points:
            continue
        if phase.after_growth and previous is not None:
            jump = [previous, points[0]]
            colour = style["color"]
            axes.plot(*_columns(jump), color=colour, linewidth=0.9, linestyle=(0, (1, 1.5)), alpha=0.8)
            axes.plot(*_columns(points[:1]), "^", color=colour, markersize=6, markeredgecolor="white", zorder=4)
        own = {**style, "color": _SHARED, "linewidth": 1.2} if shared[phase] > 1 else style
        axes.plot(*_columns(points), **own, marker="o" if few else None, markersize=3)
        previous = points[-1]
    if previous is not None:
        axes.plot(*_columns([previous]), "o", color="white", markeredgecolor=style["color"], markersize=6.5, zorder=5)
    return line


def _finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point.loss)]


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.flops for point in points], [point.loss for point in points]


def _all(models: Sequence[Compared]) -> Iterator[tuple[Phase, Point]]:
    for model in models:
        for phase in model.phases:
            for point in _finite(phase.points):
                yield phase, point


def _limit(axes: Any, models: Sequence[Compared]) -> None:
    """Leaves out what is above all that matters: losses of the first steps."""
    points = list(_all(models))
    if not points:
        return
    most = max(point.flops for _, point in points)
    late = [point.loss for _, point in points if point.flops >= _EARLY * most]
    grown = [phase.points[0].loss for phase, _ in points if phase.after_growth and math.isfinite(phase.points[0].loss)]
    low = min(point.loss for _, point in points)
    high = max(late)
    # A growth that throws the model far back shall not flatten everything else either.
    high = max(high, min(max(grown, default=high), low + 2.5 * (high - low)))
    margin = 0.05 * (high - low or 1.0)
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(0, 1.02 * most)


def _dress(axes: Any, title: str) -> None:
    axes.set_xlabel("training FLOPs", color=_TEXT)
    axes.set_ylabel("validation loss per token", color=_TEXT)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_TEXT, labelsize=9, length=0)
    axes.xaxis.get_offset_text().set_color(_TEXT)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(_FRAME)
    if title:
        axes.figure.suptitle(title, fontsize=12, color=_TEXT)


def _legend(axes: Any, models: Sequence[Compared], lines: dict[str, Any], columns: int) -> None:
    """The models by their loss in the end, the highest first, as their lines end."""
    ordered = sorted(models, key=lambda model: -model.loss if math.isfinite(model.loss) else -math.inf)
    axes.legend(
        [lines[model.name] for model in ordered],
        [f"{model.loss:.3f}  {model.name}" for model in ordered],
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        ncols=columns,
        frameon=False,
        handlelength=3.2,
        fontsize=9 if len(models) <= 12 else 8,
        labelcolor=_TEXT,
    )
