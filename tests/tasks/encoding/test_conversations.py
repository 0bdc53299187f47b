"""The stage `tokens` on conversations: ids and masks against renderings by hand, what is cut, pairs, and errors."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoTokenizer

from artifacts.identity import describe_files
from common.errors import UserError
from models.chat import END, START, Message, chat_of, write_chat
from models.tokenizer import Tokenizer, tokenizer_files
from tasks.corpus.conversations import parsed
from tasks.encoding.conversations import encode_conversations
from tasks.encoding.ray_pool import _encode
from tasks.encoding.reply import Reply
from tasks.encoding.units import Encoders, Job, Unit, encode_unit
from tasks.stage import Runtime
from tasks.tokens import Config
from tests.tasks.conftest import RunStage
from tests.tasks.encoding.corpora import byte_level, bytes_alone, characters, texts, write_documents
from tests.tasks.test_tokens import Run, described, documents_of, run

__all__ = ["run"]

SPECIAL = ("<bos>", "<eos>", START, END)
TALK = ["What?", "It.", "Why?", "So.", "Oh?", "Yes."]
PLAIN = {"template": "plain", "loss_on": "assistant"}


def conversation(*contents: str, system: str | None = None) -> dict[str, str]:
    """A document of a conversation, the user and the assistant in turn."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return {"text": "\n".join(message["content"] for message in messages), "messages": json.dumps(messages)}


def preference(chosen: str, rejected: str, *prompt: str) -> dict[str, str]:
    """A document of a preference between two answers to a prompt."""
    before = conversation(*prompt)
    return {**before, "text": f"{before['text']}\n{chosen}\n{rejected}", "chosen": chosen, "rejected": rejected}


def conversations(folder: Path, documents: Sequence[Mapping[str, str]], shard_rows: int = 100) -> Path:
    holds = "preferences" if "chosen" in documents[0] else "messages"
    return write_documents(folder, {"train": documents}, shard_rows, conversations=holds)


def spelled(folder: Path, split: str = "train") -> list[list[tuple[str, bool]]]:
    """The documents in the shards: runs of tokens as text, special tokens apart, with whether they count."""
    tokenizer = Tokenizer(folder / "tokenizer")
    ids, masks = documents_of(folder, split)
    assert masks is not None
    found = []
    for tokens, mask in zip(ids, masks, strict=True):
        runs: list[tuple[str, bool]] = []
        for token, counted in zip(tokens, mask, strict=True):
            name = str(tokenizer.backend.id_to_token(token))
            text = name if name in SPECIAL else tokenizer.backend.decode([token])
            if runs and runs[-1][1] == bool(counted) and not {text, runs[-1][0]} & {*SPECIAL}:
                runs[-1] = (runs[-1][0] + text, bool(counted))
            else:
                runs.append((text, bool(counted)))
        found.append(runs)
    return found


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bytes_alone(tmp_path_factory.mktemp("bytes") / "tokenizer")


def test_plain_by_hand(run: Run, letters: Path, tmp_path: Path) -> None:
    listed = [conversation(*TALK[:4], system="Be brief."), conversation(" one ", " two ")]
    folder, metrics = run(conversations(tmp_path / "documents", listed), letters, {**PLAIN, "bos": True})
    assert spelled(folder) == [
        [
            ("<bos>", False),
            ("System: Be brief.\nUser: What?\nAssistant:", False),
            (" It.", True),
            ("<eos>", True),
            ("User: Why?\nAssistant:", False),
            (" So.", True),
            ("<eos>", True),
        ],
        [("<bos>", False), ("User: one\nAssistant:", False), (" two", True), ("<eos>", True)],
    ]
    content = described(folder)
    assert (content["template"], content["loss_on"], content["bos_id"], content["eos_id"]) == (
        "plain",
        "assistant",
        1,
        2,
    )
    split = content["splits"]["train"]
    assert (split["cut_conversations"], split["dropped_conversations"]) == (0, 0)
    assert split["bytes"] == sum(len(document["text"]) for document in listed)
    assert split["counted_tokens"] == metrics["splits"]["train"]["counted_tokens"] == 5 + 5 + 5
    assert metrics["encoder"]["library"] == "tokenizers"


def test_chatml_by_hand(run: Run, letters: Path, tmp_path: Path) -> None:
    documents = conversations(tmp_path / "documents", [conversation("What?", "It.", system="Be brief.")])
    folder, _ = run(documents, letters, {"template": "chatml", "loss_on": "assistant"})
    assert spelled(folder) == [
        [
            *((START, False), ("system\nBe brief.", False), (END, False), ("\n", False)),
            *((START, False), ("user\nWhat?", False), (END, False), ("\n", False)),
            *((START, False), ("assistant\n", False), ("It.", True), (END, True), ("\n", False)),
        ]
    ]
    content = described(folder)
    assert (content["template"], content["vocab_size"], content["bos_id"], content["eos_id"]) == (
        "chatml",
        261,
        None,
        260,
    )
    chat = chat_of(folder / "tokenizer")
    assert chat is not None
    assert chat.closing_id == chat.tokenizer.eos_id == 260
    assert chat_of(letters) is None


def test_pairs_by_hand(run: Run, letters: Path, tmp_path: Path) -> None:
    documents = conversations(tmp_path / "documents", [preference("Good.", "Bad, bad.", "What?", "It.", "Why?")])
    folder, _ = run(documents, letters, {"template": "plain", "loss_on": "pairs"})
    before = [("User: What?\nAssistant: It.", False), ("<eos>", False), ("User: Why?\nAssistant:", False)]
    assert spelled(folder) == [
        [*before, (" Good.", True), ("<eos>", True)],
        [*before, (" Bad, bad.", True), ("<eos>", True)],
    ]
    assert described(folder)["loss_on"] == "pairs"


# "User: What?\nAssistant: It.<eos>" are 27 tokens, and each of the other exchanges 26.
@pytest.mark.parametrize(
    ("limit", "kept", "cut", "dropped"),
    [(26, None, 0, 1), (27, 1, 1, 0), (52, 1, 1, 0), (53, 2, 1, 0), (78, 2, 1, 0), (79, 3, 0, 0), (None, 3, 0, 0)],
)
def test_long_conversations_are_cut_after_an_answer(
    run: Run, letters: Path, tmp_path: Path, limit: int | None, kept: int | None, cut: int, dropped: int
) -> None:
    documents = conversations(tmp_path / "documents", [conversation("a", "b"), conversation(*TALK)])
    folder, metrics = run(documents, letters, {**PLAIN, **({"max_tokens": limit} if limit else {})})
    expected = ["User: a\nAssistant: b<eos>"]
    if kept:
        turns = [f"User: {TALK[2 * n]}\nAssistant: {TALK[2 * n + 1]}<eos>" for n in range(kept)]
        expected.append("".join(turns))
    assert ["".join(text for text, _ in runs) for runs in spelled(folder)] == expected
    counts = described(folder)["splits"]["train"]
    assert (counts["documents"], counts["cut_conversations"], counts["dropped_conversations"]) == (
        len(expected),
        cut,
        dropped,
    )
    assert metrics["splits"]["train"]["cut_conversations"] == cut
    notes = [f"train: {cut} conversations were cut, and {dropped} left out, to fit"] if cut or dropped else []
    assert metrics["notes"] == notes
    card = (folder.parent / "logs" / "data_card.md").read_text()
    assert (
        f"in the template `plain`, loss on `assistant`; to fit, {cut} were cut after an earlier answer, and {dropped} l"
        in card
    )
    assert "User: a\nAssistant:⟦ b<eos>⟧" in card
    if kept and kept > 1:
        assert "User: What?\nAssistant:⟦ It.<eos>⟧User: Why?\nAssistant:⟦ So.<eos>⟧" in card


def test_a_preference_of_which_one_answer_is_too_long_is_left_out(run: Run, letters: Path, tmp_path: Path) -> None:
    listed = [preference("x" * 50, "y", "q"), preference("x", "y" * 50, "q"), preference("x", "y", "a", "b", "q" * 30)]
    documents = conversations(tmp_path / "documents", [*listed, preference("kept", "too", "q")])
    folder, metrics = run(documents, letters, {"template": "plain", "loss_on": "pairs", "max_tokens": 40})
    assert [runs[-2][0] for runs in spelled(folder)] == [" kept", " too"]
    assert metrics["splits"]["train"]["dropped_conversations"] == 3
    with pytest.raises(
        UserError, match=r"max_tokens 20: none of the 4 conversations of the split train fits; raise it"
    ):
        run(documents, letters, {"template": "plain", "loss_on": "pairs", "max_tokens": 20})


def test_pairs_stay_together_in_any_shard(run: Run, letters: Path, tmp_path: Path) -> None:
    listed = [
        preference("good " * (n % 7), "bad " * (n % 5), f"question {n}")
        for n in range(1, 200)
        if n % 35 and n % 5 and n % 7
    ]
    documents = conversations(tmp_path / "documents", listed, shard_rows=30)
    folder, _ = run(documents, letters, {"template": "plain", "loss_on": "pairs", "shard_tokens": 300})
    entries = described(folder)["splits"]["train"]["shards"]
    assert len(entries) > 20
    assert all(entry["documents"] % 2 == 0 for entry in entries)
    found = spelled(folder)
    for chosen, rejected, document in zip(found[::2], found[1::2], listed, strict=True):
        assert chosen[0] == rejected[0]
        assert [chosen[1][0], rejected[1][0]] == [f" {document[name].strip()}" for name in ("chosen", "rejected")]


@given(
    contents=st.lists(st.text("ab \n", min_size=1, max_size=20).filter(str.strip), min_size=2, max_size=8),
    limit=st.integers(1, 120),
)
def test_what_is_cut_is_a_shorter_conversation(letters: Path, contents: list[str], limit: int) -> None:
    contents = contents[: len(contents) // 2 * 2]
    folder = letters.parent / "with-template"
    if not folder.is_dir():
        folder.mkdir()
        for path in letters.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        write_chat(folder, "chatml", bos=True)
    chat = chat_of(folder)
    assert chat is not None
    messages: list[Message] = parsed(conversation(*contents)["messages"])
    columns = {"messages": pa.array([conversation(*contents)["messages"]])}
    found = encode_conversations(columns, chat, "assistant", limit, "documents", 0)
    fitting = [
        messages[:end] for end in range(2, len(messages) + 1, 2) if len(chat.conversation(messages[:end])[0]) <= limit
    ]
    assert found.kept == ([0] if fitting else [])
    assert found.cut == (0 < len(fitting) < len(contents) // 2)
    if fitting:
        assert (found.encoded.ids_N.tolist(), found.counted_N.tolist()) == chat.conversation(fitting[-1])


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_where_it_is_encoded_changes_nothing(
    run: Run, tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.tokens.WORTH_A_PROCESS_BYTES", 1 << 14)
    tokenizer = byte_level(tmp_path / "tokenizer")
    said = [text for text in texts(1200, words=30) if text.strip()]
    listed = [conversation(*said[n : n + 2 + n % 2 * 4]) for n in range(0, 1190, 3)]
    documents = conversations(tmp_path / "documents", listed, shard_rows=50)
    config = {"template": template, "loss_on": "assistant", "max_tokens": 200}
    alone, metrics = run(documents, tokenizer, config, runtime=Runtime(processes=1))
    counts = metrics["splits"]["train"]
    assert counts["cut_conversations"] > 10
    assert counts["dropped_conversations"] > 10
    assert counts["documents"] + counts["dropped_conversations"] == len(listed)
    several, again = run(documents, tokenizer, config, runtime=Runtime(processes=2))
    assert describe_files(several) == describe_files(alone)
    assert again["splits"] == metrics["splits"]
    # What a machine of a Ray cluster is given is enough to do the same.
    unit = Unit(split="train", number=0, name="train-00000.parquet", documents=50, bytes=1)
    described_job = {**config, "library": "tokenizers", "bos_id": None, "eos_id": 2, "shard_tokens": 1 << 25}
    job = Job(vocab_size=len(Tokenizer(alone / "tokenizer")), **described_job)
    files = tuple((path.name, path.read_bytes()) for path in tokenizer_files(alone / "tokenizer"))
    reply, _ = _encode(unit, job, files, np.fromfile(documents / unit.name, np.uint8))
    encoders = Encoders.load(job, alone / "tokenizer", parallel=True)
    here = encode_unit(unit, str(documents / unit.name), job, encoders, tmp_path)
    assert Reply.model_validate_json(reply).encoded == here


def test_units_that_are_finished_keep_their_counts(run: Run, letters: Path, tmp_path: Path) -> None:
    documents = conversations(tmp_path / "documents", [conversation(*TALK), conversation("x" * 99, "y")], shard_rows=1)
    kept: dict[str, Any] = {
        "scratch": (fsspec.filesystem("file"), str(tmp_path / "kept")),
        "local_scratch": tmp_path / "kept",
    }
    first, metrics = run(documents, letters, {**PLAIN, "max_tokens": 30}, **kept)
    second, again = run(documents, letters, {**PLAIN, "max_tokens": 30}, **kept)
    assert again["units"] == {"encoded": 0, "found_finished": 2}
    assert again["splits"] == metrics["splits"]
    assert (metrics["splits"]["train"]["cut_conversations"], metrics["splits"]["train"]["dropped_conversations"]) == (
        1,
        1,
    )
    assert describe_files(first) == describe_files(second)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"loss_on": "assistant"}, "loss_on assistant is for conversations: give them a template, plain or chatml"),
        ({"loss_on": "pairs"}, "loss_on pairs is for conversations: give them a template, plain or chatml"),
        ({"template": "plain"}, "loss_on text is for texts: with a template, make it assistant or pairs"),
        ({"template": "plain", "loss_on": "target"}, "loss_on target is for texts"),
        ({"max_tokens": 5}, "max_tokens is for conversations"),
        ({**PLAIN, "eos": False}, "the template closes every answer"),
        ({**PLAIN, "max_tokens": 0}, "greater than 0"),
        ({**PLAIN, "template": "vicuna"}, "'plain' or 'chatml'"),
    ],
)
def test_what_does_not_go_together_is_refused(config: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        Config.model_validate(config)


def test_the_config_of_texts_is_what_it_was() -> None:
    assert Config().model_dump() == {"loss_on": "text", "bos": False, "eos": True, "shard_tokens": 1 << 25}


TEXT = {"text": "once"}


@pytest.mark.parametrize(
    ("documents", "config", "problem"),
    [
        (
            [conversation("a", "b")],
            {},
            "are conversations: give the tokens a template, plain or chatml, and loss_on: a",
        ),
        ([preference("x", "y", "q")], {}, "are conversations: give the tokens a template, .* and loss_on: pairs"),
        (
            [TEXT],
            PLAIN,
            "template: the documents of tests/corpus are texts; leave it out, or read them with the key",
        ),
        ([conversation("a", "b")], {**PLAIN, "loss_on": "pairs"}, "loss_on: the documents of .* are no preferences"),
        ([preference("x", "y", "q")], PLAIN, "loss_on: the documents of tests/corpus are preferences; make it pairs"),
        (
            [conversation("a", "b"), {"text": "x", "messages": "[]"}],
            PLAIN,
            "documents train-00000.parquet, row 1: a conversation is a list of messages, and this is none; make the",
        ),
    ],
)
def test_documents_that_do_not_fit_are_refused(
    run: Run, letters: Path, tmp_path: Path, documents: list[dict[str, str]], config: dict[str, Any], problem: str
) -> None:
    holds = {} if documents == [TEXT] else {"conversations": "preferences" if "chosen" in documents[0] else "messages"}
    folder = write_documents(tmp_path / "documents", {"train": documents}, 10, **holds)
    with pytest.raises(UserError, match=problem) as error:
        run(folder, letters, config)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_the_letters_of_a_template_is_refused(run: Run, tmp_path: Path) -> None:
    documents = conversations(tmp_path / "documents", [conversation("1", "2")])
    with pytest.raises(
        UserError, match=r"the template 'plain': the tokenizer does not know the character 'U'"
    ) as error:
        run(documents, characters(tmp_path / "digits"), PLAIN)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_gsm8k_is_what_transformers_makes_of_it(run_stage: RunStage, template: str) -> None:
    if "CAIRN_HUB" not in os.environ:
        pytest.skip("CAIRN_HUB does not say where GSM8K and SmolLM2's tokenizer are")
    source = {"kind": "hub", "id": "openai/gsm8k", "config": "main"}
    documents, _ = run_stage("documents", {"source": source, "conversations": "gsm8k", "max_documents": 200})
    vocabulary = {"kind": "hub", "id": "HuggingFaceTB/SmolLM2-135M"}
    tokenizer, _ = run_stage("tokenizer", {"vocabulary": vocabulary})
    config = {"template": template, "loss_on": "assistant"}
    folder, _ = run_stage("tokens", config, documents=documents, tokenizer=tokenizer)
    theirs: Any = AutoTokenizer.from_pretrained(folder / "tokenizer")
    messages = [json.loads(one) for one in pq.read_table(documents / "train-00000.parquet")["messages"].to_pylist()]
    ids, masks = documents_of(folder, "train")
    assert ids == [theirs.apply_chat_template(one, return_dict=False) for one in messages]
    assert masks is not None
    for tokens, mask, talk in zip(ids, masks, messages, strict=True):
        said = theirs.decode([token for token, counted in zip(tokens, mask, strict=True) if counted])
        assert said.strip() == talk[1]["content"] + theirs.eos_token
        asked = theirs.apply_chat_template(talk[:1], add_generation_prompt=True, return_dict=False)
        assert mask.index(1) == len(asked)
