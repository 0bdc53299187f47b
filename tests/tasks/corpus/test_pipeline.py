"""The stage as a whole, against one that goes document by document."""

import errno
import itertools
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.identity import describe_files
from common.errors import StageInterrupted, UserError
from tasks.corpus import batching, examining, pipeline, shards
from tasks.corpus.config import Config
from tasks.corpus.formats import file_tables
from tasks.corpus.rules import Length
from tests.tasks.corpus.conftest import json_lines, parquet_bytes, write
from tests.tasks.corpus.stage import Run, reference

RULES: list[dict[str, Any]] = [
    {"rule": "length", "min_characters": 2},
    {"rule": "column", "column": "score", "minimum": 2},
    {"rule": "regex", "pattern": "[xy]z"},
]
ROWS = st.fixed_dictionaries(
    {
        "text": st.text("xyzé ", max_size=6).filter(str.strip),
        "score": st.none() | st.integers(0, 9),
        "url": st.text(max_size=3),
    }
)
CONFIGS = st.fixed_dictionaries(
    {"shard_bytes": st.integers(1, 120), "rules": st.lists(st.sampled_from(RULES), max_size=3, unique_by=str)},
    optional={
        "split": st.sampled_from(["test", {"validation": 0.3, "test": 0.2}, {"validation": 0.5}]),
        "duplicates": st.just({}),
        "max_documents": st.integers(1, 8),
        "max_bytes": st.integers(1, 60),
        "columns": st.just(["url"]),
    },
)


def some_rows(count: int = 3000) -> list[dict[str, Any]]:
    """Rows of many lengths, some of them equal."""
    random = np.random.default_rng(0)
    lengths = random.geometric(0.01, count)
    return [
        {"text": f"{random.integers(0, 900)} " + "word " * int(length), "score": float(random.integers(0, 9))}
        for length in lengths
    ]


def files(folder: Path, rows: list[dict[str, Any]], parts: int = 3) -> dict[str, Any]:
    """Rows as a source of JSON Lines."""
    for number, part in enumerate(np.array_split(np.arange(len(rows)), parts)):
        write(folder / "data", f"{number}.jsonl", json_lines(rows[row] for row in part))
    return {"kind": "files", "path": str(folder / "data")}


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=25), config=CONFIGS, batch=st.integers(1, 200))
def test_what_is_read_dropped_and_kept_is_as_if_documents_came_one_by_one(
    rows: list[dict[str, Any]], config: dict[str, Any], batch: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("documents")
    # A column of nulls alone is one of text, which no rule compares with a number.
    rows = [{**rows[0], "score": 5}, *rows[1:]]
    run = Run(folder, {"source": files(folder, rows), **config})
    expected, shards = reference(config, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "BATCH_BYTES", batch)
        patch.setattr(batching, "ANCHOR_BYTES", max(1, batch // 2))
        if not shards:
            message = "no document of source 'data' is left of|the first document to keep is longer than that"
            with pytest.raises(UserError, match=message):
                run.start()
            return
        metrics = run.start()
    described = run.described()
    assert run.texts() == shards
    assert described["read"] == expected["read"]
    assert [{key: drop[key] for key in ("rule", "documents", "bytes")} for drop in described["dropped"]] == expected[
        "dropped"
    ]
    for name, split in described["splits"].items():
        documents = [text for shard in shards[name] for text in shard]
        assert split["documents"] == len(documents)
        assert split["bytes"] == sum(len(text.encode()) for text in documents)
        assert [shard["documents"] for shard in split["shards"]] == [len(shard) for shard in shards[name]]
    total = sum(split["documents"] for split in described["splits"].values())
    assert described["read"]["documents"] == total + sum(drop["documents"] for drop in described["dropped"])
    assert metrics["read"] == described["read"]


def test_other_columns_are_kept_where_they_are_asked_for(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": f"text {number}", "score": number / 2, "url": f"u{number}"} for number in range(20)
    ]
    config = {"source": files(tmp_path, rows), "columns": ["url"], "rules": [{**RULES[1], "minimum": 5}]}
    run = Run(tmp_path, config)
    run.start()
    table = pq.read_table(run.output / "train-00000.parquet")
    assert table.to_pylist() == [{"text": row["text"], "url": row["url"]} for row in rows if row["score"] >= 5]


def test_the_bytes_are_the_same_for_any_number_of_threads_and_of_kept_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = some_rows()
    config: dict[str, Any] = {
        "source": files(tmp_path, rows),
        "rules": RULES,
        "duplicates": {"near": {"threshold": 0.8}},
        "split": {"validation": 0.1, "test": 0.1},
        "shard_bytes": 100_000,
    }
    outputs: list[Any] = []
    for number, (processes, batch) in enumerate(itertools.product((1, 2, 5), (10_000, 1 << 22))):
        monkeypatch.setattr(batching, "BATCH_BYTES", batch)
        run = Run(tmp_path / str(number), config, processes)
        run.start()
        outputs.append((describe_files(run.output), run.described()))
    assert len(outputs[0][1]["splits"]["train"]["shards"]) > 3
    assert outputs[0][1]["dropped"][-1]["documents"] > 0
    assert all(output == outputs[0] for output in outputs)


def test_categories_are_kept_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "BATCH_BYTES", 100)
    languages = [["en", "de", None][number % 3] for number in range(60)]
    # Other categories in each file.
    for number, part in enumerate((languages[:20], languages[21:22], languages[22:])):
        column = pa.array(part).dictionary_encode()
        words = [f"text {row}" for row in range(len(part))]
        write(tmp_path, f"data/{number}.parquet", parquet_bytes({"text": words, "language": column}))
    source = {"kind": "files", "path": str(tmp_path / "data")}
    rules = [{"rule": "column", "column": "language", "one_of": ["en", "de"]}]
    run = Run(tmp_path / "run", {"source": source, "columns": ["language"], "rules": rules})
    run.start()
    table = pq.read_table(run.output / "train-00000.parquet")
    assert table.schema.field("language").type == pa.string()
    assert table["language"].to_pylist() == [one for one in languages[:20] + languages[21:] if one]


def test_long_documents_are_examined_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examining, "ALONE_BYTES", 500)
    monkeypatch.setattr(batching, "BATCH_BYTES", 1000)
    inside, most = 0, 0
    counted = threading.Lock()
    passes = Length.passes

    def watched(self: Length, texts: Any) -> Any:
        nonlocal inside, most
        with counted:
            inside += 1
            most = max(most, inside)
        time.sleep(0.002)
        found = passes(self, texts)
        with counted:
            inside -= 1
        return found

    monkeypatch.setattr(Length, "passes", watched)
    run = Run(tmp_path, {"source": files(tmp_path, some_rows(300)), "rules": RULES[:1]}, 4)
    run.start()
    assert most == 1
    monkeypatch.setattr(examining, "ALONE_BYTES", 1 << 20)
    run = Run(tmp_path / "again", run.config.model_dump(), 4)
    run.start()
    assert most > 1


def test_what_benchmarks_say_is_left_out_where_there_are_none(tmp_path: Path) -> None:
    run = Run(tmp_path, {"source": files(tmp_path, some_rows(20))})
    assert run.start()["compared_with"] == []
    assert "compared_with" not in run.described()


# Stopped and started again.


@pytest.mark.parametrize("duplicates", [None, {}, {"near": {"threshold": 0.8}}], ids=["none", "exact", "near"])
def test_a_stage_that_is_stopped_goes_on_where_it_was(
    duplicates: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "BATCH_BYTES", 20_000)
    monkeypatch.setattr(batching, "ANCHOR_BYTES", 5_000)
    config = {
        "source": files(tmp_path, some_rows(), parts=5),
        "rules": RULES,
        "duplicates": duplicates,
        "split": {"validation": 0.1},
        "shard_bytes": 100_000,
    }
    whole = Run(tmp_path / "whole", config)
    whole.start()
    batches = whole.described()["read"]["bytes"] // 20_000
    assert batches > 30
    random = np.random.default_rng(0)
    for number in range(4):
        stopped = Run(tmp_path / str(number), config)
        stops = 0
        for _ in range(100):
            asked = iter(range(1000))
            last = int(random.integers(0, batches))
            try:
                stopped.start(lambda asked=asked, last=last: next(asked) >= last)  # type: ignore[misc]
                break
            except StageInterrupted:
                stops += 1
        assert stops
        assert describe_files(stopped.output) == describe_files(whole.output)
        assert any(text.startswith("going on after") for text in stopped.said)


@pytest.mark.parametrize("limit", [{"max_documents": 700}, {"max_bytes": 130_000}], ids=["documents", "bytes"])
def test_a_stage_that_is_stopped_when_it_has_enough_takes_no_more(
    limit: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "BATCH_BYTES", 20_000)
    config = {"source": files(tmp_path, some_rows()), "shard_bytes": 50_000, **limit}
    whole = Run(tmp_path / "whole", config)
    asked = 0

    def count() -> bool:
        nonlocal asked
        asked += 1
        return False

    whole.start(count)
    stopped = Run(tmp_path / "stopped", config)
    left = iter(range(asked))
    # In the last batch, which has what is wanted and more.
    with pytest.raises(StageInterrupted):
        stopped.start(lambda: next(left) == asked - 1)
    stopped.start()
    assert describe_files(stopped.output) == describe_files(whole.output)


def test_a_disk_that_is_full_when_it_goes_on_takes_nothing_from_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "BATCH_BYTES", 20_000)
    run = Run(tmp_path, {"source": files(tmp_path, some_rows()), "shard_bytes": 100_000})
    asked = iter(range(1000))
    with pytest.raises(StageInterrupted):
        run.start(lambda: next(asked) >= 20)

    def full(path: Path) -> Any:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards.Segment, "read", staticmethod(full))
        with pytest.raises(OSError, match="no space left"):
            run.start()
    run.start()
    assert run.said[-1].startswith("going on after")


def test_files_that_are_done_with_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "BATCH_BYTES", 20_000)
    monkeypatch.setattr(batching, "ANCHOR_BYTES", 5_000)
    opened: list[str] = []

    def told(path: str, *arguments: Any) -> Any:
        opened.append(Path(path).name)
        return file_tables(path, *arguments)

    monkeypatch.setattr("tasks.corpus.file_source.file_tables", told)
    run = Run(tmp_path, {"source": files(tmp_path, some_rows(), parts=10), "shard_bytes": 100_000})
    asked = iter(range(1000))
    with pytest.raises(StageInterrupted):
        run.start(lambda: next(asked) >= 50)
    reached = len(opened)
    assert 4 < reached < 10
    opened.clear()
    run.start()
    assert len(opened) <= 10 - reached + 3


@pytest.mark.parametrize("damage", ["state", "shard", "segment", "index"])
def test_what_an_earlier_start_left_damaged_is_made_anew(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "BATCH_BYTES", 20_000)
    config = {
        "source": files(tmp_path, some_rows()),
        "shard_bytes": 100_000,
        "duplicates": None if damage == "state" else {},
    }
    whole = Run(tmp_path / "whole", config)
    whole.start()
    run = Run(tmp_path / "run", config)
    asked = iter(range(1000))
    with pytest.raises(StageInterrupted):
        run.start(lambda: next(asked) >= 20)
    pattern = {
        "state": "state.json",
        "shard": "shards/train-*.parquet",
        "segment": "shards/segment-*.arrow",
        "index": "duplicates/exact*",
    }[damage]
    (path, *_) = run.scratch.glob(pattern)
    path.write_bytes(b"")
    run.start()
    assert describe_files(run.output) == describe_files(whole.output)
    assert any(text.startswith("beginning anew") for text in run.said)


# Input that is bad, and sources of nothing.


def bad_files(folder: Path) -> dict[str, Any]:
    good = json_lines([{"text": "good", "score": 1.0}, {"text": "good too", "score": 2.0}])
    write(
        folder, "data/a.jsonl", good + b'{"text": \n{"text": null}\n{"text": "caf\xe9"}\n{"text": "a", "score": "x"}\n'
    )
    write(folder, "data/b.jsonl", b"")
    write(folder, "data/c.jsonl", json_lines([{"text": "last"}]))
    cut_off = folder / "data" / "d.jsonl.gz"
    write(folder, cut_off.relative_to(folder).as_posix(), json_lines([{"text": "of d"}] * 2))
    cut_off.write_bytes(cut_off.read_bytes()[:-9])
    return {"kind": "files", "path": str(folder / "data")}


def test_bad_input_ends_the_stage_with_its_place(tmp_path: Path) -> None:
    run = Run(tmp_path, {"source": bad_files(tmp_path)})
    with pytest.raises(UserError, match=r"data/a\.jsonl line 3: the line is no JSON object .* on_error: skip"):
        run.start()


def test_bad_input_is_dropped_and_counted_where_the_recipe_says_so(tmp_path: Path) -> None:
    rules = [{"rule": "column", "column": "score", "minimum": 2}]
    run = Run(tmp_path, {"source": bad_files(tmp_path), "rules": rules, "on_error": "skip"})
    metrics = run.start()
    described = run.described()
    assert run.texts() == {"train": [["good too"]]}
    assert [(drop["rule"], drop["documents"]) for drop in described["dropped"]] == [
        ("malformed", 2),
        ("not_utf8", 1),
        ("no_text", 1),
        ("unreadable", 1),
        ("column", 4),
    ]
    (damage,) = described["damaged"]
    assert "d.jsonl.gz" in damage
    assert "damaged or cut off" in damage
    assert metrics["notes"] == [damage]
    assert metrics["dropped"]["malformed"]["documents"] == 2
    assert metrics["summary"] == "1 train documents; 9 dropped"
    assert described["read"]["documents"] == 10
    assert [text.partition(":")[0].rpartition("/")[2] for text in run.said] == [
        "a.jsonl line 3",
        "a.jsonl line 4",
        "a.jsonl line 5",
        "d.jsonl.gz line 3",
    ]


@pytest.mark.parametrize("on_error", ["fail", "skip"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.jsonl.gz"])
def test_an_empty_source_is_refused_whatever_is_skipped(name: str, on_error: str, tmp_path: Path) -> None:
    empty = pa.table({"text": pa.array([], pa.string())})
    write(
        tmp_path, name, parquet_bytes(dict(zip(["text"], empty.columns, strict=True))) if name == "a.parquet" else b""
    )
    run = Run(tmp_path, {"source": {"kind": "files", "path": str(tmp_path / name)}, "on_error": on_error})
    with pytest.raises(UserError, match=f"source '{name}' is empty: it has no documents"):
        run.start()


def test_a_column_that_no_row_has_is_an_error_whatever_is_skipped(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", json_lines([{"body": "a"}, {"body": "b"}]))
    run = Run(tmp_path, {"source": {"kind": "files", "path": str(tmp_path / "a.jsonl")}, "on_error": "skip"})
    with pytest.raises(UserError, match=r"no document of source 'a\.jsonl' is left of 2: no_text 2"):
        run.start()


def test_a_source_of_damaged_files_alone_is_refused_with_what_is_wrong(tmp_path: Path) -> None:
    write(tmp_path, "a.parquet", parquet_bytes({"text": ["a"]})[:-7])
    run = Run(tmp_path, {"source": {"kind": "files", "path": str(tmp_path / "a.parquet")}, "on_error": "skip"})
    with pytest.raises(UserError, match=r"no document of source 'a\.parquet' is left.*no whole Parquet file"):
        run.start()


def test_rules_that_drop_everything_are_refused_with_their_counts(tmp_path: Path) -> None:
    config = {"source": files(tmp_path, some_rows(50)), "rules": [{"rule": "regex", "pattern": "word"}]}
    with pytest.raises(UserError, match="no document of source 'data' is left of 50: regex 50"):
        Run(tmp_path, config).start()


def test_files_that_change_while_they_are_read_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "BATCH_BYTES", 20_000)
    run = Run(tmp_path, {"source": files(tmp_path, some_rows()), "shard_bytes": 100_000})
    asked = iter(range(1000))

    def change() -> bool:
        if next(asked) == 20:
            write(tmp_path, "data/2.jsonl", json_lines([{"text": "other"}]))
        return False

    with pytest.raises(UserError, match=r"data is not what its digest .* it has changed; run again"):
        run.start(change)
    assert not run.scratch.exists()
    run.start()
    assert run.texts()["train"][-1][-1] == "other"


def test_a_rule_that_is_there_twice_is_counted_twice(tmp_path: Path) -> None:
    rules = [{"rule": "regex", "pattern": "^1"}, {"rule": "regex", "pattern": "^2"}]
    metrics = Run(tmp_path, {"source": files(tmp_path, some_rows(500)), "rules": rules}).start()
    assert list(metrics["dropped"]) == ["regex", "regex 2"]
    assert all(count["documents"] for count in metrics["dropped"].values())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"columns": ["text"]}, "each once, and not 'text'"),
        ({"columns": ["a", "a"]}, "each once"),
        ({"max_documents": 0}, "greater than 0"),
        ({"split": "trian"}, "train"),
    ],
)
def test_impossible_configs_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"source": {"kind": "files", "path": "a.txt"}, **keys})


def test_it_is_told_now_and_then_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "BATCH_BYTES", 100_000)
    monkeypatch.setattr(pipeline, "NOTE_SECONDS", 0.0)
    run = Run(tmp_path, {"source": files(tmp_path, some_rows()), "rules": RULES[:2]})
    run.start()
    assert run.said[0].startswith("0 MB read: ")
    read = run.described()["read"]["bytes"] / 1e6
    kept = run.described()["splits"]["train"]["documents"]
    assert run.said[-1] == f"{read:,.0f} MB read: {kept:,} documents kept, {3000 - kept:,} dropped"
