"""Cairn's answers against those of lm-eval's own `hf` model on the same folder, over real tasks."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from common.errors import UserError
from models.engine import EngineName, inference_engine
from models.tokenizer import Tokenizer
from models.weights import whole_pieces
from tasks.checkpoint import read_model
from tasks.harness.adapter import HarnessModel
from tests.tasks.harness.against_hf import NEAR, Model, answers, compare, ours, random_model, theirs

pytestmark = [
    pytest.mark.skipif("CAIRN_HUB" not in os.environ, reason="CAIRN_HUB names no folder with data sets"),
    # lm-eval's own model sets what PyTorch says is about to go, and transformers' bars use what Python says so of.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
TASKS = ("arc_easy", "boolq", "hellaswag", "winogrande", "truthfulqa_mc2", "wsc273", "agieval_aqua_rat")
LIMIT = 12
MODELS = ("llama", "llama-bos", "gpt2")
ASKED = [("llama", task) for task in TASKS] + [(name, task) for name in MODELS[1:] for task in ("boolq", "winogrande")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    @cache
    def made(name: str) -> Model:
        kind, _, bos = name.partition("-")
        return random_model(tmp_path_factory.mktemp(name), kind, bos=bool(bos))

    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what is made of the tasks' data, once for all tests."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def reference(model: Callable[[str], Model], data: Path) -> Callable[[str, str], dict[str, Any]]:
    """What lm-eval's own model answers, once for all tests."""
    lm = cache(lambda name: theirs(model(name)))
    return cache(lambda name, task: answers(lm(name), task, LIMIT, data))


def check(task: str, first: dict[str, Any], second: dict[str, Any]) -> None:
    found = compare(task, first, second)
    assert found.requests >= LIMIT
    assert found.furthest < NEAR
    assert found.other_choices == 0
    for name, (one, other) in found.scores.items():
        assert one == pytest.approx(other, abs=1e-6), name


@pytest.mark.parametrize(("name", "task"), ASKED)
def test_scores_are_those_of_lm_evals_own_model(
    name: str, task: str, model: Callable[[str], Model], reference: Callable[[str, str], dict[str, Any]], data: Path
) -> None:
    own = ours(model(name), bos=name == "llama-bos")
    check(task, reference(name, task), answers(own, task, LIMIT, data))
    if task == "boolq":
        assert own.truncated > 0


@pytest.mark.parametrize("engine", ["jax", "mlx"])
def test_every_engine_gives_the_same_scores(
    engine: EngineName, model: Callable[[str], Model], reference: Callable[[str, str], dict[str, Any]], data: Path
) -> None:
    check("arc_easy", reference("llama", "arc_easy"), answers(ours(model("llama"), engine), "arc_easy", LIMIT, data))


def test_the_size_of_batches_changes_nothing(
    model: Callable[[str], Model], reference: Callable[[str, str], dict[str, Any]], data: Path
) -> None:
    for batch_tokens in (1, 300):
        own = ours(model("llama"), batch_tokens=batch_tokens)
        check("hellaswag", reference("llama", "hellaswag"), answers(own, "hellaswag", LIMIT, data))


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


PAIRS = [
    ("", " nothing before it"),
    ("", "x"),
    ("a context that ends in spaces  ", "word"),
    # What joins the context's last token.
    ("an un", "believable story"),
    ("the caf", "é is open"),
    ("one line\n", "\n\nanother"),
    ("<|endoftext|>begins with a special token", " it is one"),
    ("long " * 200, "and its end"),
    ("short", " end" * 60),
]


@pytest.mark.parametrize("name", MODELS)
def test_texts_at_the_edges(name: str, model: Callable[[str], Model]) -> None:
    reference, own = theirs(model(name)), ours(model(name), bos=name == "llama-bos")
    for (expected, greedy), (found, same) in zip(
        reference.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True),
        own.loglikelihood(requests("loglikelihood", *PAIRS)),
        strict=True,
    ):
        assert found == pytest.approx(expected, abs=NEAR)
        assert same == greedy
    texts = [("one text",), ("a longer text, of several windows. " * 20,), ("x",)]
    for expected, found in zip(
        reference.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True),
        own.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)),
        strict=True,
    ):
        assert found == pytest.approx(expected, abs=NEAR)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_behind_contexts(name: str, model: Callable[[str], Model]) -> None:
    options = {"until": ["\n\n", "e"], "max_gen_toks": 12}
    asked = [(f"Question: what is {number} plus {number}?\nAnswer:", options) for number in range(3)]
    asked += [("many words " * 60, {"until": [], "max_gen_toks": 5})]
    reference, own = theirs(model(name), batch_size=1), ours(model(name), bos=name == "llama-bos")
    expected = reference.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert own.generate_until(requests("generate_until", *asked)) == expected
    assert own.truncated == 1


def test_it_is_told_after_each_batch_of_answers_how_far_it_is(model: Callable[[str], Model]) -> None:
    told: list[tuple[int, int]] = []
    read = read_model(model("llama").artifact)
    engine = inference_engine("torch", read.config, "float32", whole_pieces(read.weights))
    tokenizer = Tokenizer(model("llama").artifact / "tokenizer")
    own = HarnessModel(engine, tokenizer, False, 64, lambda done, total: told.append((done, total)))
    short, long = ({"until": ["\n"], "max_gen_toks": number} for number in (20, 25))
    own.generate_until(requests("generate_until", *[("Question: what is it?", short)] * 4, ("Question:", long)))
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_options_that_would_change_an_answer_are_refused_and_others_pass(model: Callable[[str], Model]) -> None:
    own = ours(model("llama"))
    plain = {"until": ["\n"], "max_gen_toks": 8}
    expected = own.generate_until(requests("generate_until", ("Question:", plain)))
    harmless = {**plain, "num_beams": 1, "do_sample": False, "temperature": 0.0, "top_p": 0.95, "min_p": None}
    assert own.generate_until(requests("generate_until", ("Question:", harmless))) == expected
    for name, value in {"num_beams": 10, "no_repeat_ngram_size": 3, "penalty_alpha": 0.6}.items():
        with pytest.raises(UserError, match=f"generated with {name}: {value}, which Cairn does not do"):
            own.generate_until(requests("generate_until", ("Question:", {**plain, name: value})))


def test_answers_that_leave_no_room_for_a_question(model: Callable[[str], Model]) -> None:
    with pytest.raises(UserError, match="answers of up to 256 tokens, and the model has 64 positions"):
        ours(model("llama")).generate_until(requests("generate_until", ("Question:", {"until": ["\n"]})))


def test_what_a_tokenizer_cannot_represent_is_told(tmp_path: Path) -> None:
    """A tokenizer of some characters alone has no token for others."""
    from models.tokenizer import write_tokenizer
    from models.weights import initial_weights
    from tasks.vocabulary.config import ROLES, Characters
    from tasks.vocabulary.written import characters_tokenizer
    from tests.models.tiny import tiny

    config = Characters(kind="characters", characters="0123456789+=")
    write_tokenizer(tmp_path, characters_tokenizer(config), ROLES)
    shape = tiny("llama", vocab_size=len(Tokenizer(tmp_path)))
    engine = inference_engine("torch", shape, "float32", whole_pieces(initial_weights(shape, 0)))
    lm = HarnessModel(engine, Tokenizer(tmp_path), False, 64)
    with pytest.raises(UserError, match="cannot represent 'a question yes'"):
        lm.loglikelihood(requests("loglikelihood", ("a question", " yes")))
