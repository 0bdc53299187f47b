import itertools
import json
import re
from fractions import Fraction
from pathlib import Path
from string import Formatter

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.files import canonical_json, sha256_bytes
from tasks.corpus.sources import SPLITS, Split
from tasks.problems import Operator, generate, split_of
from tasks.word_problems import FRAMES, THINGS, WordProblemSource, frames
from tests.tasks.conftest import RunStage

OPERATORS: tuple[Operator, ...] = ("+", "-", "*", "/")


def source(**keys: object) -> WordProblemSource:
    return WordProblemSource.model_validate({"kind": "word_problems", "train": 40, "validation": 5, "test": 5, **keys})


def rows(made: WordProblemSource, split: Split) -> list[dict[str, str]]:
    found: list[dict[str, str]] = made.table(generate(made, split), split, np.random.default_rng(1)).to_pylist()
    return found


def phrasings(operator: Operator, split: Split) -> list[str]:
    return [phrasing for frame in frames(operator, split) for phrasing in frame.phrasings]


def worked(target: str) -> tuple[int, str, int, int]:
    """What an answer says: its operands and operator, and what they come to, which is said twice."""
    said = re.fullmatch(r"(\d+) ([-+*/]) (\d+) = <<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)", target)
    assert said is not None, target
    a, operator, b, *marked, result = said.groups()
    assert marked == [a, operator, b, result]
    return int(a), operator, int(b), int(result)


@settings(max_examples=30, deadline=None)
@given(
    minimum=st.integers(0, 30),
    width=st.integers(30, 900),
    operators=st.lists(st.sampled_from(OPERATORS), min_size=1, max_size=4, unique=True),
    seed=st.integers(0, 2**31),
)
def test_every_answer_is_right_and_about_the_numbers_of_its_question(
    minimum: int, width: int, operators: list[Operator], seed: int
) -> None:
    few = {"train": 20, "validation": 1, "test": 1}
    made = source(minimum=minimum, maximum=minimum + width, operators=tuple(operators), seed=seed, **few)
    for index, split in enumerate(SPLITS):
        for row in rows(made, split):
            a, operator, b, result = worked(row["target"])
            assert operator in operators
            exact = {"+": a + b, "-": a - b, "*": a * b, "/": b and Fraction(a, b)}
            assert exact[operator] == result >= 0
            assert sorted(re.findall(r"\d+", row["prompt"])) == sorted([str(a), str(b)])
            assert split_of(np.array([[a, b]])).tolist() == [index]
            assert row["text"] == f"{row['prompt']}\n{row['target']}"
            messages = json.loads(row["messages"])
            assert [message["role"] for message in messages] == ["user", "assistant"]
            assert [message["content"] for message in messages] == [row["prompt"], row["target"]]
            assert canonical_json(messages).decode() == row["messages"]


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_phrasing_is_of_one_split(operator: Operator) -> None:
    by_split = {split: phrasings(operator, split) for split in SPLITS}
    everything = list(itertools.chain(*by_split.values()))
    assert len({phrasing.lower() for phrasing in everything}) == len(everything)
    assert 0.75 < len(by_split["train"]) / len(everything) < 0.85
    # Every way of asking is in training and in the test, in other combinations.
    assert len(frames(operator, "train")) >= len(FRAMES[operator]) - 1
    assert len(frames(operator, "test")) >= len(FRAMES[operator]) - 3
    for phrasing in everything:
        assert not set("[]|") & set(phrasing)
        fields = [field for _, field, *_ in Formatter().parse(phrasing) if field]
        # Both operands once, or the answer could not be told from the question.
        assert sorted(field[0] for field in fields if field.partition("_")[0] in ("a", "b")) == ["a", "b"]


def test_the_split_of_a_phrasing_is_pinned() -> None:
    # One that moved to another split would be tested on after it was trained on.
    counts = {operator: [len(phrasings(operator, split)) for split in SPLITS] for operator in OPERATORS}
    assert counts == {"+": [2156, 248, 280], "-": [276, 37, 31], "*": [262, 29, 31], "/": [139, 19, 26]}
    assert "What is {a} + {b}?" in phrasings("+", "train")


def test_no_question_of_the_test_is_put_as_one_of_training() -> None:
    made = source(train=4000, test=500, operators=OPERATORS)
    shapes = {split: {re.sub(r"\d+", "0", row["prompt"]) for row in rows(made, split)} for split in ("train", "test")}
    assert not shapes["train"] & shapes["test"]
    numbers = [{tuple(sorted(worked(row["target"])[::2][:2])) for row in rows(made, split)} for split in SPLITS]
    for one, other in itertools.combinations(numbers, 2):
        assert not one & other


def test_every_frame_is_used() -> None:
    made = source(maximum=30, length_weights=(1, 1), train=3000, operators=OPERATORS)
    asked = {re.sub(r"\d+", "0", row["prompt"]) for row in rows(made, "train")}
    for frame in itertools.chain(*(frames(operator, "train") for operator in OPERATORS)):
        patterns = [re.sub(r"\\\{\w+\\\}", r"[\\w ]+", re.escape(phrasing)) for phrasing in frame.phrasings]
        pattern = re.compile("|".join(patterns))
        assert any(pattern.fullmatch(question) for question in asked), frame


def test_a_question_names_the_frame_that_it_is_put_in() -> None:
    made = source(maximum=30, train=2, test=60, operators=OPERATORS)
    asked = rows(made, "test")
    for row in asked:
        (frame,) = (frame for frame in frames(worked(row["target"])[1], "test") if frame.name == row["phrasing"])
        patterns = (re.sub(r"\\\{\w+\\\}", r"[\\w ]+", re.escape(phrasing)) for phrasing in frame.phrasings)
        assert any(re.fullmatch(pattern, row["prompt"]) for pattern in patterns)
    assert len({row["phrasing"] for row in asked}) > 10
    # A frame is called the same in every split.
    names = {split: {frame.name for frame in frames("+", split)} for split in SPLITS}
    assert len(names["train"]) == len(frames("+", "train"))
    assert names["test"] < names["train"] | {"What is {a} + {b}?"}


def test_the_texts_of_documents_are_pinned() -> None:
    # Models that were trained on them, and their scores, are of exactly these.
    texts = [row["text"] for row in rows(source(operators=OPERATORS), "train")]
    assert sha256_bytes(canonical_json(texts)).startswith("6f2e4336fa17e019")


def test_one_thing_is_not_several() -> None:
    made = source(minimum=0, maximum=3, train=8, validation=1, test=1, length_weights=(1,))
    asked = " ".join(
        row["prompt"] for seed in range(40) for row in rows(made.model_copy(update={"seed": seed}), "train")
    )
    ones, severals = ("|".join(words) for words in zip(*THINGS, strict=True))
    assert not re.search(rf"\b1 ({severals})\b|\b[023] ({ones})\b", asked)
    assert re.search(rf"\b1 ({ones})\b", asked)
    assert re.search(rf"\b0 ({severals})\b", asked)


def test_the_same_seed_gives_the_same_questions_and_another_does_not(run_stage: RunStage, tmp_path: Path) -> None:
    first, again, other = (
        run_stage("documents", {"source": source(seed=seed).model_dump()})[0] / "train-00000.parquet"
        for seed in (0, 0, 1)
    )
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != other.read_bytes()
    table = pq.read_table(first)
    assert table.column_names == ["text", "prompt", "target", "messages", "phrasing"]
    assert table.num_rows == 40


def test_things_are_not_counted_below_zero() -> None:
    with pytest.raises(ValueError, match="minimum -1: word problems count things"):
        source(minimum=-1)
