"""What was published of other models."""

import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError

from tasks.reporting.references import ReferenceScore, Source, reference_scores, references

_EACH = [(one, score) for one in references() for score in one.scores]


def test_the_models_that_were_published_of_are_there() -> None:
    assert {one.model for one in references()} == {
        "MTLM1-200M",
        "MTLM2-40M",
        "GPT-2 124M",
        "OPT-125M",
        "Pythia-160M",
        "SmolLM2-135M",
        "MobileLLM-125M",
        "TinyLlama-1.1B",
    }


def test_a_model_is_of_one_size() -> None:
    assert len({(one.model, one.parameters) for one in references()}) == len({one.model for one in references()})


def test_accuracies_are_shares_and_perplexities_are_not() -> None:
    for one, score in _EACH:
        assert ("perplexity" in score.metric) == (score.value > 1), (one.model, score)


def test_no_source_gives_two_values_for_one_thing() -> None:
    given = Counter((one.model, one.source, score.task, score.metric, score.few_shot) for one, score in _EACH)
    assert [key for key, times in given.items() if times > 1] == []


def test_no_two_sources_give_values_for_one_thing() -> None:
    """Where sources disagree the file has the primary one's; the others' stand in its comments."""
    given = Counter((one.model, score.task, score.metric, score.few_shot) for one, score in _EACH)
    assert [key for key, times in given.items() if times > 1] == []


def test_an_address_has_one_title() -> None:
    assert len({one.source.url for one in references()}) == len({one.source for one in references()})


def test_lm_eval_has_every_task() -> None:
    found = importlib.util.find_spec("lm_eval")
    assert found is not None
    assert found.origin is not None
    named: set[str] = set()
    wanted = {score.task for _, score in _EACH}
    folders = {"winogrande", "super_glue", "truthfulqa", "arc", "openbookqa", "hellaswag", "agieval", "commonsense_qa"}
    for folder in (*folders, "wikitext", "wsc273"):
        for path in (Path(found.origin).parent / "tasks" / folder).rglob("*.yaml"):
            named |= set(re.findall(r"^task: ([\w-]+)$", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert wanted <= named


def test_scores_come_with_their_models_and_sources() -> None:
    found = {model: (score, source) for model, score, source in reference_scores("boolq", "acc")}
    score, source = found["MTLM1-200M"]
    assert (score.value, score.few_shot) == (0.4425, None)
    assert source.url == "https://huggingface.co/Madras1/MTLM1-200M"
    score, source = found["MobileLLM-125M"]
    assert (score.value, score.few_shot) == (0.602, 0)
    assert source.url == "https://arxiv.org/abs/2402.14905"


def test_what_is_not_published_is_not_there() -> None:
    assert reference_scores("boolq", "acc_norm") == ()
    assert reference_scores("no_such_task", "acc") == ()


def test_an_accuracy_of_no_stated_kind_comes_with_both_and_says_so() -> None:
    for metric in ("acc", "acc_norm"):
        found = {model: score for model, score, _ in reference_scores("arc_easy", metric)}
        assert found["MTLM1-200M"].metric == "accuracy"
        assert found["MTLM1-200M"].value == 0.3864
    stated = [score for model, score, _ in reference_scores("hellaswag", "acc_norm") if model == "TinyLlama-1.1B"]
    assert [(score.few_shot, score.value) for score in stated] == [(0, 0.592), (10, 0.6031)]
    assert "TinyLlama-1.1B" not in {model for model, _, _ in reference_scores("hellaswag", "acc")}


def test_a_perplexity_of_no_stated_kind_comes_with_both() -> None:
    assert {model for model, _, _ in reference_scores("wikitext", "token_perplexity")} == {"MTLM2-40M"}
    assert {model for model, _, _ in reference_scores("wikitext", "word_perplexity")} == {"MTLM2-40M", "GPT-2 124M"}


@pytest.mark.parametrize("value", [0, 1, 44.25, float("nan"), float("inf"), True, "0.4425"])
def test_what_is_no_share_is_refused(value: object) -> None:
    with pytest.raises(ValidationError):
        ReferenceScore.model_validate({"task": "boolq", "metric": "acc", "value": value})


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ValidationError, match="metric"):
        ReferenceScore.model_validate({"task": "boolq", "metric": "acc_nrom", "value": 0.5})


@pytest.mark.parametrize("url", ["http://example.org", "javascript:alert(1)", "https://a b", "https://", "example.org"])
def test_an_address_is_https(url: str) -> None:
    with pytest.raises(ValidationError, match="url"):
        Source.model_validate({"title": "A card", "url": url, "accessed": "2026-11-22"})
