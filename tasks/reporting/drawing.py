"""The drawings of a report's page as inline SVG: bars with error bars, intervals, and lines over time.

Colours are classes of the page's style sheet, so that a drawing is light or dark as the page is. What a mark means
stands in its `title`, which browsers show on hover and screen readers say.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from tasks.reporting import wording
from tasks.reporting.report_data import Published, Snapshot
from tasks.reporting.significance import Difference
from tasks.scores import NEAR, Score

BAR_WIDTH, BAR_HEIGHT = 380, 30
NARROW_WIDTH, NARROW_HEIGHT = 210, 22
INTERVAL_WIDTH = 270
CHART_WIDTH, CHART_HEIGHT = 320, 170
_SIDE = 6
_CHART_LEFT, _CHART_RIGHT, _CHART_TOP, _CHART_BOTTOM = 46, 12, 10, 24


class Axis(NamedTuple):
    """A scale from values to places."""

    low: float
    high: float
    begin: float
    """The place of `low`."""
    end: float
    """The place of `high`."""

    def at(self, value: float) -> float:
        """The place of a value, at an end where it lies beyond it."""
        part = (value - self.low) / (self.high - self.low)
        return self.begin + min(max(part, 0.0), 1.0) * (self.end - self.begin)


def bar(
    score: Score,
    references: Sequence[Published] = (),
    narrow: bool = False,
    interval: tuple[float, float] | None = None,
) -> str:
    """A score as a bar with its interval, or with two standard errors to either side; chance and majority class across
    it, and what was published of others as ticks above it. A share is drawn from 0 to 100%, anything else from 0 to the
    largest of them."""
    if score.value is None:
        return ""
    share = score.is_share
    width, height = (NARROW_WIDTH, NARROW_HEIGHT) if narrow else (BAR_WIDTH, BAR_HEIGHT)
    error = NEAR * (score.standard_error or 0.0)
    reached = interval or (score.value - error, score.value + error)
    axis = Axis(0.0, 1.0 if share else _largest(score, references), _SIDE, width - _SIDE)
    top, bottom = (5, height - 5) if narrow else (11, height - 4)
    middle = (top + bottom) / 2
    zero, end = axis.at(0.0), axis.at(score.value)
    parts = [
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 2}" y2="{bottom + 2}"/>' for x in _quarters(axis)
    ]
    parts.append(
        f'<rect class="{"bar doubtful" if wording.mark(score) else "bar"}" x="{zero:.1f}" y="{top}" '
        f'width="{max(end - zero, 0.5):.1f}" height="{bottom - top}"><title>{_said(score)}</title></rect>'
    )
    if error or interval:
        low, high = map(axis.at, reached)
        ends = f"M{low:.1f},{middle - 3}v6M{high:.1f},{middle - 3}v6"
        parts.append(f'<path class="error" d="{ends}M{low:.1f},{middle}H{high:.1f}"/>')
    for kind, value in (("majority", score.majority), ("chance", score.chance)):
        if value is not None:
            x, told = axis.at(value), f"{kind}: {score.figure(value)}"
            parts.append(
                f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 3}" y2="{bottom + 3}">'
                f"<title>{told}</title></line>"
            )
    parts += [_tick(axis.at(one.value), f"{one.model}: {wording.published_text(one, share)}") for one in references]
    return _svg(width, height, _said(score), parts)


def _said(score: Score) -> str:
    return escape(f"{score.task if score.group is None else score.group}: {score.text}")


def _largest(score: Score, references: Sequence[Published]) -> float:
    values = [score.value, score.chance, score.majority, *(one.value for one in references)]
    return 1.1 * max((value for value in values if value is not None), default=0.0) or 1.0


def _quarters(axis: Axis) -> list[float]:
    return [axis.begin + part / 4 * (axis.end - axis.begin) for part in range(5)]


def _tick(x: float, told: str) -> str:
    """A small triangle that points at a place from above."""
    return f'<path class="tick" d="M{x - 4:.1f},1h8l-4,8z"><title>{escape(told)}</title></path>'


def bar_heading() -> str:
    """The scale of shares, for the head of a column of bars."""
    return _heading(BAR_WIDTH, [f"{25 * number}%" for number in range(5)])


def interval_heading(reach: float, share: bool) -> str:
    """The scale of intervals that ends at `reach` on both sides, for the head of their column."""
    return _heading(INTERVAL_WIDTH, [wording.signed(value, share) for value in (-reach, 0.0, reach)])


def _heading(width: int, labels: Sequence[str]) -> str:
    """Labels evenly along a scale, the first and the last within the drawing."""
    last = len(labels) - 1
    parts = []
    for number, label in enumerate(labels):
        anchor = {0: "start", last: "end"}.get(number, "middle")
        x = {0: 0, last: width}.get(number, _SIDE + number / last * (width - 2 * _SIDE))
        parts.append(f'<text x="{x:.1f}" y="13" text-anchor="{anchor}">{label}</text>')
    return _svg(width, 16, "scale", parts)


def interval(one: Difference, reach: float, kind: str) -> str:
    """A difference with its 95% interval beside zero, on a scale that ends at `reach` on both sides; `kind` is the
    class that it is coloured by."""
    axis = Axis(-reach, reach, _SIDE, INTERVAL_WIDTH - _SIDE)
    low, high = (axis.at(end) for end in one.interval)
    middle = NARROW_HEIGHT / 2
    said = f"{wording.signed(one.difference, one.is_share)}, 95% interval {wording.interval_text(one)}"
    zero = axis.at(0.0)
    parts = [
        f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="{NARROW_HEIGHT}"/>',
        f'<path class="interval {kind}" d="M{low:.1f},{middle - 4}v8M{high:.1f},{middle - 4}v8'
        f'M{low:.1f},{middle}H{high:.1f}"/>',
        f'<circle class="point {kind}" cx="{axis.at(one.difference):.1f}" cy="{middle}" r="4">'
        f"<title>{escape(said)}</title></circle>",
    ]
    return _svg(INTERVAL_WIDTH, NARROW_HEIGHT, escape(said), parts)


def reach(differences: Sequence[Difference]) -> float:
    """How far a scale has to reach to either side for all intervals."""
    return max((abs(end) for one in differences for end in one.interval), default=0.0) or 1.0


def chart(points: Sequence[tuple[Snapshot, Score]]) -> str:
    """Scores over time in the order that they were measured in, within a band of two standard errors, and chance where
    it lies in the picture."""
    values = [(score.value or 0.0, NEAR * (score.standard_error or 0.0)) for _, score in points]
    last = points[-1][1]
    low, high = min(value - error for value, error in values), max(value + error for value, error in values)
    margin = max(0.08 * (high - low), 0.01 * abs(high), 1e-3)
    across = Axis(0, len(points) - 1, _CHART_LEFT, CHART_WIDTH - _CHART_RIGHT)
    up = Axis(low - margin, high + margin, CHART_HEIGHT - _CHART_BOTTOM, _CHART_TOP)
    parts = [_level(up, value, last.figure(value)) for value in round_values(up.low, up.high)]
    places = [(across.at(number), value, error) for number, (value, error) in enumerate(values)]
    upper = [f"{x:.1f},{up.at(value + error):.1f}" for x, value, error in places]
    lower = [f"{x:.1f},{up.at(value - error):.1f}" for x, value, error in reversed(places)]
    parts.append(f'<polygon class="band" points="{" ".join([*upper, *lower])}"/>')
    chance = last.chance
    if chance is not None and up.low < chance < up.high:
        y = up.at(chance)
        parts.append(
            f'<line class="chance" x1="{_CHART_LEFT}" x2="{CHART_WIDTH - _CHART_RIGHT}" y1="{y:.1f}" y2="{y:.1f}">'
            f"<title>chance: {last.figure(chance)}</title></line>"
        )
    parts.append(
        f'<polyline class="line" points="{" ".join(f"{x:.1f},{up.at(value):.1f}" for x, value, _ in places)}"/>'
    )
    for number, ((x, value, _), (snapshot, score)) in enumerate(zip(places, points, strict=True), 1):
        told = f"{wording.moment(snapshot, number)}: {score.text}"
        parts.append(
            f'<circle class="point" cx="{x:.1f}" cy="{up.at(value):.1f}" r="3.5"><title>{escape(told)}</title></circle>'
        )
    for number, x, anchor in ((1, _CHART_LEFT, "start"), (len(points), CHART_WIDTH - _CHART_RIGHT + 6, "end")):
        day = escape(wording.moment(points[number - 1][0], number))
        parts.append(f'<text x="{x}" y="{CHART_HEIGHT - 6}" text-anchor="{anchor}">{day}</text>')
    return _svg(CHART_WIDTH, CHART_HEIGHT, escape(f"{last.task} over time, {last.text} at last"), parts)


def _level(up: Axis, value: float, text: str) -> str:
    y = up.at(value)
    return (
        f'<line class="grid" x1="{_CHART_LEFT}" x2="{CHART_WIDTH - _CHART_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_CHART_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def round_values(low: float, high: float) -> list[float]:
    """Two to five round numbers from `low` to `high`, which differ."""
    step = 10.0 ** math.floor(math.log10(high - low))
    if (high - low) / step < 2:
        step /= 2
    elif (high - low) / step > 5:
        step *= 2
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )
