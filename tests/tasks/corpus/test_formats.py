"""Readers of files, against readers that are slow and obvious."""

import io
import json
import random
import re
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from tasks.corpus import formats, parquet, streams
from tasks.corpus.columns import Columns
from tasks.corpus.formats import Kind, file_tables, kind_of, learn_columns, learn_types
from tasks.corpus.streams import DamagedFile, Decompressed, line_blocks
from tests.tasks.corpus.conftest import Told, compressed, documents, json_lines, parquet_bytes, texts, write

WORDS = [f"document {number} " + "word " * (number % 40) + "é€😀"[number % 3] for number in range(1000)]


def read(path: Path, told: Told, column: str = "text", per_line: bool = False) -> list[pa.Table]:
    return list(file_tables(str(path), path.name, kind_of(path.name), Columns(column, told), told, per_line))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.parquet", Kind("parquet", None)),
        ("a.PARQUET", Kind("parquet", None)),
        ("a.jsonl", Kind("jsonl", None)),
        ("c4-train.00000-of-01024.json.gz", Kind("jsonl", "gzip")),
        ("a.ndjson.zst", Kind("jsonl", "zstd")),
        ("a.txt", Kind("text", None)),
        ("a.md.gz", Kind("text", "gzip")),
        ("a.csv", Kind(None, None)),
        ("a.gz", Kind(None, "gzip")),
        ("parquet", Kind(None, None)),
    ],
)
def test_the_ending_tells_what_a_file_is(name: str, kind: Kind) -> None:
    assert kind_of(name) == kind


def test_a_format_has_an_ending() -> None:
    assert set(formats.ENDINGS.values()) == set(formats.Format.__args__)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_rows_come_in_order_with_other_columns(name: str, tmp_path: Path) -> None:
    columns = {"text": WORDS, "score": [number / 7 for number in range(1000)], "url": [None, "u"] * 500}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path = write(tmp_path, name, parquet_bytes(columns) if name == "a.parquet" else json_lines(rows))
    table = pa.concat_tables(read(path, Told("url", "score")))
    assert table.column_names == ["text", "url", "score"]
    assert table.select(list(columns)).to_pylist() == rows


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("size", [1, 100, 10_000, 1 << 20])
def test_parquet_is_read_in_small_tables_whatever_its_groups(
    rows: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "TABLE_BYTES", size)
    path = write(tmp_path, "a.parquet", parquet_bytes({"text": WORDS}, row_group_size=rows))
    tables = read(path, Told())
    assert texts(tables) == WORDS
    longest = max(len(word.encode()) for word in WORDS)
    assert max(table.nbytes for table in tables) <= max(3 * size, 4 * longest)


def test_a_dictionary_of_long_texts_is_read_in_small_tables(tmp_path: Path) -> None:
    # What the file says of its size is that of the dictionary, a thousandth of the text's.
    path = write(tmp_path, "a.parquet", parquet_bytes({"text": ["x" * 100_000] * 1000}))
    assert path.stat().st_size < 100_000
    tables = read(path, Told())
    assert sum(table.num_rows for table in tables) == 1000
    assert max(table.nbytes for table in tables) <= parquet.ROWS_AT_ONCE * 110_000


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_text_of_every_type_is_read_as_strings(kind: pa.DataType, tmp_path: Path) -> None:
    array = pa.array(WORDS, pa.string()).cast(kind)
    path = write(tmp_path, "a.parquet", parquet_bytes({"text": array}))
    tables = read(path, Told())
    assert {table.schema.field("text").type for table in tables} == {pa.string()}
    assert texts(tables) == WORDS


def test_a_column_of_numbers_is_no_text(tmp_path: Path) -> None:
    path = write(tmp_path, "a.parquet", parquet_bytes({"text": [1, 2]}))
    with pytest.raises(UserError, match=r"a\.parquet: the column 'text' is of the type int64, no text"):
        read(path, Told(skip=True))


@pytest.mark.parametrize("skip", [False, True])
def test_a_missing_column_is_an_error_whatever_is_skipped(skip: bool, tmp_path: Path) -> None:
    path = write(tmp_path, "a.parquet", parquet_bytes({"texts": ["a"], "score": [1]}))
    with pytest.raises(UserError, match=r"a\.parquet has no column 'text'; did you mean 'texts'\?"):
        read(path, Told(skip=skip))
    with pytest.raises(UserError, match=r"a\.parquet has no column 'scores'; did you mean 'score'\?"):
        read(path, Told("scores", skip=skip), "texts")


def not_utf8(*texts: bytes | None) -> pa.Array:
    """Strings that Arrow takes for valid."""
    return pa.array(texts, pa.binary()).view(pa.string())


def test_rows_that_are_no_text_are_refused_with_their_row_or_dropped(tmp_path: Path) -> None:
    text = not_utf8(b"good", None, b"good too", b"caf\xe9", b"\xed\xa0\x80", b"best")
    path = write(tmp_path, "a.parquet", parquet_bytes({"text": text}, row_group_size=2))
    with pytest.raises(UserError, match=r"a\.parquet row 1 \(from 0\): the text is null; .*on_error: skip"):
        read(path, Told())
    told = Told(skip=True)
    assert texts(read(path, told)) == ["good", "good too", "best"]
    assert told.said[1].startswith("a.parquet row 3 (from 0): the column 'text' is no valid UTF-8")
    assert documents(refused := told.taken()) == {"no_text": 1, "not_utf8": 2}
    assert refused.counts["not_utf8"].bytes == 4 + 3


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_invalid_utf8_in_another_column_is_refused_too(kind: pa.DataType, tmp_path: Path) -> None:
    url = not_utf8(b"\xff", b"u").cast(kind)
    path = write(tmp_path, "a.parquet", parquet_bytes({"text": ["a", "b"], "url": url}))
    told = Told("url", skip=True)
    assert texts(read(path, told)) == ["b"]
    assert told.counts() == {"not_utf8": 1}


def test_texts_of_white_space_are_left_out_and_counted_unless_they_are_lines_of_a_text(tmp_path: Path) -> None:
    words = ["", "a", " \n", "\u3000\u00a0", " b "]
    path = write(tmp_path, "a.parquet", parquet_bytes({"text": words}))
    told = Told()
    assert texts(read(path, told)) == ["a", " b "]
    assert told.said == []
    refused = told.taken()
    assert documents(refused) == {"no_text": 3}
    assert refused.counts["no_text"].bytes == 2 + 5
    told.keeps_blank = True
    assert texts(read(path, told)) == words
    assert read(write(tmp_path, "empty.txt", b""), Told()) == read(write(tmp_path, "blank.txt", b" \n"), Told()) == []


def test_a_page_whose_checksum_is_wrong_is_damage(tmp_path: Path) -> None:
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    data = parquet_bytes({"text": WORDS}, **options)
    path = write(tmp_path, "a.parquet", data.replace(b"document 500 word", b"document 500 ward"))
    with pytest.raises(UserError, match=r"a\.parquet row \d+ \(from 0\): it is damaged"):
        read(path, Told())


def test_a_value_over_the_limit_is_refused_in_any_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.corpus.sources.DOCUMENT_LIMIT_BYTES", 10)
    path = write(tmp_path, "a.parquet", parquet_bytes({"text": ["a", "b"], "meta": ["x" * 10, "x" * 11]}))
    with pytest.raises(UserError, match=r"row 1 \(from 0\): the value of 'meta' is longer than"):
        read(path, Told("meta"))
    told = Told("meta", skip=True)
    assert texts(read(path, told)) == ["a"]
    assert told.counts() == {"too_long": 1}


def test_a_document_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.corpus.sources.DOCUMENT_LIMIT_BYTES", 10)
    path = write(tmp_path, "a.parquet", parquet_bytes({"text": ["x" * 10, "x" * 11]}))
    with pytest.raises(UserError, match=r"row 1 \(from 0\): the document is longer than"):
        read(path, Told())
    told = Told(skip=True)
    assert texts(read(path, told)) == ["x" * 10]
    assert told.counts() == {"too_long": 1}


@pytest.mark.parametrize("cut", [0, 3, 100, 5000])
def test_a_truncated_parquet_file_is_refused_or_told(cut: int, tmp_path: Path) -> None:
    data = parquet_bytes({"text": WORDS}, compression="none")
    path = write(tmp_path, "a.parquet", data[:cut])
    with pytest.raises(UserError, match=r"a\.parquet: it is no whole Parquet file"):
        read(path, Told())
    told = Told(skip=True)
    assert read(path, told) == []
    assert told.taken().damaged[0].startswith("a.parquet: it is no whole Parquet file")


def test_of_a_damaged_parquet_file_what_is_whole_is_used(tmp_path: Path) -> None:
    data = bytearray(parquet_bytes({"text": WORDS}, row_group_size=100, compression="zstd", use_dictionary=False))
    column = pq.ParquetFile(io.BytesIO(bytes(data))).metadata.row_group(4).column(0)
    start = column.data_page_offset
    data[start + 40 : start + column.total_compressed_size] = bytes(column.total_compressed_size - 40)
    path = write(tmp_path, "a.parquet", bytes(data))
    with pytest.raises(UserError, match=r"a\.parquet row 4\d\d \(from 0\): it is damaged"):
        read(path, Told())
    told = Told(skip=True)
    found = texts(read(path, told))
    refused = told.taken()
    assert found == WORDS[:400] + WORDS[500:]
    assert documents(refused) == {"unreadable": 100}
    assert len(refused.damaged) == 1


def test_an_interrupted_connection_is_no_damage(tmp_path: Path) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() < 1000:
                raise ConnectionResetError(104, "connection reset by peer")
            return super().read(size)

    file = Broken(parquet_bytes({"text": WORDS}, compression="none"))
    with pytest.raises(ConnectionResetError):
        list(parquet.parquet_tables(file, "a.parquet", Columns("text", Told()), Told(skip=True)))


# Lines of JSON.

REFERENCE_TYPES = {str: "text", float: "number", int: "number", bool: "truth"}


def reference(data: bytes, others: tuple[str, ...]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows of JSON Lines and how many were dropped by rule, by Python's own reader."""

    def refuse_constant(name: str) -> Any:
        raise ValueError(name)

    def finite(text: str) -> float:
        if not np.isfinite(float(text)):
            raise ValueError(text)
        return float(text)

    parsed: list[tuple[Any, str | None]] = []
    for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode(), parse_constant=refuse_constant, parse_float=finite)
            json.dumps(row, ensure_ascii=False).encode()
            parsed.append((row, None if isinstance(row, dict) else "malformed"))
        except UnicodeDecodeError:
            parsed.append((None, "not_utf8"))
        except ValueError:
            parsed.append((None, "malformed"))
    rows: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    types: dict[str, str] = {}
    for row, rule in parsed:
        if rule is None:
            _misfits(row, others, types)
    for row, rule in parsed:
        if rule is None and not isinstance(row.get("text"), str):
            rule = "no_text"
        if rule is None and _misfits(row, others, types):
            rule = "malformed"
        if rule is None and not row["text"].strip():
            rule = "no_text"
        if rule is None:
            rows.append({name: row.get(name) for name in ("text", *others)})
        else:
            counts[rule] = counts.get(rule, 0) + 1
    return rows, counts


def _misfits(row: dict[str, Any], others: tuple[str, ...], types: dict[str, str]) -> bool:
    for other in others:
        found = REFERENCE_TYPES.get(type(row.get(other)))
        if row.get(other) is not None and (found is None or types.setdefault(other, found) != found):
            return True
    return False


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)
OTHERS = {"score": VALUES, "other": VALUES}
ROWS = st.fixed_dictionaries({"text": st.text(max_size=9)}, optional=OTHERS) | st.fixed_dictionaries(
    {}, optional={"text": VALUES, **OTHERS}
)
LINES = st.one_of(
    ROWS.map(lambda row: json.dumps(row).encode()),
    ROWS.map(lambda row: json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass")),
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=12).filter(lambda line: b"\n" not in line),
    st.sampled_from(
        [
            *(b"", b" ", b"\r", b"null", b"{", b"NaN", b"[]", b'{"text": 1}', b'{"text": "a"}\r', b"{'text': 'a'}"),
            *(b'{"text": "a"}{"text": "b"}', b'{"text": "a", "text": "b"}', b'{"text": "a", "score": 1e999}'),
            *(b'{"text": "\\ud800"}', b'{"text": "a\tb"}', b'{"text": "\xff"}', b'{"text": "\\u0000"}'),
            b'\xef\xbb\xbf{"text": "a"}',
        ]
    ),
)


@settings(max_examples=300, deadline=None)
@given(lines=st.lists(LINES, max_size=8), block=st.integers(1, 40), ends=st.booleans())
@example(lines=[b'\xef\xbb\xbf{"text": "a"}'], block=1, ends=False)
def test_json_lines_are_read_as_pythons_reader_does(
    lines: list[bytes], block: int, ends: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = b"\n".join(lines) + (b"\n" if ends else b"")
    told = Told("score", "other", skip=True)
    columns = Columns("text", told)
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "BLOCK_BYTES", block)
        # A column that no line has would end it here.
        with suppress(UserError):
            learn_types([(str(path), kind_of(path.name))], columns)
        tables = list(formats.json_tables(io.BytesIO(data), "a.jsonl", columns, told))
    rows, counts = reference(data, told.others)
    assert [row for table in tables for row in table.to_pylist()] == rows
    assert told.counts() == counts


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "a"', "the line is no JSON object (unexpected end of data"),
        (b"null", "the line is no JSON object (it is no object)"),
        (b'{"text": "\xff"}', "it is no valid UTF-8 (invalid start byte at byte 10)"),
        (b'{"text": null}', "'text' is null"),
        (b'{"text": 5}', "'text' is no string"),
        (b'{"texts": "a"}', "the row has no column 'text'; did you mean 'texts'?"),
        (b'{"text": "a", "score": "5"}', "'score' is text, and it was a number before"),
        (b'{"text": "a", "score": [5]}', "'score' is neither text nor a number nor true or false"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(line: bytes, problem: str, tmp_path: Path) -> None:
    data = b'{"text": "a", "score": 1}\n\n{"text": "b"}\n' + line + b'\n{"text": "c"}\n'
    path = write(tmp_path, "a.jsonl.gz", data)
    with pytest.raises(UserError) as raised:
        read(path, Told("score"))
    assert str(raised.value).startswith(f"a.jsonl.gz line 4: {problem}")
    assert "on_error: skip" in str(raised.value)
    told = Told("score", skip=True)
    assert texts(read(path, told)) == ["a", "b", "c"]
    assert sum(told.counts().values()) == 1


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")), max_size=12),
    st.integers(1, 50),
    st.integers(5, 40),
)
def test_lines_come_whole_in_blocks_of_any_size(lines: list[bytes], block: int, limit: int) -> None:
    data = b"\n".join(lines)
    told = Told(skip=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "BLOCK_BYTES", block)
        patch.setattr(streams, "LINE_LIMIT_BYTES", limit)
        found = {
            number + offset: line
            for number, text in line_blocks(io.BytesIO(data), "a", told)
            for offset, line in enumerate(text.split(b"\n"))
        }
    expected = dict(enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1))
    assert found.items() <= expected.items()
    missing = [line for number, line in expected.items() if number not in found and line]
    # A block that is read as a whole may hold a line that is somewhat too long.
    assert all(len(line) > limit for line in missing)
    assert all(len(line) <= limit + block for line in found.values())
    assert told.counts().get("too_long", 0) == len(missing)


def test_the_type_of_a_column_is_that_of_its_first_value_in_any_file(tmp_path: Path) -> None:
    first = write(tmp_path, "a.jsonl", json_lines([{"text": "a"}, {"text": "b", "score": None}]))
    second = write(tmp_path, "b.jsonl.gz", json_lines([{"text": "c", "score": 1, "other": None}]))
    told = Told("score", "other")
    columns = Columns("text", told)
    learn_types([(str(path), kind_of(path.name)) for path in (first, second)], columns)
    assert not columns.known
    tables = [
        table for path in (first, second) for table in file_tables(str(path), "", kind_of(path.name), columns, told)
    ]
    assert {table.schema.field("score").type for table in tables} == {pa.float64()}
    assert {table.schema.field("other").type for table in tables} == {pa.string()}
    assert [row["score"] for table in tables for row in table.to_pylist()] == [None, None, 1.0]


def test_a_column_that_no_line_has_is_an_error_with_a_near_name(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "a", "score": 1}, {"text": "b", "url": None}]
    path = write(tmp_path, "a.jsonl", json_lines(rows))
    with pytest.raises(UserError, match=r"the source has no column 'scroe'; did you mean 'score'\?"):
        learn_columns([(str(path), kind_of(path.name))], Columns("text", Told("scroe")))
    learn_columns([(str(path), kind_of(path.name))], Columns("text", Told("url", "score")))


def test_a_column_of_nulls_waits_for_the_type_of_a_later_parquet_file(tmp_path: Path) -> None:
    first = write(tmp_path, "a.parquet", parquet_bytes({"text": ["a"], "score": pa.nulls(1), "none": pa.nulls(1)}))
    second = write(tmp_path, "b.parquet", parquet_bytes({"text": ["b"], "score": [1.5], "none": pa.nulls(1)}))
    told = Told("score", "none")
    columns = Columns("text", told)
    learn_columns([(str(path), kind_of(path.name)) for path in (first, second)], columns)
    tables = [
        table for path in (first, second) for table in file_tables(str(path), "", kind_of(path.name), columns, told)
    ]
    assert [table.schema.field("score").type for table in tables] == [pa.float64()] * 2
    assert pa.concat_tables(tables)["score"].to_pylist() == [None, 1.5]


def test_a_line_that_is_nested_too_deep_is_no_crash(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", b'{"text": "a", "x": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}\n")
    told = Told(skip=True)
    assert read(path, told) == []
    assert told.counts() == {"malformed": 1}


# Compressed files.


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_members_that_follow_each_other_are_read_on(ending: str, tmp_path: Path) -> None:
    parts = [json_lines([{"text": text}]) for text in WORDS[:20]]
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(b"".join(compressed(part, ending) for part in parts))
    assert texts(read(path, Told())) == WORDS[:20]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.9999])
def test_of_a_truncated_file_what_is_readable_is_used(ending: str, share: float, tmp_path: Path) -> None:
    random.seed(0)
    rows = [{"text": "".join(random.choices("abcdefgh ", k=300))} for _ in range(8000)]
    data = compressed(json_lines(rows), ending)
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=rf"a\.jsonl{ending} line \d+: the \w+ file is damaged or cut off"):
        read(path, Told())
    told = Told(skip=True)
    found = texts(read(path, told))
    assert found == [row["text"] for row in rows[: len(found)]]
    # zstd gives whole blocks of 128 KiB alone.
    assert len(found) > share * 8000 - 600
    refused = told.taken()
    assert documents(refused) == {"unreadable": 1}
    assert refused.damaged[0].startswith(f"a.jsonl{ending} line {len(found) + 1}: ")


def decompressed(data: bytes, ending: str) -> tuple[bytes, bool]:
    """What the format's own library gives of a file byte by byte, and whether it ended well."""
    found, decoder = b"", None
    errors = (zlib.error, zstandard.ZstdError)
    for byte in data:
        if decoder is None or decoder.unused_data or decoder.eof:
            decoder = zlib.decompressobj(31) if ending == ".gz" else zstandard.ZstdDecompressor().decompressobj()
        try:
            found += decoder.decompress(bytes([byte]))
        except errors:
            return found, False
    return found, decoder is not None and decoder.eof


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=400),
    cut=st.none() | st.integers(0, 400),
    flipped=st.none() | st.tuples(st.integers(-12, 400), st.integers(1, 255)),
    more=st.binary(max_size=20) | st.just(bytes(600)),
    size=st.integers(1, 300),
)
def test_all_that_can_be_had_before_the_damage_is_read(
    ending: str, data: bytes, cut: int | None, flipped: tuple[int, int] | None, more: bytes, size: int
) -> None:
    damaged = bytearray(compressed(data, ending)[:cut] + more)
    if flipped is not None and damaged:
        damaged[flipped[0] % len(damaged)] ^= flipped[1]
    stream = Decompressed(lambda: io.BytesIO(bytes(damaged)), "gzip" if ending == ".gz" else "zstd")
    expected, whole = decompressed(bytes(damaged), ending)
    found = b""
    try:
        while part := stream.read(size):
            assert len(part) <= size
            found += part
    except DamagedFile as error:
        # Of a damaged header two versions of a library need not think alike.
        assert not whole or (ending == ".zst" and flipped is not None)
        assert expected.startswith(found)
        with pytest.raises(DamagedFile, match=re.escape(str(error))):
            stream.read(size)
    else:
        assert whole
        assert found == expected


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["checksum", "zeros"])
def test_a_file_that_is_damaged_at_its_end_gives_each_document_once(ending: str, damage: str, tmp_path: Path) -> None:
    random.seed(0)
    rows = [{"text": f"{number} " + "".join(random.choices("abcdefgh ", k=300))} for number in range(8000)]
    data = bytearray(compressed(json_lines(rows), ending))
    if damage == "zeros":
        data += bytes(1000)
    elif ending == ".gz":
        data[-8] ^= 1
    else:
        data = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(json_lines(rows)))
        data[-1] ^= 1
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=rf"a\.jsonl{ending} line \d+: the \w+ file is damaged or cut off"):
        read(path, Told())
    told = Told(skip=True)
    found = texts(read(path, told))
    assert found == [row["text"] for row in rows[: len(found)]]
    assert len(found) > 7000
    assert told.counts() == {"unreadable": 1}


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz"])
def test_a_compressed_file_of_no_bytes_is_damaged(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    with pytest.raises(UserError, match=rf"{name}.*: the \w+ file is empty"):
        read(path, Told())
    assert read(write(tmp_path, f"empty-{name}", b""), Told()) == []


def test_what_is_not_compressed_as_its_ending_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(json_lines([{"text": "a"}]))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz line 1: the gzip file is damaged or cut off"):
        read(path, Told())
    path = write(tmp_path, "a.parquet.gz", parquet_bytes({"text": ["a"]}))
    with pytest.raises(UserError, match="Parquet is compressed inside"):
        read(path, Told(skip=True))


# Texts.


def test_a_text_is_one_document_or_one_for_each_line(tmp_path: Path) -> None:
    text = "\ufeffOne line\r\n\r\n  \nanother, indented\n\tthe last"
    path = write(tmp_path, "a.txt", text.encode())
    assert texts(read(path, Told())) == [text[1:]]
    assert texts(read(path, Told(), per_line=True)) == ["One line", "another, indented", "\tthe last"]


def test_a_text_that_is_no_utf8_is_refused_or_its_lines_dropped(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", b"one\n\ncaf\xe9\nthree")
    with pytest.raises(UserError, match=r"a\.txt: the column 'text' is no valid UTF-8"):
        read(path, Told())
    with pytest.raises(UserError, match=r"a\.txt line 3: the column 'text' is no valid UTF-8"):
        read(path, Told(), per_line=True)
    told = Told(skip=True)
    assert texts(read(path, told, per_line=True)) == ["one", "three"]
    assert told.counts() == {"not_utf8": 1}


def test_a_text_has_no_other_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", b"one")
    with pytest.raises(UserError, match=r"a\.txt is a text, and has no column 'url'"):
        read(path, Told("url", skip=True))


def test_a_text_that_is_cut_off_is_no_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(compressed(b"text " * 1000, ".gz")[:-4])
    told = Told(skip=True)
    assert read(path, told) == []
    assert told.counts() == {"unreadable": 1}


def test_a_text_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "DOCUMENT_LIMIT_BYTES", 10)
    told = Told(skip=True)
    assert read(write(tmp_path, "a.txt", b"x" * 11), told) == []
    assert told.counts() == {"too_long": 1}
