"""The stage `tokens` as a whole: what its artifact holds, and that only its inputs and its config show in it."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from artifacts.identity import describe_files
from common.errors import StageInterrupted, UserError
from models.tokenizer import Tokenizer
from models.training.shards import open_shard
from tasks.encoding.units import Unit
from tasks.stage import Context, Metrics, Runtime
from tasks.tokens import STAGE
from tests.artifacts.conftest import s3_address, s3_url
from tests.tasks.encoding import corpora
from tests.tasks.encoding.corpora import ODD_TEXTS, byte_level, rows, texts, write_documents

__all__ = ["s3_address", "s3_url"]

PROBLEMS = [("12+30=", "42"), ("1+1=", "2"), ("999+1=", "1000")]
CHARACTERS = ["<pad>", "<bos>", "<eos>", *"0123456789", "+", "-", "*", "/", "="]
MANY = 6_000


class Run:
    """The stage on some inputs, as often as a test wants it, each time into an output folder of its own."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.notes: list[str] = []
        self._runs = iter(range(100))

    def __call__(
        self, documents: Path, tokenizer: Path, config: Mapping[str, Any] | None = None, **changes: Any
    ) -> tuple[Path, Metrics]:
        folder = self.place / f"run-{next(self._runs)}"
        context = Context(
            name="ids",
            output=folder / "output",
            logs=folder / "logs",
            scratch=(fsspec.filesystem("file"), str(folder / "scratch")),
            local_scratch=folder / "scratch",
            runtime=Runtime(),
            report=lambda event: self.notes.append(getattr(event, "text", "")),
        )
        context = replace(context, **changes)
        context.output.mkdir(parents=True)
        context.logs.mkdir(parents=True, exist_ok=True)
        inputs = {"documents": documents, "tokenizer": tokenizer}
        return context.output, STAGE.run(STAGE.config.model_validate(config or {}), inputs, context)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    # Small corpora stand for large ones here.
    monkeypatch.setattr("tasks.tokens.WORTH_IT_BYTES", 1 << 19)
    monkeypatch.setattr("tasks.tokens.WORTH_A_PROCESS_BYTES", 1 << 17)
    return Run(tmp_path / "runs")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("byte-level") / "tokenizer")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents enough that another library than the reference comes into question, in nine shards."""
    splits = {"train": rows(texts(MANY)), "validation": rows(texts(300, seed=1))}
    return write_documents(tmp_path_factory.mktemp("many") / "documents", splits, shard_rows=750)


@pytest.fixture
def characters(tmp_path: Path) -> Path:
    return corpora.characters(tmp_path / "characters")


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    listed = [{"prompt": prompt, "target": target, "text": prompt + target} for prompt, target in PROBLEMS]
    return write_documents(tmp_path / "problems", {"train": listed}, shard_rows=2)


def described(folder: Path) -> dict[str, Any]:
    """What `tokens.json` says."""
    content: dict[str, Any] = json.loads((folder / "tokens.json").read_bytes())
    return content


def documents_of(folder: Path, split: str) -> tuple[list[list[int]], list[list[int]] | None]:
    """The ids of every document of a split in the order of its shards, and their loss masks where they have any."""
    ids: list[list[int]] = []
    masks: list[list[int]] = []
    for entry in described(folder)["splits"][split]["shards"]:
        shard = open_shard(folder / entry["name"]).map()
        cuts = shard.document_ends_D[:-1].astype(np.int64)
        ids += [part.tolist() for part in np.split(shard.tokens_N, cuts)]
        if shard.loss_mask_N is not None:
            masks += [part.tolist() for part in np.split(shard.loss_mask_N, cuts)]
    return ids, masks or None


def expected_ids(tokenizer: Path, documents: Sequence[str], bos: bool = False, eos: bool = True) -> list[list[int]]:
    """The ids of each document, one at a time by the reference."""
    read = Tokenizer(tokenizer)
    return [[read.bos_id] * bos + read.encode(text) + [read.eos_id] * eos for text in documents]


def test_only_targets_and_the_closing_token_count(run: Run, characters: Path, problems: Path) -> None:
    folder, _ = run(problems, characters, {"loss_on": "target", "bos": True})
    ids, masks = documents_of(folder, "train")
    assert ids == [[1, *map(CHARACTERS.index, prompt + target), 2] for prompt, target in PROBLEMS]
    assert masks == [[0] * (1 + len(prompt)) + [1] * (len(target) + 1) for prompt, target in PROBLEMS]
    content = described(folder)
    assert content["splits"]["train"] == {
        "documents": 3,
        "tokens": 29,
        "counted_tokens": 10,
        "bytes": 23,
        "longest_document": 12,
        "lengths": [[7, 1], [10, 1], [12, 1]],
        "shards": [
            {"name": "train-00000.safetensors", "tokens": 17, "documents": 2, "counted_tokens": 5},
            {"name": "train-00001.safetensors", "tokens": 12, "documents": 1, "counted_tokens": 5},
        ],
    }
    del content["splits"]
    assert content == {
        "vocab_size": 18,
        "pad_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "dtype": "uint16",
        "source": "tests/corpus",
    }


@pytest.mark.parametrize(("bos", "eos"), [(False, True), (True, True), (True, False), (False, False)])
def test_whole_texts(run: Run, tokenizer: Path, tmp_path: Path, bos: bool, eos: bool) -> None:
    listed = [*texts(40), *ODD_TEXTS]
    documents = write_documents(tmp_path / "documents", {"train": rows(listed)}, shard_rows=1000)
    folder, metrics = run(documents, tokenizer, {"bos": bos, "eos": eos})
    ids, masks = documents_of(folder, "train")
    expected = expected_ids(tokenizer, listed, bos, eos)
    assert ids == expected
    # <bos> follows from nothing; everything else is learnt.
    assert masks == ([[0] + [1] * (len(one) - 1) for one in expected] if bos else None)
    content = described(folder)
    split = content["splits"]["train"]
    assert split["tokens"] == sum(map(len, expected)) == metrics["tokens"]
    assert split["counted_tokens"] == split["tokens"] - bos * len(listed)
    assert split["lengths"] == [list(item) for item in sorted(Counter(map(len, expected)).items())]
    assert split["longest_document"] == max(map(len, expected))
    assert split["bytes"] == sum(len(text.encode()) for text in listed)
    assert (content["bos_id"], content["eos_id"]) == (1 if bos else None, 2 if eos else None)


@pytest.mark.parametrize("loss_on", ["text", "target"])
def test_special_tokens_never_come_out_of_text(run: Run, tokenizer: Path, tmp_path: Path, loss_on: str) -> None:
    listed = [{"text": "a<eos>b<bos><pad> <eos>", "target": "<eos>"}]
    documents = write_documents(tmp_path / "documents", {"train": listed}, shard_rows=10)
    folder, _ = run(documents, tokenizer, {"loss_on": loss_on, "bos": True})
    ((first, *inner, last),) = documents_of(folder, "train")[0]
    assert (first, last) == (1, 2)
    assert min(inner) > 2
    assert Tokenizer(tokenizer).decode(inner) == listed[0]["text"]


@pytest.mark.parametrize(("size", "dtype"), [(600, np.uint16), (70_000, np.uint32)])
def test_ids_take_two_bytes_where_the_vocabulary_fits(
    run: Run, tmp_path: Path, size: int, dtype: type[np.generic]
) -> None:
    folder = byte_level(tmp_path / "tokenizer")
    description = json.loads((folder / "tokenizer.json").read_bytes())
    vocabulary = description["model"]["vocab"]
    # The highest ids go to the commonest letters: were they cut short, it would show.
    for token in ("Ġ", "a", "e"):
        vocabulary[token], size = size - 1, size - 1
    (folder / "tokenizer.json").write_text(json.dumps(description))
    listed = texts(30)
    documents = write_documents(tmp_path / "documents", {"train": rows(listed)}, shard_rows=1000)
    output, _ = run(documents, folder)
    assert open_shard(output / "train-00000.safetensors").map().tokens_N.dtype == dtype
    assert documents_of(output, "train")[0] == expected_ids(folder, listed)
    assert described(output)["dtype"] == np.dtype(dtype).name


def test_shards_hold_whole_documents_and_together_everything(run: Run, tokenizer: Path, tmp_path: Path) -> None:
    splits = {"train": texts(300), "test": texts(20, seed=2)}
    documents = write_documents(tmp_path / "documents", {split: rows(of) for split, of in splits.items()}, 100)
    folder, metrics = run(documents, tokenizer, {"shard_tokens": 200, "bos": True})
    for split, listed in splits.items():
        assert documents_of(folder, split)[0] == expected_ids(tokenizer, listed, bos=True)
        entries = described(folder)["splits"][split]["shards"]
        assert [entry["name"] for entry in entries] == [f"{split}-{n:05d}.safetensors" for n in range(len(entries))]
        assert metrics["splits"][split]["shards"] == len(entries)
        for entry in entries:
            shard = open_shard(folder / entry["name"]).map()
            assert shard.loss_mask_N is not None
            assert entry["tokens"] == len(shard.tokens_N) == shard.document_ends_D[-1]
            assert entry["documents"] == len(shard.document_ends_D)
            assert entry["counted_tokens"] == np.count_nonzero(shard.loss_mask_N)
            assert entry["tokens"] <= 200 or entry["documents"] == 1
    assert any(
        entry["documents"] == 1 and entry["tokens"] > 200 for entry in described(folder)["splits"]["train"]["shards"]
    )
    names = {entry["name"] for split in described(folder)["splits"].values() for entry in split["shards"]}
    assert {path.name for path in folder.glob("*.safetensors")} == names


def test_a_faster_library_gives_the_same_artifact(run: Run, tokenizer: Path, many: Path) -> None:
    folder, metrics = run(many, tokenizer)
    assert metrics["encoder"]["library"] == "gigatoken", metrics["encoder"]
    assert metrics["encoder"]["proven_on"] > 200
    assert metrics["notes"] == []
    assert documents_of(folder, "train")[0] == expected_ids(tokenizer, texts(MANY))
    assert documents_of(folder, "validation")[0] == expected_ids(tokenizer, texts(300, seed=1))


@pytest.mark.parametrize(
    ("processes", "shard_tokens"), [(1, 1 << 25), (2, 1 << 25), (3, 1 << 25), (1, 40_000), (2, 40_000)]
)
def test_the_artifact_is_the_same_for_any_number_of_processes(
    run: Run, tokenizer: Path, many: Path, monkeypatch: pytest.MonkeyPatch, processes: int, shard_tokens: int
) -> None:
    monkeypatch.setattr("tasks.tokens.WORTH_IT_BYTES", 1 << 40)
    plain, metrics = run(many, tokenizer, {"shard_tokens": shard_tokens})
    assert metrics["encoder"]["library"] == "tokenizers"
    monkeypatch.setattr("tasks.tokens.WORTH_IT_BYTES", 0)
    fast, metrics = run(many, tokenizer, {"shard_tokens": shard_tokens}, runtime=Runtime(processes=processes))
    assert metrics["encoder"]["library"] == "gigatoken"
    assert describe_files(fast) == describe_files(plain)


def test_what_is_finished_is_not_done_again(run: Run, tokenizer: Path, many: Path, tmp_path: Path) -> None:
    whole, _ = run(many, tokenizer)
    scratch: dict[str, Any] = {
        "scratch": (fsspec.filesystem("file"), str(tmp_path / "kept")),
        "local_scratch": tmp_path / "kept",
    }
    asked = iter(range(1000))
    with pytest.raises(StageInterrupted):
        run(many, tokenizer, **scratch, runtime=Runtime(processes=1), should_stop=lambda: next(asked) > 2)
    finished = sorted((tmp_path / "kept" / "units").glob("*.json"))
    assert 0 < len(finished) < 9
    times = [path.stat().st_mtime_ns for path in finished]
    output, metrics = run(many, tokenizer, **scratch)
    assert metrics["units"] == {"encoded": 9 - len(finished), "found_finished": len(finished)}
    assert [path.stat().st_mtime_ns for path in finished] == times
    assert metrics["encoded_by"] == {"gigatoken": 9}
    assert describe_files(output) == describe_files(whole)
    # Nothing is left to choose a library for; what was done says what did it.
    output, metrics = run(many, tokenizer, **scratch)
    assert metrics["encoder"] is None
    assert metrics["encoded_by"] == {"gigatoken": 9}
    assert describe_files(output) == describe_files(whole)
    again, metrics = run(many, tokenizer, **scratch)
    assert metrics["units"] == {"encoded": 0, "found_finished": 9}
    assert describe_files(again) == describe_files(whole)


@pytest.mark.parametrize("kind", ["local", "memory", "s3"])
def test_what_was_damaged_in_the_scratch_is_done_again(
    run: Run, tokenizer: Path, many: Path, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    if kind == "local":
        filesystem, place = fsspec.filesystem("file"), str(tmp_path / "kept")
    else:
        url = f"memory://{tmp_path.name}" if kind == "memory" else request.getfixturevalue("s3_url")
        filesystem, place = fsspec.url_to_fs(url, **({"use_listings_cache": False} if kind == "s3" else {}))
    first, _ = run(many, tokenizer, scratch=(filesystem, place), local_scratch=tmp_path / "kept")
    damages: dict[str, Callable[[bytes], bytes]] = {
        "train-00001-000.safetensors": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        "train-00003-000.safetensors": lambda data: data[:100],
        "train-00005.json": lambda data: data[:-20],
    }
    for name, damage in damages.items():
        path = f"{place}/units/{name}"
        data = damage(filesystem.cat_file(path))
        filesystem.rm_file(path)
        filesystem.pipe_file(path, data)
    filesystem.rm_file(f"{place}/units/train-00007-000.safetensors")
    if kind != "local":
        # Another machine goes on.
        shutil.rmtree(tmp_path / "kept")
    second, metrics = run(many, tokenizer, scratch=(filesystem, place), local_scratch=tmp_path / "kept")
    assert metrics["units"] == {"encoded": 4, "found_finished": 5}
    assert describe_files(second) == describe_files(first)
    said = [note for note in run.notes if "damaged" in note]
    assert [note.split()[5] for note in said] == [f"train-0000{number}.parquet" for number in (1, 3, 5, 7)]


def test_linked_files_of_an_artifact_outlive_the_scratch(run: Run, tokenizer: Path, many: Path, tmp_path: Path) -> None:
    scratch: dict[str, Any] = {
        "scratch": (fsspec.filesystem("file"), str(tmp_path / "kept")),
        "local_scratch": tmp_path / "kept",
    }
    first, _ = run(many, tokenizer, **scratch)
    before = describe_files(first)
    shard = tmp_path / "kept" / "units" / "train-00000-000.safetensors"
    assert shard.stat().st_ino == (first / "train-00000.safetensors").stat().st_ino
    (tmp_path / "kept" / "units" / "train-00000.json").unlink()
    # Done again, it does not write into the file that is linked to.
    run(many, tokenizer, **scratch)
    assert shard.stat().st_ino != (first / "train-00000.safetensors").stat().st_ino
    shutil.rmtree(tmp_path / "kept")
    assert describe_files(first) == before


def test_the_tokenizer_goes_along(run: Run, tokenizer: Path, problems: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tokenizer, tmp_path / "source"))
    (source / "tokenizer.model").write_bytes(b"something that SentencePiece reads")
    folder, _ = run(problems, source, {"bos": True})
    copied = {path.name: path.read_bytes() for path in (folder / "tokenizer").iterdir()}
    assert copied == {path.name: path.read_bytes() for path in source.iterdir()}
    folder, _ = run(problems, source, {"bos": False})
    read = Tokenizer(folder / "tokenizer")
    assert read.bos_id == read.eos_id == Tokenizer(source).eos_id != Tokenizer(source).bos_id


def test_empty_splits_are_left_out(run: Run, tokenizer: Path, tmp_path: Path) -> None:
    documents = write_documents(tmp_path / "documents", {"test": [], "train": rows(["a", ""])}, shard_rows=10)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), documents / "validation-00000.parquet")
    content = json.loads((documents / "documents.json").read_bytes())
    nothing = {"documents": 0, "bytes": 0}
    content["splits"]["validation"] = {"shards": [{"name": "validation-00000.parquet"} | nothing]} | nothing
    (documents / "documents.json").write_text(json.dumps(content))
    folder, _ = run(documents, tokenizer)
    assert list(described(folder)["splits"]) == ["train"]
    assert [path.name for path in folder.glob("*.safetensors")] == ["train-00000.safetensors"]
    content["splits"] = {"validation": content["splits"]["validation"]}
    (documents / "documents.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"the documents of tests/corpus are none"):
        run(documents, tokenizer)


@pytest.mark.parametrize(
    ("columns", "config", "message"),
    [
        ({"other": ["1"]}, {}, "train-00000.parquet have no column 'text'"),
        ({"text": ["1+1=2"]}, {"loss_on": "target"}, "train-00000.parquet have no column 'target'"),
        ({"text": [b"1"]}, {}, "the column 'text' holds binary, not text"),
        ({"text": ["1", None]}, {}, "the column 'text' has rows without a value"),
        ({"text": ["1+1=2"], "target": ["3"]}, {"loss_on": "target"}, "does not end with its target '3'"),
        ({"text": ["1+1=2"], "target": [""]}, {"loss_on": "target"}, "does not end with its target ''"),
        ({"text": ["2"], "target": ["2"]}, {"loss_on": "target"}, "does not end with its target '2' after a prompt"),
        ({"text": ["1+x=2"], "target": ["2"]}, {"loss_on": "target"}, "does not know the character 'x'"),
        ({"text": ["1+x=2"]}, {}, "does not know the character 'x'"),
    ],
)
def test_documents_that_do_not_fit_are_refused(
    run: Run, characters: Path, tmp_path: Path, columns: dict[str, Any], config: dict[str, str], message: str
) -> None:
    documents = write_documents(tmp_path / "documents", {"train": rows(["1"])}, shard_rows=10)
    pq.write_table(pa.table(columns), documents / "train-00000.parquet")
    with pytest.raises(UserError, match=message) as error:
        run(documents, characters, config)
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_refused(run: Run, tokenizer: Path, tmp_path: Path) -> None:
    documents = write_documents(tmp_path / "documents", {"train": rows(["1"])}, shard_rows=10)
    broken = pa.array([b"a\xff\xfeb"]).view(pa.string())
    pq.write_table(pa.table({"text": broken}), documents / "train-00000.parquet")
    with pytest.raises(UserError, match=r"documents train-00000.parquet cannot be read .*UTF8"):
        run(documents, tokenizer)
    (documents / "train-00000.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"documents train-00000.parquet cannot be read"):
        run(documents, tokenizer)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"source": {"name": "x"}, "splits": {"train": {"shards": [{"name": "../x"}]}}}']
)
def test_a_description_that_is_none(run: Run, tokenizer: Path, problems: Path, content: str) -> None:
    (problems / "documents.json").write_text(content)
    with pytest.raises(UserError, match=r"documents.json describes no documents .*; make them again"):
        run(problems, tokenizer)


def test_an_id_beyond_the_vocabulary_is_refused(
    run: Run, tokenizer: Path, problems: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No tokenizer that can be made here does this; were there one, its ids would be cut short without a word.
    monkeypatch.setattr(Tokenizer, "__len__", lambda self: 20)
    with pytest.raises(
        UserError, match=r"documents train-00000.parquet, row 0: the tokenizer gives the id \d+, beyond"
    ):
        run(problems, tokenizer)


def test_units_have_names_of_their_own() -> None:
    units = [Unit(split=split, number=n, name="x", documents=1, bytes=1) for split in ("a", "a-1") for n in (1, 10001)]
    assert len({unit.key for unit in units}) == 4
