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

from common.files import canonical_json
from tasks.corpus.sources import SPLITS, Split
from tasks.problems import Operator, generate, split_of
from tasks.word_problems import PHRASINGS, WordProblemSource
from tests.tasks.conftest import RunStage

OPERATORS: tuple[Operator, ...] = ("+", "-", "*", "/")


def source(**keys: object) -> WordProblemSource:
    return WordProblemSource.model_validate({"kind": "word_problems", "train": 40, "validation": 5, "test": 5, **keys})


def rows(made: WordProblemSource, split: Split) -> list[dict[str, str]]:
    found: list[dict[str, str]] = made.table(generate(made, split), split, np.random.default_rng(1)).to_pylist()
    return found


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
    made = source(minimum=minimum, maximum=minimum + width, operators=tuple(operators), seed=seed, validation=1, test=1)
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
def test_no_split_has_a_phrasing_of_another(operator: Operator) -> None:
    by_split = [{phrasing.lower() for phrasing in PHRASINGS[operator][split]} for split in SPLITS]
    assert [len(phrasings) for phrasings in by_split] == [len(PHRASINGS[operator][split]) for split in SPLITS]
    for one, other in itertools.combinations(by_split, 2):
        assert not one & other
    for phrasings in by_split:
        for phrasing in phrasings:
            fields = [field for _, field, *_ in Formatter().parse(phrasing) if field]
            # Both operands once, or the answer could not be told from the question.
            assert sorted(field[0] for field in fields if field.partition("_")[0] in ("a", "b")) == ["a", "b"]


def test_a_question_of_the_test_is_put_in_no_way_that_training_has() -> None:
    made = source(train=4000, test=500, operators=OPERATORS)
    shapes = {split: {re.sub(r"\d+", "0", row["prompt"]) for row in rows(made, split)} for split in ("train", "test")}
    assert not shapes["train"] & shapes["test"]
    numbers = [{tuple(sorted(worked(row["target"])[::2][:2])) for row in rows(made, split)} for split in SPLITS]
    for one, other in itertools.combinations(numbers, 2):
        assert not one & other


def test_every_phrasing_is_used() -> None:
    made = source(maximum=30, length_weights=(1, 1), train=3000, test=200, operators=OPERATORS)
    for split in ("train", "test"):
        asked = "\n".join(row["prompt"] for row in rows(made, split))
        for phrasings in PHRASINGS.values():
            for phrasing in phrasings[split]:
                pattern = re.sub(r"\\\{\w+\\\}", r"[\\w ]+", re.escape(phrasing))
                assert re.search(f"^{pattern}$", asked, re.MULTILINE), phrasing


def test_one_thing_is_not_several() -> None:
    made = source(minimum=0, maximum=3, train=8, validation=1, test=1, length_weights=(1,))
    asked = " ".join(
        row["prompt"] for seed in range(40) for row in rows(made.model_copy(update={"seed": seed}), "train")
    )
    assert not re.search(r"\b1 \w+s\b(?! and)", re.sub(r"1 in the \w+|1 on \w+", "", asked)), asked
    assert re.search(r"\b1 (apple|pear|coin|stamp|shell|marble|book|pencil|card|stone)\b", asked)


def test_the_same_seed_gives_the_same_questions_and_another_does_not(run_stage: RunStage, tmp_path: Path) -> None:
    first, again, other = (
        run_stage("documents", {"source": source(seed=seed).model_dump()})[0] / "train-00000.parquet"
        for seed in (0, 0, 1)
    )
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != other.read_bytes()
    table = pq.read_table(first)
    assert table.column_names == ["text", "prompt", "target", "messages"]
    assert table.num_rows == 40


def test_things_are_not_counted_below_zero() -> None:
    with pytest.raises(ValueError, match="minimum -1: word problems count things"):
        source(minimum=-1)
