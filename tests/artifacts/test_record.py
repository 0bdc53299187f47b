import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.identity import FileEntry, content_digest
from artifacts.record import InputReference, Record, RecordFields, make_record

FILES = {"a": FileEntry(sha256="0" * 64, size=1), "sub/b": FileEntry(sha256="1" * 64, size=2)}
FIELDS = RecordFields(
    key="a" * 64,
    stage="pretrain",
    version=1,
    name="base",
    config={"learning_rate": 1e-05, "é": None, "layers": [1, 2.5, True]},
    inputs={"tokens": InputReference(digest="b" * 64, key="c" * 64)},
    started=datetime(2026, 1, 1, tzinfo=UTC),
    ended=datetime(2026, 1, 2, tzinfo=UTC),
    metrics={"loss": 1e-05},
    notes=["went on from another engine"],
)


def record(**changes: Any) -> Record:
    fields: Any = {**FIELDS, **changes}
    return make_record(content_digest(FILES), FILES, fields)


def test_a_record_reads_back_as_it_was() -> None:
    assert Record.from_json(record().to_json()) == record()


METRICS = st.dictionaries(
    st.text(max_size=4).filter(str.isprintable), st.floats() | st.integers() | st.none(), max_size=4
)


@given(METRICS)
def test_any_metrics_read_back_but_for_what_json_cannot_hold(metrics: dict[str, Any]) -> None:
    one = record(metrics=metrics)
    assert Record.from_json(one.to_json()) == one
    assert all(one.metrics[name] in (value, None) for name, value in metrics.items())


@given(st.data())
def test_any_single_bit_flip_is_found(data: st.DataObject) -> None:
    whole = record().to_json()
    bit = data.draw(st.integers(0, len(whole) * 8 - 1))
    torn = bytearray(whole)
    torn[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match=r".+"):
        Record.from_json(bytes(torn))


@given(st.integers(0, len(record().to_json()) - 1))
def test_any_beginning_of_a_record_is_no_record(length: int) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Record.from_json(record().to_json()[:length])


@given(st.binary(max_size=60) | st.sampled_from([b"[]", b"1", b"null", b"{}", b"[" * 100_000, b'{"checksum": 1}']))
def test_anything_else_is_no_record(data: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Record.from_json(data)


def resealed(**changes: Any) -> bytes:
    """A record with other fields and a checksum that fits them, as somebody with bad intent would write it."""
    from artifacts import record as module

    fields = json.loads(record().to_json())
    fields.pop("checksum")
    return module._text({**fields, **changes})


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "a\\b", ""])
def test_a_record_with_a_file_name_that_leaves_its_folder_is_refused(name: str) -> None:
    files = {name: FileEntry(sha256="0" * 64, size=1)}
    texts = {one: entry.model_dump() for one, entry in files.items()}
    with pytest.raises(ValueError, match="files"):
        Record.from_json(resealed(files=texts, output=content_digest(files)))


@pytest.mark.parametrize(
    "changes",
    [
        {"key": "../" + "a" * 61},
        {"output": "d" * 64},
        {"files": {}},
        {"unknown": 1},
        {"version": -1},
        {"inputs": {"x": {"digest": "no", "key": "a" * 64}}},
        {"started": "2026-01-01T00:00:00"},
    ],
)
def test_a_record_with_fields_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Record.from_json(resealed(**changes))


def test_numbers_that_json_has_not_become_null() -> None:
    metrics = {"loss": float("nan"), "curve": [1.0, float("inf")], "by": {"a": float("-inf")}}
    assert record(metrics=metrics).metrics == {"loss": None, "curve": [1.0, None], "by": {"a": None}}


def test_the_end_is_now_where_it_is_not_said() -> None:
    fields = {name: value for name, value in FIELDS.items() if name != "ended"}
    made = make_record(content_digest(FILES), FILES, fields)  # type: ignore[arg-type]
    assert datetime.now(UTC) - made.ended < timedelta(minutes=1)


def test_every_field_says_what_it_is() -> None:
    assert all(field.description for field in Record.model_fields.values())
