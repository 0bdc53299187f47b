"""What the behaviour suite found, as it is shown at the end of a run."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from artifacts.store import Store
from common.errors import UserError
from flows.evaluation_tables import Scored, evaluation_tables, exact_match_table, last_of_each
from flows.recipe import load_recipe
from flows.run import _show_result
from tasks.asking import questions
from tasks.behaviour import Config
from tests.flows.test_exact_match import record, shown
from tests.tasks.asking.suite import write_suite


def counted(n: int, correct: int, low: float, high: float) -> dict[str, Any]:
    return {"n": n, "correct": correct, "interval": [low, high]}


def metrics(**more: Any) -> dict[str, Any]:
    groups = [
        {"category": "addition", "kind": "mathematics", **counted(20, 5, 0.1119, 0.4687)},
        {"category": "geography", "kind": "knowledge", **counted(1234, 617, 0.4721, 0.5279)},
        {"category": "literature", "kind": "knowledge", **counted(20, 0, 0.0, 0.1611)},
    ]
    sample = {"category": "geography", "prompt": "What is [the] capital?", "prediction": "Paris", "target": "/Paris/"}
    found = {
        **counted(1274, 622, 0.4608, 0.5156),
        "categories": groups,
        "max_new_tokens": 128,
        "cut_off": 0,
        "too_long": 0,
        "samples": [{**sample, "correct": True}, {**sample, "prediction": "Rome", "correct": False}],
    }
    return {**found, **more}


def rows(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("│ ").split("│")] for line in lines if "–" in line]


def test_categories_stand_by_kind_with_their_intervals() -> None:
    lines = shown(evaluation_tables(record("behaviour", **metrics())))
    assert max(map(len, lines)) <= 80
    assert rows(lines) == [
        ["knowledge", "geography", "1,234", "50.0%", "47.2% – 52.8%"],
        ["literature", "20", "0.0%", "0.0% – 16.1%"],
        ["mathematics", "addition", "20", "25.0%", "11.2% – 46.9%"],
        ["all", "", "1,274", "48.8%", "46.1% – 51.6%"],
    ]
    text = "\n".join(lines)
    assert "What is [the]" in text
    assert text.count("✓") == text.count("✗") == 1
    assert "had not ended" not in text
    assert "longer than" not in text


def test_cut_answers_and_long_questions_are_told() -> None:
    found = metrics(cut_off=1234, too_long=5, samples=[])
    text = "\n".join(shown(evaluation_tables(record("behaviour", **found)), 200))
    assert "1,234 answers had not ended at 128 tokens or the model's last position\n" in text
    assert "5 prompts are longer than the model's positions, and count as wrong" in text
    assert "Sample answers" not in text


def test_the_last_one_of_a_run_is_shown_and_not_compared_as_exact_match() -> None:
    whole, part, again = (
        Scored(model, "", record("behaviour", **metrics(suite=suite)))
        for model, suite in (("refined", "ab"), ("refined", "cd"), ("tuned", "ab"))
    )
    assert last_of_each([whole, part, again]) == [part, again]
    assert exact_match_table([whole, part, again]) is None


RECIPE = """
description: A model that is asked.
stages:
  texts: {stage: documents, source: {kind: arithmetic, maximum: 9, train: 60, validation: 8, test: 8}}
  tokenizer: {stage: tokenizer, vocabulary: {kind: bytes}}
  tokens: {stage: tokens, documents: texts, tokenizer: tokenizer}
  base:
    stage: pretrain
    tokens: tokens
    model: {architecture: llama, vocab_size: 259, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1,
            num_attention_heads: 2, max_position_embeddings: 96}
    training: {steps: 1, batch_size: 1, sequence_length: 9, optimizer: {learning_rate: 0.01}}
  asked: {stage: behaviour, model: base, categories: [poetry]}
"""


def test_a_recipe_holds_the_digest_of_its_questions_and_shows_their_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_suite(tmp_path / "prompts")
    monkeypatch.setattr(questions, "PROMPTS", prompts)
    path = tmp_path / "asked.yaml"
    path.write_text(RECIPE)
    recipe = load_recipe(str(path))
    config = recipe.stages[-1].config
    assert isinstance(config, Config)
    assert config.suite == questions.suite_digest(["poetry"])
    records = {
        entry.name: record(entry.stage, **(metrics() if entry.name == "asked" else {})) for entry in recipe.stages
    }
    text = io.StringIO()
    _show_result(recipe, records, Store.open(str(tmp_path / "store")), tmp_path, Console(file=text, width=120))
    assert "Questions answered rightly" in text.getvalue()
    path.write_text(RECIPE.replace("poetry", "poesy"))
    with pytest.raises(UserError, match=r"stages.asked: there is no category 'poesy'"):
        load_recipe(str(path))
