"""The lineage as one self-contained HTML page: a picture of what was made from what, and all details below."""

import json
from collections.abc import Iterable, Mapping
from html import escape
from itertools import pairwise
from typing import Any

from artifacts.lineage import SHORT, Node, walk
from artifacts.record import Record

BOX_WIDTH, BOX_HEIGHT = 300, 66
GAP_X, GAP_Y = 28, 46
MARGIN = 16
_TITLE_LETTERS, _TEXT_LETTERS = 30, 44

_STYLE = """
:root { color-scheme: light dark;
  --paper: #fbfaf8; --ink: #22262b; --quiet: #6a7078; --line: #c9c4bb; --stone: #ffffff; --mark: #2f6f62; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #16181b; --ink: #e6e4df; --quiet: #9aa0a8; --line: #41464d; --stone: #1f2327; --mark: #7cc4b3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2.5rem 0 .75rem; }
p, dt, .quiet { color: var(--quiet); }
p { margin: .25rem 0 1.5rem; }
code, pre, td { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .86em; }
.picture { overflow-x: auto; border: 1px solid var(--line); border-radius: 12px; background: var(--stone); }
svg { display: block; margin: 0 auto; }
svg a rect { fill: var(--paper); stroke: var(--line); }
svg a:hover rect, svg a:focus rect { stroke: var(--mark); stroke-width: 2; }
svg .root rect { stroke: var(--mark); stroke-width: 2; }
svg text { fill: var(--quiet); font-size: 12px; }
svg .title { fill: var(--ink); font-size: 13.5px; font-weight: 600; }
svg path { fill: none; stroke: var(--line); stroke-width: 1.5; }
details { border: 1px solid var(--line); border-radius: 10px; background: var(--stone); margin: .5rem 0; }
details:target { border-color: var(--mark); }
summary { cursor: pointer; padding: .6rem .9rem; overflow-wrap: anywhere; }
summary b { margin-right: .5rem; }
dl { display: grid; grid-template-columns: 9rem 1fr; gap: .3rem 1rem; margin: 0; padding: .25rem .9rem 1rem; }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
pre { margin: 0; white-space: pre-wrap; }
table { border-collapse: collapse; }
td { padding: 0 1.25rem 0 0; vertical-align: top; }
td.number { text-align: right; }
"""


def to_html(root: Node) -> str:
    """The whole page as text. It loads nothing, runs no script, and escapes all that comes from records."""
    nodes = list(walk(root))
    title = f"Lineage of {root.label}"
    details = "\n".join(_details(node, is_root=node is root) for node in nodes)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p>{len(nodes)} artifacts, from the result at the top down to the sources that it was made from.</p>
<div class="picture">
{_picture(root, nodes)}
</div>
<h2>Artifacts</h2>
{details}
</body>
</html>
"""


def _picture(root: Node, nodes: list[Node]) -> str:
    layout = _Layout(nodes)
    lines = [
        f'<path d="{layout.line(node.key, child.key)}"><title>{escape(name)}</title></path>'
        for node in nodes
        for name, child in node.inputs.items()
    ]
    boxes = [_box(node, *layout.corner(node.key), is_root=node is root) for node in nodes]
    return (
        f'<svg width="{layout.width:.0f}" height="{layout.height:.0f}" '
        f'viewBox="0 0 {layout.width:.0f} {layout.height:.0f}" role="img" '
        'aria-label="What was made from what">\n' + "\n".join(lines + boxes) + "\n</svg>"
    )


# In a row stand boxes, by key, and the lines that pass it, by user, source and level.
_Spot = str | tuple[str, str, int]


class _Layout:
    """Where boxes and lines lie: inputs always below what was made of them, and no line behind a box."""

    def __init__(self, nodes: list[Node]) -> None:
        self._levels = _levels(nodes)
        rows: dict[int, list[_Spot]] = {}
        above: dict[_Spot, list[_Spot]] = {}
        for node in nodes:
            rows.setdefault(self._levels[node.key], []).append(node.key)
        for node in nodes:
            for child in node.inputs.values():
                spots = self._spots(node.key, child.key)
                for upper, lower in pairwise(spots):
                    above.setdefault(lower, []).append(upper)
                for level, spot in enumerate(spots[1:-1], self._levels[node.key] + 1):
                    rows[level].append(spot)
        self.width = max(map(_row_width, rows.values())) + 2 * MARGIN
        self.height = len(rows) * (BOX_HEIGHT + GAP_Y) - GAP_Y + 2 * MARGIN
        self._middle: dict[_Spot, float] = {}
        for _, row in sorted(rows.items()):
            # Under the middle of what uses them, so that lines cross seldom.
            wish = {spot: self._mean(above.get(spot, [])) for spot in row}
            row.sort(key=wish.__getitem__)
            left = (self.width - _row_width(row)) / 2
            for spot in row:
                self._middle[spot] = left + _spot_width(spot) / 2
                left += _spot_width(spot) + GAP_X

    def _mean(self, spots: list[_Spot]) -> float:
        known = [self._middle[spot] for spot in spots if spot in self._middle]
        return sum(known) / len(known) if known else self.width / 2

    def _spots(self, user: str, source: str) -> list[_Spot]:
        between = range(self._levels[user] + 1, self._levels[source])
        return [user, *((user, source, level) for level in between), source]

    def corner(self, key: str) -> tuple[float, float]:
        """The upper left corner of an artifact's box."""
        return self._middle[key] - BOX_WIDTH / 2, MARGIN + self._levels[key] * (BOX_HEIGHT + GAP_Y)

    def line(self, user: str, source: str) -> str:
        """The path from under `user` to the top of `source`, straight where it passes a row."""
        top = self.corner(user)[1] + BOX_HEIGHT
        parts = [f"M{self._middle[user]:.1f},{top:.1f}"]
        for upper, lower in pairwise(self._spots(user, source)):
            x1, x2, half = self._middle[upper], self._middle[lower], top + GAP_Y / 2
            parts.append(f"C{x1:.1f},{half:.1f} {x2:.1f},{half:.1f} {x2:.1f},{top + GAP_Y:.1f}")
            top += GAP_Y + BOX_HEIGHT
            if lower != source:
                parts.append(f"L{x2:.1f},{top:.1f}")
        return " ".join(parts)


def _spot_width(spot: _Spot) -> float:
    return BOX_WIDTH if isinstance(spot, str) else 0


def _row_width(row: list[_Spot]) -> float:
    return sum(map(_spot_width, row)) + (len(row) - 1) * GAP_X


def _levels(nodes: list[Node]) -> dict[str, int]:
    """Each artifact's row: one below the lowest that uses it."""
    levels = {node.key: 0 for node in nodes}
    # As many rounds as there are rows; bounded, in case records from elsewhere form a ring.
    for _ in nodes:
        before = dict(levels)
        for node in nodes:
            for child in node.inputs.values():
                levels[child.key] = max(levels[child.key], levels[node.key] + 1)
        if levels == before:
            break
    rows = {level: index for index, level in enumerate(sorted(set(levels.values())))}
    return {key: rows[level] for key, level in levels.items()}


def _box(node: Node, x: float, y: float, *, is_root: bool) -> str:
    stage = node.record.stage if node.record else "record is gone"
    numbers = node.record.summary if node.record else ""
    lines = [
        ("title", 22, _cut(node.label, _TITLE_LETTERS)),
        ("", 40, f"{stage} · {node.key[:SHORT]}"),
        ("", 56, numbers),
    ]
    texts = "".join(
        f'<text class="{kind}" x="{x + 12:.1f}" y="{y + down:.1f}">{escape(_cut(text, _TEXT_LETTERS))}</text>'
        for kind, down, text in lines
        if text
    )
    return (
        f'<a href="#{escape(node.key)}" class="{"root" if is_root else "stage"}">'
        f"<title>{escape(node.label)}</title>"
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="14"/>{texts}</a>'
    )


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _details(node: Node, *, is_root: bool) -> str:
    stage = escape(node.record.stage) if node.record else "record is gone"
    rows = _rows(node, node.record) if node.record else [("content", f"<code>{escape(node.output)}</code>")]
    terms = "\n".join(f"<dt>{escape(term)}</dt><dd>{text}</dd>" for term, text in rows)
    about = f'<span class="quiet">{stage} · {escape(node.key[:SHORT])}</span>'
    return (
        f'<details id="{escape(node.key)}"{" open" if is_root else ""}>\n'
        f"<summary><b>{escape(node.label)}</b>{about}</summary>\n"
        f"<dl>\n{terms}\n</dl>\n</details>"
    )


def _rows(node: Node, record: Record) -> list[tuple[str, str]]:
    """The terms and their HTML for one record; what it does not say is left out."""
    seconds = (record.ended - record.started).total_seconds()
    commit = record.git_commit and f"{record.git_commit}{' with changes' if record.git_dirty else ''}"
    inputs = (
        (name, f'<a href="#{escape(child.key)}">{escape(child.label)}</a>') for name, child in node.inputs.items()
    )
    files = (
        (name, f'<td class="number">{entry.size:,}</td><td>{entry.sha256[:SHORT]}</td>')
        for name, entry in sorted(record.files.items())
    )
    rows = [
        ("names", escape(", ".join(node.names))),
        ("key", f"<code>{record.key}</code>"),
        ("content", f"<code>{node.output}</code>" + (" (made again since, with other content)" if node.remade else "")),
        ("made", escape(f"{record.started:%Y-%m-%d %H:%M} UTC{record.started:%z}, {seconds:,.1f} s")),
        ("engine", escape(record.engine or "")),
        ("commit", escape(commit or "")),
        ("notes", "<br>".join(escape(note) for note in record.notes)),
        ("inputs", _table((name, f"<td>{cell}</td>") for name, cell in inputs)),
        ("metrics", _json(record.metrics)),
        ("config", _json(record.config)),
        ("hardware", _json(record.hardware)),
        ("packages", _json(record.packages)),
        ("files", _table(files)),
    ]
    return [(term, text) for term, text in rows if text]


def _table(rows: Iterable[tuple[str, str]]) -> str:
    """A table of a name and the HTML of its cells."""
    cells = "".join(f"<tr><td>{escape(name)}</td>{cell}</tr>" for name, cell in rows)
    return f"<table>{cells}</table>" if cells else ""


def _json(value: Mapping[str, Any]) -> str:
    return f"<pre>{escape(json.dumps(value, indent=2, ensure_ascii=False))}</pre>" if value else ""
