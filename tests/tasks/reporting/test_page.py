"""The page of a report: it stands alone, shows what it has to, and believes no name."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.reporting import drawing
from tasks.reporting.page import to_html
from tasks.reporting.report_data import Evaluation, Report, Snapshot
from tasks.scores import Score
from tests.tasks.reporting.made import BAD, difference, published, report, score, task_group

VOID = ("meta", "br")


class Reader(HTMLParser):
    """Collects a page's tags, classes, links and text, and whether tags nest."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.classes: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            self.attributes.add(name)
            if name == "id":
                self.ids.append(value or "")
            if name == "class":
                self.classes += (value or "").split()
            if name in ("href", "src", "xlink:href", "action"):
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_stands_alone() -> None:
    text = to_html(report())
    page = read(text)
    assert not {"script", "img", "link", "iframe", "object", "form"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text
    sources = [link for link in page.links if not link.startswith("#")]
    assert sources == ["https://example.org/card"] * 2
    assert {link.removeprefix("#") for link in page.links if link.startswith("#")} == set(page.ids)
    assert len(page.ids) == 2
    assert not [name for name in page.attributes if name.startswith("on")]


def test_names_are_text() -> None:
    page = read(to_html(report(BAD)))
    assert "script" not in page.tags
    # The page's own bold name of the model, and no other.
    assert page.tags.count("b") == 1
    assert page.text.count(BAD) > 10
    assert not [name for name in page.attributes if name.startswith("on")]


@pytest.mark.parametrize("url", ["javascript:alert(1)", "data:text/html,x", "JavaScript:x", " https://x", BAD])
def test_what_is_no_address_of_the_web_is_no_link(url: str) -> None:
    page = read(to_html(report(references=(published(task="elite-112m", url=url),))))
    assert page.links == ["#source-1"]
    assert url in page.text


def test_everything_is_shown() -> None:
    page = read(to_html(report()))
    for told in (
        "40.0% ± 1.0",
        "near chance",
        "below chance",
        "near majority",
        "42.3 ± 1.2",
        "∞",
        "elite-112m: 43.8% (0-shot)",
        "41.0%?",
        "A card",
        "lm-eval",
        "abababababab",
        "−10.0",
        "−13.9 to −6.1",
        "< 0.001",
        "worse",
        "better",
        "by part",
        "digits",
        "100.0% (86–100)",
        "in brackets the 95% interval",
        "1 significantly above it, 1 part significantly below",
        "6 tasks with 7 scores, 2 within two standard errors of chance or below, 2 significantly below elite-112m",
    ):
        assert told in page.text, told
    assert page.classes.count("tick") == 1 + 2  # of the legend, and of two models
    assert page.tags.count("polyline") == 6


def test_what_there_is_none_of_has_no_heading() -> None:
    bare = Report(title="t", model="m", evaluations=(Evaluation(name="e", scores=(score(),)),))
    page = read(to_html(bare))
    assert page.tags.count("h2") == 1
    assert page.tags.count("table") == 1
    assert {"chance", "majority", "tick", "doubtful"} & set(page.classes) == set()


def test_groups_come_first_beside_what_was_published_of_them() -> None:
    groups = (task_group("sums", "copa", "boolq"), task_group(BAD, "copa"))
    grouped = report(groups=groups, references=(published(task="sums"), published(task=BAD, model=BAD)))
    text = to_html(grouped)
    page = read(text)
    assert "<script" not in text
    assert page.text.index("Groups of tasks") < page.text.index("Scores")
    assert page.text.count("near or below chance or majority") == 1
    row = text[text.index("sums <span") :].partition("</tr>")[0]
    assert "GPT-2 124M: 43.8% (0-shot)" in row
    assert ">56.0% ± 2.5</td>" in row
    assert '<td class="number">2</td><td class="number">4,752</td>' in row
    assert page.classes.count("tick") == 1 + 2
    values = text.partition("<h2>Published values</h2>")[2]
    assert values.index("sums <span") < values.index('id="source-1"')


def test_only_what_is_of_one_scale_shares_one() -> None:
    both = (difference(), difference(1.1, 1.0, metric="bits_per_byte", higher_is_better=False))
    assert read(to_html(report(differences=both, references=(), history=()))).text.count("95% interval") > 2
    tables = to_html(report(differences=both)).count("95% interval</th>")
    assert tables == 2


numbers = st.floats(-1e6, 1e6)
errors = st.none() | st.floats(0, 1e6)


def inside(svg: str) -> None:
    """Whether all that is drawn lies within the drawing."""
    width, height = map(float, re.findall(r'viewBox="0 0 (\S+) (\S+)"', svg)[0])
    for names, limit in ((("x", "x1", "x2", "cx"), width), (("y", "y1", "y2", "cy"), height)):
        for name in names:
            for value in re.findall(rf' {name}="([^"]*)"', svg):
                assert -0.1 <= float(value) <= limit + 0.1, (name, value)
    for x, y in re.findall(r"([-\d.]+),([-\d.]+)", " ".join(re.findall(r' points="([^"]*)"', svg))):
        assert -0.1 <= float(x) <= width + 0.1
        assert -0.1 <= float(y) <= height + 0.1
    assert "nan" not in svg
    assert "inf" not in svg


@given(numbers, errors, st.none() | numbers, st.none() | numbers, st.booleans(), st.booleans())
def test_bars_stay_within_their_drawing(
    value: float, error: float | None, chance: float | None, majority: float | None, higher: bool, narrow: bool
) -> None:
    made = score(value=value, error=error, chance=chance, majority=majority, higher_is_better=higher)
    inside(drawing.bar(made, () if chance is None else (published(value=chance),), narrow=narrow))


@given(st.lists(st.tuples(numbers, errors), min_size=2, max_size=9), st.none() | numbers)
def test_lines_stay_within_their_drawing(points: list[tuple[float, float | None]], chance: float | None) -> None:
    scores: list[Score] = [score(value=value, error=error, chance=chance) for value, error in points]
    inside(drawing.chart([(Snapshot(scores=(one,)), one) for one in scores]))


@given(numbers, st.floats(0, 1e6), st.floats(1e-3, 1e6))
def test_intervals_stay_within_their_drawing(value: float, error: float, reach: float) -> None:
    inside(drawing.interval(difference(value, 0.0, standard_error=error), reach, "same"))


@given(st.floats(-1e5, 1e5), st.floats(2e-3, 1e5))
def test_a_scale_has_few_round_numbers(low: float, length: float) -> None:
    found = drawing.round_values(low, low + length)
    assert 1 <= len(found) <= 6
    assert len(set(found)) == len(found)
    rounding = 1e-9 * (abs(low) + length)
    assert all(low - rounding <= value <= low + length + rounding for value in found)
