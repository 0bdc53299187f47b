"""The picture of a corpus: how long its documents are."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Lengths = Sequence[tuple[int, int]]
_BARS = 60
_BAR, _MARK, _TEXT, _AXIS = "#4c78a8", "#e4572e", "#3c4043", "#bdc1c6"


def draw_lengths(splits: Mapping[str, Lengths], title: str) -> bytes:
    """A PNG with a histogram for each split over a logarithmic axis, its median and its longest document marked.

    `splits` has each length in tokens and how many documents have it, as `tokens.json` does; a length of 0 counts as 1.
    """
    # Imported here: it takes longer than many a short run's set-up. The object interface keeps no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [3.0 if number == 0 else 1.8 for number in range(len(splits))]
    figure = Figure(figsize=(9, 1.2 + sum(heights)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(splits), 1, height_ratios=heights)
    edges = _edges(splits)
    first = None
    for row, (split, lengths) in enumerate(splits.items()):
        axes = figure.add_subplot(grid[row, 0], sharex=first)
        first = first or axes
        _draw(axes, split, lengths, edges)
        _dress(axes, is_last=row == len(splits) - 1)
    figure.suptitle(title, fontsize=12, color=_TEXT)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _edges(splits: Mapping[str, Lengths]) -> NDArray[np.float64]:
    """The sides of the bars: of equal width where the axis is logarithmic, and never narrower than one token."""
    seen = [max(1, length) for lengths in splits.values() for length, _ in lengths]
    low, high = min(seen), max(seen) + 1
    edges = np.unique(np.ceil(np.geomspace(low, max(high, low * 2), _BARS + 1)))
    return np.asarray(edges, np.float64) - 0.5


def _draw(axes: Any, split: str, lengths: Lengths, edges: NDArray[np.float64]) -> None:
    values, documents = np.array(lengths, np.int64).T
    heights, _ = np.histogram(np.maximum(values, 1), edges, weights=documents)
    axes.stairs(heights, edges, fill=True, color=_BAR)
    axes.set_xscale("log")
    total = int(documents.sum())
    middle, longest = quantile(lengths, 0.5), int(values.max())
    marks = ((middle, f"median {middle:,}", "left", -2), (longest, f"longest {longest:,}", "right", -16))
    for place, text, side, below in marks:
        axes.axvline(max(place, 1), color=_MARK, linewidth=1.1, linestyle=(0, (4, 2)))
        axes.annotate(
            text,
            (max(place, 1), 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4 if side == "left" else -4, below),
            textcoords="offset points",
            ha=side,
            va="top",
            fontsize=9,
            color=_MARK,
        )
    # Room above the bars for what the marks say.
    axes.set_ylim(0, heights.max() * 1.4)
    axes.set_title(f"{split}: {total:,} documents", loc="left", fontsize=10, color=_TEXT)
    axes.set_ylabel("documents", color=_TEXT, fontsize=9)


def quantile(lengths: Lengths, share: float) -> int:
    """The shortest length that at least this share of the documents do not exceed."""
    values, documents = np.array(lengths, np.int64).T
    reached = np.cumsum(documents)
    return int(values[np.searchsorted(reached, share * reached[-1])])


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers along the axis, at least three where there are as many."""
    found: list[float] = []
    for digits in ((1,), (1, 2, 5), range(1, 10)):
        found = [digit * 10.0**power for power in range(20) for digit in digits if low <= digit * 10.0**power <= high]
        if len(found) >= 3:
            break
    return found


def _dress(axes: Any, is_last: bool) -> None:
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xticks(_ticks(*axes.get_xlim()))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.get_major_locator().set_params(integer=True, nbins=5)
    axes.grid(axis="y", color="#e8eaed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_TEXT, labelsize=9, length=0, which="both")
    axes.tick_params(labelbottom=is_last)
    if is_last:
        axes.set_xlabel("tokens of a document", color=_TEXT)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(_AXIS)
