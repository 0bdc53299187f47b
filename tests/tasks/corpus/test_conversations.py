"""Rows of instruction, chat and preference data sets as conversations, through the stage `documents`."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from common.errors import UserError
from tasks.corpus.config import Config
from tasks.corpus.conversations import FORMATS, parsed
from tests.tasks.conftest import RunStage

Json = dict[str, Any]


def turns(*contents: str, system: str | None = None) -> list[Json]:
    """Messages of the user and the assistant in turn."""
    first = [{"content": system, "role": "system"}] if system is not None else []
    return first + [
        {"content": content, "role": "assistant" if number % 2 else "user"} for number, content in enumerate(contents)
    ]


def written(folder: Path, rows: Sequence[Mapping[str, Any]], ending: str) -> Path:
    """Rows as a file of Parquet or JSON Lines."""
    path = folder / f"rows{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS: list[tuple[str, Json, list[Json]]] = [
    (
        "alpaca",
        {"instruction": "Add.", "input": "1 and 1", "output": "2", "text": "not this"},
        turns("Add.\n\n1 and 1", "2"),
    ),
    ("alpaca", {"instruction": "Say hi.", "input": "", "output": "Hi"}, turns("Say hi.", "Hi")),
    ("alpaca", {"instruction": "Say hi.", "input": None, "output": "Hi"}, turns("Say hi.", "Hi")),
    (
        "gsm8k",
        {"question": "Half of 48?", "answer": "48/2 = <<48/2=24>>24\n#### 24"},
        turns("Half of 48?", "48/2 = <<48/2=24>>24\n#### 24"),
    ),
    (
        "dolly",
        {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada", "category": "qa"},
        turns("Who?\n\nAda wrote it.", "Ada"),
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "Hello"},
                {"from": "gpt", "value": "Hi"},
                {"from": "user", "value": "Bye"},
                {"from": "assistant", "value": "Bye"},
                {"from": "human", "value": "left out: nobody answers"},
            ]
        },
        turns("Hello", "Hi", "Bye", "Bye", system="Be kind."),
    ),
    (
        "messages",
        {"messages": [*turns("é\n“q”", " a ", system="S"), {"role": "user", "content": "unanswered"}], "id": 3},
        turns("é\n“q”", " a ", system="S"),
    ),
]


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
@pytest.mark.parametrize(("format", "row", "messages"), ROWS)
def test_a_row_is_a_conversation(
    format: str, row: Json, messages: list[Json], ending: str, run_stage: RunStage, tmp_path: Path
) -> None:
    source = {"kind": "files", "path": str(written(tmp_path, [row], ending))}
    folder, _ = run_stage("documents", {"source": source, "conversations": format})
    table = pq.read_table(folder / "train-00000.parquet")
    assert table.column_names == ["text", "messages"]
    (document,) = table.to_pylist()
    assert json.loads(document["messages"]) == messages
    assert parsed(document["messages"]) == messages
    assert document["messages"] == json.dumps(messages, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
    assert document["text"] == "\n".join(message["content"] for message in messages)
    described = json.loads((folder / "documents.json").read_bytes())
    assert described["conversations"] == "messages"
    assert described["source"]["format"] == format


QUESTION, WITH_SYSTEM = turns("Why?"), turns("A", "B", "Why?", system="S")
PREFERENCES: list[tuple[Json, list[Json]]] = [
    ({"prompt": "Why?", "chosen": "Because", "rejected": "No"}, QUESTION),
    ({"prompt": WITH_SYSTEM, "chosen": "Because", "rejected": "No"}, WITH_SYSTEM),
    (
        {"prompt": QUESTION, "chosen": [*turns("x", "Because")[1:]], "rejected": [*turns("x", "No")[1:]]},
        QUESTION,
    ),
    (
        {
            "prompt": "not looked at",
            "chosen": turns("A", "B", "Why?", "Because", system="S"),
            "rejected": turns("A", "B", "Why?", "No", system="S"),
        },
        WITH_SYSTEM,
    ),
    ({"chosen": turns("Why?", "Because"), "rejected": turns("Why?", "No")}, QUESTION),
    (
        {
            "chosen": "\n\nHuman: A\n\nAssistant: B\n\nHuman: Why?\n\nAssistant: Because",
            "rejected": "\n\nHuman: A\n\nAssistant: B\n\nHuman: Why?\n\nAssistant: No",
        },
        turns("A", "B", "Why?"),
    ),
]


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
@pytest.mark.parametrize(("row", "prompt"), PREFERENCES)
def test_a_row_is_a_preference(row: Json, prompt: list[Json], ending: str, run_stage: RunStage, tmp_path: Path) -> None:
    source = {"kind": "files", "path": str(written(tmp_path, [row], ending))}
    folder, _ = run_stage("documents", {"source": source, "conversations": "preferences"})
    table = pq.read_table(folder / "train-00000.parquet")
    assert table.column_names == ["text", "messages", "chosen", "rejected"]
    (document,) = table.to_pylist()
    assert parsed(document["messages"], last="user") == prompt
    assert (document["chosen"], document["rejected"]) == ("Because", "No")
    assert document["text"] == "\n".join([*(message["content"] for message in prompt), "Because", "No"])
    assert json.loads((folder / "documents.json").read_bytes())["conversations"] == "preferences"


ALPACA = {"instruction": "Say hi.", "input": "", "output": "Hi"}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
BAD_ROWS: list[tuple[str, Json, Json, str]] = [
    ("alpaca", ALPACA, {**ALPACA, "output": "\n "}, "message 2, of the assistant, is empty"),
    ("alpaca", ALPACA, {**ALPACA, "instruction": ""}, "message 1, of the user, is empty"),
    ("alpaca", ALPACA, {**ALPACA, "output": None}, "'output' is null"),
    ("gsm8k", {"question": "q", "answer": "a"}, {"question": None, "answer": "a"}, "'question' is null"),
    ("messages", {"messages": turns("q", "a")}, {"messages": turns("q")}, "the assistant says nothing"),
    ("messages", {"messages": turns("q", "a")}, {"messages": None}, "'messages' is null"),
    ("messages", {"messages": turns("q", "a")}, {"messages": []}, "a conversation is a list of messages"),
    (
        "messages",
        {"messages": turns("q", "a")},
        {"messages": [*turns("q"), *turns("q", "a")]},
        "messages 1 and 2 are both of the user",
    ),
    (
        "messages",
        {"messages": turns("q", "a")},
        {"messages": [*turns("q", "a"), *turns(system="late")]},
        "message 3 is of the system, which can only speak first",
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "q"}]},
        "message 1 is of the assistant, and no message of the user is before it",
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "tool", "value": "a"}]},
        "message 2 has the role 'tool', which is none of system, user, assistant",
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": None}]},
        "message 2 has a content that is no text but NoneType",
    ),
    ("preferences", PAIR, {**PAIR, "rejected": " a"}, "'chosen' and 'rejected' are the same answer"),
    ("preferences", PAIR, {**PAIR, "prompt": " "}, "message 1, of the user, is empty"),
    ("preferences", PAIR, {**PAIR, "rejected": ""}, "message 2, of the assistant, is empty"),
    ("preferences", PAIR, {**PAIR, "chosen": None}, "'chosen' is null"),
    ("preferences", PAIR, {**PAIR, "prompt": None}, "it has no column 'prompt', and its answers are no transcripts"),
    (
        "preferences",
        {"chosen": turns("q", "a"), "rejected": turns("q", "b")},
        {"chosen": turns("q", "a"), "rejected": turns("r", "b")},
        "'chosen' and 'rejected' do not answer the same prompt",
    ),
]


@pytest.mark.parametrize(("ending", "place"), [(".parquet", r"row 1 \(from 0\)"), (".jsonl", "line 2")])
@pytest.mark.parametrize(("format", "good", "bad", "problem"), BAD_ROWS)
def test_a_bad_row_is_named_or_dropped_and_counted(
    format: str, good: Json, bad: Json, problem: str, ending: str, place: str, run_stage: RunStage, tmp_path: Path
) -> None:
    path = written(tmp_path, [good, bad, good], ending)
    config = {"source": {"kind": "files", "path": str(path)}, "conversations": format}
    with pytest.raises(
        UserError, match=rf"^.*rows{ending} {place}: {problem}.*; mend it, or drop and count such input"
    ):
        run_stage("documents", config)
    folder, metrics = run_stage("documents", {**config, "on_error": "skip"})
    assert metrics["dropped"]["no_conversation"]["documents"] == 1
    assert pq.read_table(folder / "train-00000.parquet").num_rows == 2


@pytest.mark.parametrize("rows", [{"messages": "hello"}, {"messages": [7]}, {"messages": ["hello"]}])
@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_a_column_of_other_things_is_told(rows: Json, ending: str, run_stage: RunStage, tmp_path: Path) -> None:
    source = {"kind": "files", "path": str(written(tmp_path, [rows], ending))}
    with pytest.raises(UserError, match=r"'messages' is no list but str|message 1 is no object with a role"):
        run_stage("documents", {"source": source, "conversations": "messages"})


def test_a_column_that_is_nowhere_is_told(run_stage: RunStage, tmp_path: Path) -> None:
    row = {"instruction": "a", "inputs": "", "output": "b"}
    for ending in (".parquet", ".jsonl"):
        source = {"kind": "files", "path": str(written(tmp_path, [row], ending))}
        with pytest.raises(UserError, match="has no column 'input'; did you mean 'inputs'"):
            run_stage("documents", {"source": source, "conversations": "alpaca"})
    (tmp_path / "story.txt").write_text("Once.")
    source = {"kind": "files", "path": str(tmp_path / "story.txt")}
    with pytest.raises(UserError, match=r"story\.txt is a text, and has no column 'question'"):
        run_stage("documents", {"source": source, "conversations": "gsm8k"})


def test_bytes_that_are_no_text_are_counted_as_such(run_stage: RunStage, tmp_path: Path) -> None:
    strings = pa.array([b"a", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"question": strings, "answer": ["b", "b"]}), tmp_path / "rows.parquet")
    config = {"source": {"kind": "files", "path": str(tmp_path / "rows.parquet")}, "conversations": "gsm8k"}
    with pytest.raises(UserError, match=r"row 1 \(from 0\): it is no valid UTF-8"):
        run_stage("documents", config)
    _, metrics = run_stage("documents", {**config, "on_error": "skip"})
    assert metrics["dropped"] == {"not_utf8": {"documents": 1, "bytes": 2}}


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_other_columns_stay_with_their_rows(ending: str, run_stage: RunStage, tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": "a" if n % 3 else "", "score": n + 0.5} for n in range(10)]
    source = {"kind": "files", "path": str(written(tmp_path, rows, ending))}
    config = {"source": source, "conversations": "gsm8k", "columns": ["score"], "on_error": "skip"}
    folder, _ = run_stage("documents", {**config, "rules": [{"rule": "column", "column": "score", "maximum": 8}]})
    table = pq.read_table(folder / "train-00000.parquet")
    assert table.column_names == ["text", "messages", "score"]
    kept = [n for n in range(10) if n % 3 and n + 0.5 <= 8]
    assert table["score"].to_pylist() == [n + 0.5 for n in kept]
    assert [parsed(one)[0]["content"] for one in table["messages"].to_pylist()] == [f"q{n}" for n in kept]


def test_duplicates_and_splits_go_by_the_contents(run_stage: RunStage, tmp_path: Path) -> None:
    rows = [{"question": f"q{n % 40}", "answer": "a"} for n in range(80)]
    source = {"kind": "files", "path": str(written(tmp_path, rows, ".jsonl"))}
    config = {
        "source": source,
        "conversations": "gsm8k",
        "duplicates": {"exact": True},
        "split": {"validation": 0.3},
    }
    folder, metrics = run_stage("documents", config)
    assert metrics["dropped"]["exact_duplicates"]["documents"] == 40
    tables = [pq.read_table(folder / f"{split}-00000.parquet") for split in ("train", "validation")]
    assert sum(table.num_rows for table in tables) == 40
    for table in tables:
        for document in table.to_pylist():
            assert document["text"] == "\n".join(message["content"] for message in parsed(document["messages"]))


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"source": {"kind": "arithmetic", "train": 1, "validation": 1, "test": 1}}, "makes its own documents"),
        ({"source": {"kind": "files", "path": "x", "column": "body"}}, "leave the source's column and rows out"),
        ({"source": {"kind": "hub", "id": "x", "rows": "lines"}}, "leave the source's column and rows out"),
        ({"source": {"kind": "files", "path": "x"}, "columns": ["messages"]}, "has its own column 'messages'"),
    ],
)
def test_what_does_not_go_together_is_refused(config: Json, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        Config.model_validate({"conversations": "messages", **config})


def test_texts_are_described_as_they_were() -> None:
    source = {"kind": "files", "path": "x"}
    assert "conversations" not in Config.model_validate({"source": source}).model_dump()


@given(st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip), st.text().filter(str.strip))
def test_contents_are_kept_as_they_are(question: str, answer: str) -> None:
    answer = answer.encode("utf-8", "ignore").decode() or "x"
    if answer.strip():
        document = FORMATS["gsm8k"].document({"question": question, "answer": answer})
        assert [message["content"] for message in parsed(document["messages"])] == [question, answer]


def test_a_column_of_messages_that_is_damaged_is_told() -> None:
    with pytest.raises(UserError, match="its messages are no JSON"):
        parsed("[{")


def test_real_data(run_stage: RunStage) -> None:
    if "CAIRN_HUB" not in os.environ:
        pytest.skip("CAIRN_HUB does not say where GSM8K and Alpaca are")
    gsm8k = {"source": {"kind": "hub", "id": "openai/gsm8k", "config": "main", "split": ["train", "test"]}}
    folder, metrics = run_stage("documents", {**gsm8k, "conversations": "gsm8k"})
    assert {split: counts["documents"] for split, counts in metrics["splits"].items()} == {"train": 7473, "test": 1319}
    first = parsed(pq.read_table(folder / "train-00000.parquet")["messages"][0].as_py())
    assert "48/2 = <<48/2=24>>24 clips in May.\n" in first[1]["content"]
    alpaca = {"source": {"kind": "hub", "id": "tatsu-lab/alpaca"}, "conversations": "alpaca"}
    with pytest.raises(UserError, match=r"row \d+ \(from 0\): message 2, of the assistant, is empty; mend it"):
        run_stage("documents", alpaca)
    _, metrics = run_stage("documents", {**alpaca, "on_error": "skip"})
    assert metrics["splits"]["train"]["documents"] == 15_121
    assert metrics["dropped"]["no_conversation"]["documents"] == 9
