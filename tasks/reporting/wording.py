"""Scores in words and figures, the same in every view of a report."""

import re
from collections.abc import Collection
from datetime import datetime

from tasks.reporting.report_data import Part, Provenance, Published, Series, Snapshot
from tasks.reporting.significance import Difference
from tasks.scores import NEAR, NONE, Score, figure

LEGEND = (
    "± is one standard error. Near chance: within two standard errors of what guessing gives; below chance: worse than "
    "that; near majority: within two standard errors of always giving the commonest answer, or worse."
)
GROUPED = (
    "The mean over a group's tasks, which count by their documents or each alike, as lm-eval defines the group; its "
    "standard error is pooled from theirs."
)
UNCERTAIN = "A question mark: the source does not say which of several such metrics it means."
_DIGEST = 12


def part_text(part: Part) -> str:
    """`31.2% (24–39)` where there is an interval, else as `Score.text`."""
    score = part.score
    if part.interval is None or score.value is None:
        return score.text
    low, high = (f"{100 * end:.0f}" if score.is_share else score.figure(end) for end in part.interval)
    return f"{score.figure(score.value)} ({low}–{high})"


def parts_legend(parts: Collection[Part]) -> str:
    """What the numbers of some parts are."""
    fewest, most = min(part.score.n for part in parts), max(part.score.n for part in parts)
    asked = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    ends = any(part.interval is not None for part in parts)
    return f"Each of {asked} documents{'; in brackets the 95% interval' if ends else ''}."


def signed(value: float, share: bool) -> str:
    """A difference with its sign, in points of per cent where it is one of shares."""
    shown = f"{100 * value:+.1f}" if share else f"{value:+.3g}"
    return shown.replace("-", "−") if float(shown) else shown[1:]


def interval_text(one: Difference) -> str:
    """The 95% interval of a difference."""
    low, high = one.interval
    return f"{signed(low, one.is_share)} to {signed(high, one.is_share)}"


def p_text(p: float) -> str:
    """A p as people write it."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def mark(score: Score) -> str:
    """What a reader has to know before believing in a score; nothing where there is nothing."""
    if score.value is None or score.standard_error is None:
        return ""
    if score.near_chance:
        return "below chance" if score.below_chance else "near chance"
    if score.majority is not None:
        better = score.value - score.majority if score.higher_is_better else score.majority - score.value
        return "near majority" if better <= NEAR * score.standard_error else ""
    return ""


def verdict(one: Difference, level: float) -> str:
    """Whether a difference is significant, in a word."""
    if one.is_fall(level):
        return "worse"
    return "better" if one.is_rise(level) else ""


def by_chance(count: int, level: float) -> str:
    """What a level says of many comparisons."""
    return (
        f"Marked where p < {level:g}; of {count} comparisons without any difference, {count * level:.2g} would be. "
        "Of few documents p is exact, and the interval is not."
    )


def shots(few_shot: int | None) -> str:
    """A few-shot count."""
    return NONE if few_shot is None else str(few_shot)


def published_text(one: Published, share: bool) -> str:
    """A published value, with a question mark where its source does not say whether it is of this very metric, and its
    few-shot count where that is known."""
    shown = figure(one.value, share) + ("" if one.certain else "?")
    return shown if one.few_shot is None else f"{shown} ({one.few_shot}-shot)"


def provenance_rows(provenance: Provenance) -> list[tuple[str, str]]:
    """How scores came about: what is known of it, by name."""
    rows = [
        ("few-shot", "" if provenance.num_fewshot is None else str(provenance.num_fewshot)),
        ("template", provenance.template or ""),
        ("task version", provenance.task_version or ""),
        ("lm-eval", provenance.lm_eval or ""),
        ("data", _data_text(sorted(provenance.data.items()))),
    ]
    return [(name, text) for name, text in rows if text]


def day(at: str) -> str:
    """The day of a time, whichever way ISO 8601 writes it."""
    return datetime.fromisoformat(at).date().isoformat()


def moment(snapshot: Snapshot, number: int) -> str:
    """When a snapshot was taken: its day, or its number, counted from 1."""
    return f"#{number}" if snapshot.at is None else day(snapshot.at)


def series_text(one: Series, others: Collection[Series]) -> str:
    """How the points of a series were asked: `n 500, 5-shot`, and the task's version and the data where others of the
    same measure have other ones."""
    alike = [other for other in others if (other.task, other.metric) == (one.task, one.metric)]
    told = [f"n {one.n:,}"]
    if one.few_shot is not None:
        told.append(f"{one.few_shot}-shot")
    if one.task_version is not None and len({other.task_version for other in alike}) > 1:
        told.append(f"version {one.task_version}")
    if one.data and len({other.data for other in alike}) > 1:
        told.append(_data_text(one.data))
    return ", ".join(told)


def _data_text(data: Collection[tuple[str, str]]) -> str:
    return ", ".join(f"{identity} {digest[:_DIGEST]}" for identity, digest in data)


def markdown(text: str) -> str:
    """Text in which Markdown and HTML find nothing of theirs, on one line."""
    return re.sub(r"[\\`*_\[\]<>&#|~!$]", r"\\\g<0>", " ".join(text.split()))
