from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import StageInterrupted, UserError
from tasks.vocabulary.sample import Sample, cut, described, spread
from tests.tasks.vocabulary.texts import any_text, english, write_documents


def lines(count: int, size: int, name: str = "") -> list[str]:
    """Documents of exactly `size` bytes that tell where they come from."""
    return [f"{name}{number} ".ljust(size, "x") for number in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "documents", [lines(50, 100, f"{shard}/") for shard in range(20)])


def test_a_small_source_is_taken_whole(folder: Path) -> None:
    sample = Sample([described("books", folder)], 1 << 20)
    assert list(sample.documents()) == [text for shard in range(20) for text in lines(50, 100, f"{shard}/")]
    assert [drawn._asdict() for drawn in sample.drawn] == [
        {"source": "books", "weight": 1.0, "available_bytes": 100_000, "documents": 1000, "bytes": 100_000}
    ]


def test_a_sample_comes_from_all_over_its_source(folder: Path) -> None:
    sample = Sample([described("books", folder)], 10_000)
    taken = list(sample.documents())
    assert sum(map(len, taken)) == 10_000
    assert list(sample.documents()) == taken
    shards = {int(text.partition("/")[0]) for text in taken}
    # Four of the twenty shards have twice the text that is wanted.
    assert shards == {0, 5, 10, 15}
    assert {sum(text.startswith(f"{shard}/") for text in taken) for shard in shards} == {25}


def test_long_documents_are_taken_as_often_as_short_ones(tmp_path: Path) -> None:
    texts = [("s" * 10, "l" * 990)[number % 2] for number in range(2000)]
    sample = Sample([described("books", write_documents(tmp_path / "d", [texts]))], 100_000)
    taken = list(sample.documents())
    assert sum(map(len, taken)) == pytest.approx(100_000, rel=0.01)
    assert sum(text[0] == "l" for text in taken) == pytest.approx(100, abs=15)
    assert sum(text[0] == "s" for text in taken) == pytest.approx(100, abs=15)


def test_sources_give_their_shares(tmp_path: Path) -> None:
    sources = [
        described(name, write_documents(tmp_path / name, [lines(400, 50, name)]), weight)
        for name, weight in (("a", 3.0), ("b", 1.0), ("c", 4.0))
    ]
    sample = Sample(sources, 8000)
    taken = list(sample.documents())
    assert [drawn.bytes for drawn in sample.drawn] == [3000, 1000, 4000]
    assert [sum(text[0] == name for text in taken) for name in "abc"] == [60, 20, 80]
    # What one has not is not made up for by the others.
    poor = sources[1]._replace(available=50, shards=[{"name": "train-00000.parquet", "bytes": 50}])
    small = Sample([sources[0], poor], 400)
    list(small.documents())
    assert small.drawn[0].bytes == 300


@given(
    texts=st.lists(any_text(), min_size=1, max_size=12),
    limit=st.integers(1, 400),
    shards=st.integers(1, 3),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
def test_it_never_exceeds_its_limit(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], limit: int, shards: int
) -> None:
    total = sum(len(text.encode()) for text in texts)
    parts = [texts[start::shards] for start in range(shards)]
    folder = write_documents(tmp_path_factory.mktemp("d") / "d", parts)
    if not total:
        with pytest.raises(UserError, match="the documents 'd' have no train text"):
            described("d", folder)
        return
    sample = Sample([described("d", folder)], limit)
    taken = list(sample.documents())
    assert "".join(sample.pieces()) == "".join(taken)
    size = sum(len(text.encode()) for text in taken)
    assert sample.drawn[0].bytes >= size >= sample.drawn[0].bytes - 3
    assert sample.drawn[0].documents == len(taken)
    assert size <= limit
    whole = [text for part in parts for text in part]
    assert all(any(text.startswith(piece) for text in whole) for piece in taken)
    if total <= limit:
        assert taken == whole


@given(text=any_text(), limit=st.integers(1, 40))
def test_cutting_loses_nothing(text: str, limit: int) -> None:
    pieces = list(cut(text, limit))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces)


def test_pieces_end_with_a_word_where_they_can() -> None:
    (text,) = english(1)
    for piece in list(cut(text, 40))[1:]:
        assert piece[0] in " \n"
    assert list(cut("a" * 7, 3)) == ["aaa", "aaa", "a"]


@pytest.mark.parametrize(
    ("count", "enough", "chosen"), [(4, 1, [0]), (4, 20, [0, 2]), (4, 40, [0, 1, 2, 3]), (1, 0, [0])]
)
def test_shards_are_spread_evenly(count: int, enough: int, chosen: list[int]) -> None:
    shards = [{"name": number, "bytes": 10} for number in range(count)]
    assert [shard["name"] for shard in spread(shards, enough)] == chosen


def test_stopping(folder: Path) -> None:
    with pytest.raises(StageInterrupted):
        list(Sample([described("books", folder)], 1 << 20, lambda: True).pieces())


def test_what_is_no_training_text_is_refused(tmp_path: Path) -> None:
    validation = write_documents(tmp_path / "v", [["text"]], split="validation")
    with pytest.raises(UserError, match="the documents 'books' have no train text that a tokenizer could be"):
        described("books", validation)
    (validation / "documents.json").write_text('{"rows": 3}')
    with pytest.raises(UserError, match=r"documents\.json does not describe documents"):
        described("books", validation)
    spoiled = write_documents(tmp_path / "s", [["text"]])
    (spoiled / "train-00000.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"documents train-00000\.parquet cannot be read"):
        list(Sample([described("books", spoiled)], 100).documents())
