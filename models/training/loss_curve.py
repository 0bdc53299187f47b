"""The picture of a run: losses over the steps, with exact match or accuracy, scores of tasks and learning rate."""

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Columns = Mapping[str, Sequence[float]]
EVALUATION, CHANCE = "evaluation/", "chance/"
"""What the columns of a task's score and of what guessing gives it begin with, before its name."""
_POINTS = 2000
_TRAIN, _VALIDATION, _EXACT, _RATE, _TEXT = "#4c78a8", "#e4572e", "#2a9d6f", "#9aa0a6", "#3c4043"
_TASKS = ("#8e5ea2", "#c98a00", "#17a2b8", "#8c564b", "#d4549b")


def draw_loss_curve(training: Columns, validation: Columns, title: str = "") -> bytes:
    """A PNG of the columns of `training.csv` and `validation.csv`, as `models.training.metrics` writes them."""
    # Imported here: it takes longer than many a short run's set-up. The object interface keeps no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    losses = figure.add_subplot()
    fractions = losses.twinx()
    _draw_fractions(fractions, training, validation)
    _draw_losses(losses, training, validation)
    _dress(losses, fractions, title, "pair" if "accuracy" in training else "token")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _draw_losses(axes: Any, training: Columns, validation: Columns) -> None:
    steps, loss = _finite(training, "loss")
    if steps.size:
        axes.plot(_thin(steps), _thin(loss), color=_TRAIN, alpha=0.28, linewidth=0.8)
        axes.plot(_thin(steps), _smooth(_thin(loss)), color=_TRAIN, linewidth=1.8, label="training loss")
    at, measured = _finite(validation, "loss")
    if at.size:
        few = at.size <= 40
        axes.plot(
            at,
            measured,
            color=_VALIDATION,
            linewidth=1.2,
            marker="o" if few else None,
            markersize=4.5,
            label="validation loss",
        )
        best = int(measured.argmin())
        axes.plot(at[best], measured[best], "o", color="white", markeredgecolor=_VALIDATION, markersize=8, zorder=5)
        axes.annotate(
            f"{measured[best]:.4g}",
            (at[best], measured[best]),
            textcoords="offset points",
            xytext=(0, 10),
            ha="center",
            color=_VALIDATION,
            fontsize=9,
        )
    seen = np.concatenate([loss, measured])
    if seen.size:
        # A few wild values, as at the start or after a spike, shall not flatten everything else.
        low, high = float(seen.min()), float(np.percentile(seen, 99.5))
        margin = 0.06 * (high - low or 1.0)
        axes.set_ylim(max(0.0, low - margin) if low >= 0 else low - margin, high + 2 * margin)


def _draw_fractions(axes: Any, training: Columns, validation: Columns) -> None:
    steps, rate = _finite(training, "learning_rate_scale")
    if steps.size:
        axes.plot(steps, rate, color=_RATE, linewidth=0.9, linestyle=(0, (4, 2)), label="learning rate / peak")
    for column in ("exact_match", "accuracy"):
        at, share = _finite(validation, column)
        if at.size:
            label = column.replace("_", " ")
            axes.plot(at, share, color=_EXACT, linewidth=1.2, marker="s", markersize=4, label=label)
    _draw_tasks(axes, validation)
    axes.set_ylim(0, 1.05)


def _draw_tasks(axes: Any, validation: Columns) -> None:
    names = [column.removeprefix(EVALUATION) for column in validation if column.startswith(EVALUATION)]
    for name, color in zip(names, itertools.cycle(_TASKS), strict=False):
        at, share = _finite(validation, EVALUATION + name)
        if at.size:
            axes.plot(at, share, color=color, linewidth=1.2, marker="^", markersize=4.5, label=name)
        _, chance = _finite(validation, CHANCE + name)
        if len(names) == 1 and chance.size:
            axes.axhline(chance[-1], color=color, linewidth=0.8, linestyle=(0, (2, 3)), label=f"{name} by chance")


def _dress(losses: Any, fractions: Any, title: str, per: str) -> None:
    lines = [*losses.get_lines(), *fractions.get_lines()]
    named = [line for line in lines if not line.get_label().startswith("_")]
    if named:
        losses.legend(
            named,
            [line.get_label() for line in named],
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=4,
            frameon=False,
            fontsize=9,
            labelcolor=_TEXT,
        )
    losses.set_xlabel("step", color=_TEXT)
    losses.set_ylabel(f"loss per {per}", color=_TEXT)
    fractions.set_ylabel("fraction", color=_TEXT)
    losses.xaxis.get_major_locator().set_params(integer=True)
    losses.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    losses.grid(axis="y", color="#e8eaed", linewidth=0.8)
    losses.set_axisbelow(True)
    for axes in (losses, fractions):
        axes.tick_params(colors=_TEXT, labelsize=9, length=0)
        axes.margins(x=0.01)
        for name, spine in axes.spines.items():
            spine.set_visible(name == "bottom")
            spine.set_color("#bdc1c6")
    if title:
        losses.figure.suptitle(title, fontsize=12, color=_TEXT)


def _finite(columns: Columns, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    steps, values = (np.asarray(columns.get(column, ()), np.float64) for column in ("step", name))
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A weighted mean over some hundredths of the run around each value."""
    window = np.hanning(max(1, values.size // 25) + 2)[1:-1]
    weights = np.convolve(np.ones(values.size), window, "same")
    smoothed: NDArray[np.float64] = np.convolve(values, window, "same") / weights
    return smoothed


def _thin(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of neighbours, so that at most twice `_POINTS` values are left; the last few may be dropped."""
    together = max(1, values.size // _POINTS)
    means: NDArray[np.float64] = values[: values.size // together * together].reshape(-1, together).mean(1)
    return means
