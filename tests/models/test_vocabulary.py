"""Rows for new tokens, in canonical arrays, and tokenizers that do or do not extend another."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE, Unigram, WordLevel

from common.errors import UserError
from models.engine import inference_engine
from models.optimizer import UPDATES, OptimizerConfig
from models.tokenizer import TOKENIZER_FILE, Roles, read_backend, write_tokenizer
from models.vocabulary import Vocabulary, extended_vocabulary, with_rows
from models.weights import canonical_shapes, optimizer_shapes
from tests.models.tiny import VOCABULARY, pieces, random_weights, tiny

ADDED = Vocabulary(list(range(VOCABULARY - 3)), [VOCABULARY - 3, VOCABULARY])
"""The model has three rows to spare, and one of the two new tokens takes the first of them."""


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-tied", "mixtral"])
def test_new_rows_are_the_mean_of_the_known_ones(name: str) -> None:
    config = tiny(name)
    weights = random_weights(config, 0)
    rows = VOCABULARY + 2
    larger = config.model_copy(update={"vocab_size": rows})
    found = with_rows(weights, config, rows, ADDED)
    assert {name: array.shape for name, array in found.items()} == canonical_shapes(larger)
    assert all(array.dtype == weights[name].dtype for name, array in found.items())
    grown = {name for name in found if found[name].shape != weights[name].shape}
    embedding = "transformer.wte.weight" if name == "gpt2" else "model.embed_tokens.weight"
    assert grown == ({embedding} if config.tie_word_embeddings else {embedding, "lm_head.weight"})
    for changed in grown:
        old, new = weights[changed], found[changed]
        assert (new[ADDED.known] == old[ADDED.known]).all()
        assert (new[VOCABULARY - 2 : VOCABULARY] == old[-2:]).all()
        for row in (VOCABULARY - 3, VOCABULARY, VOCABULARY + 1):
            np.testing.assert_allclose(new[row], old[ADDED.known].mean(0), atol=1e-7)
    # A new token's logit is the mean of the known ones', so none of them is drowned.
    ids_BT = np.arange(8, dtype=np.int32)[None]
    logits_BTV = inference_engine("torch", larger, "float32", pieces(found)).logits(ids_BT)
    before_BTV = inference_engine("torch", config, "float32", pieces(weights)).logits(ids_BT)
    np.testing.assert_allclose(logits_BTV[..., ADDED.known], before_BTV[..., ADDED.known], atol=1e-5)
    np.testing.assert_allclose(logits_BTV[..., -1], before_BTV[..., ADDED.known].mean(-1), atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_moments_of_new_rows_are_zero(optimizer: str) -> None:
    config, kind = tiny("llama"), OptimizerConfig.model_validate({"name": optimizer, "learning_rate": 0.1})
    rows = VOCABULARY + 2
    moments = {name: np.ones(shape, np.float32) for name, shape in optimizer_shapes(config, kind).items()}
    found = with_rows(moments, config, rows, ADDED)
    larger = config.model_copy(update={"vocab_size": rows})
    assert {name: array.shape for name, array in found.items()} == optimizer_shapes(larger, kind)
    assert found[UPDATES] == 1
    for name, array in found.items():
        if array.shape != moments[name].shape:
            assert np.flatnonzero(array[:, 0] == 0).tolist() == [VOCABULARY - 3, VOCABULARY, VOCABULARY + 1]
        else:
            assert (array == 1).all()


def test_a_model_whose_tokens_are_all_known_stays_as_it_is() -> None:
    config = tiny("gpt2")
    weights = random_weights(config, 0)
    found = with_rows(weights, config, VOCABULARY, Vocabulary(list(range(VOCABULARY)), []))
    assert all((found[name] == array).all() for name, array in weights.items())


def model(kind: str) -> Any:
    """A tokenizer's model of a kind, with the ids 0 to 6."""
    tokens = ["<eos>", "<pad>", "a", "b", "c", "ab", "\n"]
    numbered = {token: index for index, token in enumerate(tokens)}
    if kind == "unigram":
        return Unigram([(token, -1.0) for token in tokens], unk_id=1)
    return BPE(numbered, [("a", "b")]) if kind == "bpe" else WordLevel(numbered)


@pytest.fixture(params=["bpe", "unigram", "words"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a tokenizer of each kind that a `tokenizer.json` has."""
    backend = Backend(model(request.param))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("\n|[^\n]+"), "isolated")
    backend.add_special_tokens([AddedToken("<eos>", special=True), AddedToken("<pad>", special=True)])
    (tmp_path / "old").mkdir()
    write_tokenizer(tmp_path / "old", backend, Roles("<eos>", "<eos>", "<pad>"))
    return tmp_path / "old"


def changed(folder: Path, change: Callable[[Backend], None]) -> Path:
    """Another folder with the tokenizer after a change."""
    other = Path(shutil.copytree(folder, folder.with_name("new")))
    backend = read_backend(other / TOKENIZER_FILE)
    change(backend)
    backend.save(str(other / TOKENIZER_FILE))
    return other


def test_a_tokenizer_extends_itself(folder: Path) -> None:
    assert extended_vocabulary(folder, folder) == Vocabulary(list(range(7)), [])


def with_chatml(backend: Backend) -> None:
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])


def test_what_is_added_is_found(folder: Path) -> None:
    other = changed(folder, with_chatml)
    assert extended_vocabulary(folder, other) == Vocabulary(list(range(7)), [7, 8])
    assert extended_vocabulary(other, other).known == list(range(9))
    with pytest.raises(UserError, match=r"the token '<\|im_start\|>' is 7 in the one and not in the other"):
        extended_vocabulary(other, folder)


def normalised(backend: Backend) -> None:
    backend.normalizer = normalizers.Lowercase()


def divided(backend: Backend) -> None:
    backend.pre_tokenizer = pre_tokenizers.Whitespace()


def learned(backend: Backend) -> None:
    backend.model = WordLevel({"a": 0, "b": 1, "<eos>": 2, "<pad>": 3})


@pytest.mark.parametrize(
    ("change", "message"), [(normalised, "normalizer"), (divided, "pre-tokenizer"), (learned, "model")]
)
def test_a_tokenizer_that_reads_otherwise_is_another(
    folder: Path, change: Callable[[Backend], None], message: str
) -> None:
    with pytest.raises(UserError, match=f"^their {message} differs$"):
        extended_vocabulary(folder, changed(folder, change))


def test_an_unreadable_tokenizer_is_named(folder: Path) -> None:
    (folder / TOKENIZER_FILE).write_text("[")
    with pytest.raises(UserError, match=r"old/tokenizer\.json is no readable tokenizer .*make it again"):
        extended_vocabulary(folder, folder)
