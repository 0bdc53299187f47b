import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from common.errors import UserError
from tasks.corpus.benchmarks import Benchmark, known_benchmarks
from tasks.corpus.contamination import Contamination, ContaminationConfig, resolved
from tasks.corpus.text import Texts
from tests.tasks.corpus import reference
from tests.tasks.corpus.conftest import json_lines
from tests.tasks.corpus.reference import TEXTS
from tests.tasks.corpus.stage import Run


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setenv("CAIRN_HUB", str(folder))
    return folder


def write(hub: Path, id_: str, rows: Sequence[dict[str, Any]], config: str = "default", split: str = "test") -> None:
    path = hub / id_ / config / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    files = f"{{split: {split}, path: {config}/{split}-*}}"
    (hub / id_ / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files: [{files}]\n---\n")


def config(*benchmarks: str | Benchmark, ngram: int = 13) -> ContaminationConfig:
    return ContaminationConfig(benchmarks=benchmarks, ngram=ngram)


def match(benchmarks: Sequence[Sequence[str]], text: str, ngram: int) -> int:
    """The first benchmark with a row that has a run of words in common with a text, by sets."""
    own = set(reference.ngrams(reference.plain_words(text), ngram))
    for number, rows in enumerate(benchmarks):
        if any(own & set(reference.ngrams(reference.plain_words(row), ngram)) for row in rows):
            return number
    return -1


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(TEXTS, min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(TEXTS, max_size=5),
    st.integers(1, 4),
)
def test_documents_are_matched_as_by_sets(hub: Path, rows: list[list[str]], batch: list[str], ngram: int) -> None:
    benchmarks = []
    for number, texts in enumerate(rows):
        write(hub, f"test/number{number}", [{"text": text} for text in texts])
        benchmarks.append(Benchmark(id=f"test/number{number}", columns=("text",)))
    batch = [*batch, *(f"before {text} after" for texts in rows for text in texts)]
    if not any(len(reference.plain_words(text)) >= ngram for texts in rows for text in texts):
        with pytest.raises(UserError, match="take a smaller ngram"):
            Contamination(config(*benchmarks, ngram=ngram))
        return
    contamination = Contamination(config(*benchmarks, ngram=ngram))
    expected = [match(rows, text, ngram) for text in batch]
    assert contamination.matches(Texts.of(batch)).tolist() == expected
    assert contamination.passes(Texts.of(batch)).tolist() == [number < 0 for number in expected]


ROW = "The annual labour of every nation is the fund which originally supplies it with all the necessaries"


def test_case_punctuation_and_white_space_do_not_count(hub: Path) -> None:
    write(hub, "test/rows", [{"question": ROW, "choices": {"text": ["short", ROW[::-1]]}}, {"question": "too short"}])
    benchmark = Benchmark(id="test/rows", columns=("question", "choices.text"))
    contamination = Contamination(config(benchmark))
    words = ROW.split()
    batch = [
        ROW,
        f"Something else.\n\n{ROW.upper()}!",
        "-".join(words),
        "\n".join(f"“{word},” " for word in words),
        " ".join(words[2:15]),
        " ".join(words[2:14]),
        " ".join([*words[:8], "very", *words[8:]]),
        "too short",
        ROW[::-1],
        "",
    ]
    assert (contamination.matches(Texts.of(batch)) == 0).tolist() == [*[True] * 5, *[False] * 3, True, False]
    assert contamination.names == ("test/rows",)
    (described,) = contamination.described
    assert {**described, "sha256": ""} == {"benchmark": "test/rows", "texts": 4, "compared": 2, "sha256": ""}


def test_the_stage_drops_counts_and_says_what_it_compared_with(hub: Path, tmp_path: Path) -> None:
    write(hub, "test/rows", [{"text": ROW}, {"text": "too short"}])
    texts = ["One of its own.", f"Quoted: {ROW.upper()}!", "Another.", " ".join(ROW.split()[1:14])]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_bytes(json_lines({"text": text} for text in texts))
    benchmark = {"id": "test/rows", "columns": ["text"]}
    source = {"kind": "files", "path": str(tmp_path / "data")}
    run = Run(tmp_path / "run", {"source": source, "contamination": {"benchmarks": [benchmark]}})
    metrics = run.start()
    assert run.texts() == {"train": [[texts[0], texts[2]]]}
    dropped = {"documents": 2, "bytes": len(texts[1].encode()) + len(texts[3].encode())}
    parameters = {"benchmark": "test/rows", "ngram": 13}
    assert run.described()["dropped"] == [{"rule": "contamination", "parameters": parameters, **dropped}]
    assert metrics["dropped"] == {"contamination": dropped}
    (compared,) = metrics["compared_with"]
    assert (compared["benchmark"], compared["texts"], compared["compared"]) == ("test/rows", 2, 1)


def test_texts_of_any_shape_are_read(hub: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"a": "one", "b": {"c": ["two", None], "d": 1}, "e": [{"f": "three"}, {"f": None}], "g": None},
        {"a": None, "b": {"c": [], "d": 2}, "e": [], "g": "four"},
    ]
    write(hub, "test/shapes", rows, "some", "validation")

    def texts(*columns: str, **changes: str) -> list[str]:
        return Benchmark.model_validate(
            {"id": "test/shapes", "config": "some", "split": "validation", "columns": columns, **changes}
        ).texts()

    assert texts("a") == ["one"]
    assert texts("b.c", "e.f", "g", "a") == ["two", "three", "one", "four"]
    with pytest.raises(UserError, match="no column 'question'; known are: a, b, e, g"):
        texts("question")
    with pytest.raises(UserError, match=r"no column 'b\.cc'; did you mean 'c'"):
        texts("b.cc")
    with pytest.raises(UserError, match=r"column 'b\.d' has no texts but int"):
        texts("b.d")
    with pytest.raises(UserError, match="has no texts but"):
        texts("a.x")
    with pytest.raises(UserError, match="no split 'test'; known are: validation"):
        texts("a", split="test")
    with pytest.raises(UserError, match="cannot be read from"):
        texts("a", config="another")


def test_the_digest_is_that_of_the_files(hub: Path) -> None:
    write(hub, "test/rows", [{"text": ROW}])
    unresolved = config(Benchmark(id="test/rows", columns=("text",)))
    first = resolved(unresolved)
    assert isinstance(first.benchmarks[0], Benchmark)
    assert first.benchmarks[0].digest
    assert resolved(first) == first
    sha256 = Contamination(first).described[0]["sha256"]
    write(hub, "test/rows", [{"text": ROW + " and conveniencies"}])
    assert resolved(unresolved) != first
    assert Contamination(unresolved).described[0]["sha256"] != sha256
    with pytest.raises(UserError, match="is not what its digest"):
        resolved(first)
    with pytest.raises(UserError, match="is not what its digest"):
        Contamination(first)


def test_what_is_nowhere_is_told(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A port where nobody listens, so that nothing outside is asked.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    benchmark = Benchmark(id="test/nowhere", columns=("text",))
    with pytest.raises(UserError, match=f"'test/nowhere' was not found: not below CAIRN_HUB={hub}, and the Hugging"):
        Contamination(config(benchmark))
    monkeypatch.delenv("CAIRN_HUB")
    with pytest.raises(UserError, match="'test/nowhere' was not found: CAIRN_HUB is not set, and the Hugging"):
        Contamination(config(benchmark))
    with pytest.raises(UserError, match=r"'test/nowhere'.* is not here: CAIRN_HUB is not set, and its digest"):
        resolved(config(benchmark.model_copy(update={"digest": "0" * 64})))


@pytest.mark.parametrize(
    "wrong",
    [{"benchmarks": ["arc_esay"]}, {"benchmarks": []}, {"benchmarks": ["copa"], "ngram": 0}, {"benchmarks": [{}]}],
)
def test_configs_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ContaminationConfig.model_validate(wrong)


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(ValidationError, match="no benchmark 'arc_esay'; did you mean 'arc_easy'"):
        ContaminationConfig(benchmarks=("arc_esay",))


@pytest.mark.skipif("CAIRN_HUB" not in os.environ, reason="CAIRN_HUB is not set: the benchmarks are not here")
def test_each_known_benchmark_is_found_in_documents_that_have_its_rows() -> None:
    contamination = Contamination(config(*known_benchmarks()))
    assert contamination.names == tuple(known_benchmarks())
    prose = (
        "Whatever the weather, people have to be out with a purpose, and that is all there is to say about it here. "
    )
    for number, (benchmark, described) in enumerate(
        zip(known_benchmarks().values(), contamination.described, strict=True)
    ):
        texts = benchmark.texts()
        long = [text for text in texts if len(reference.plain_words(text)) >= 13]
        assert len(texts) == described["texts"] > 100
        assert len(long) == described["compared"]
        found = contamination.matches(Texts.of([f"{prose}\n{text}\n{prose}" for text in long]))
        # Benchmarks share texts; the first that has one counts.
        assert ((found >= 0) & (found <= number)).all()
        assert not long or (found == number).mean() > 0.9
    assert contamination.passes(Texts.of([prose])).all()
