import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sentencepiece
from hypothesis import given
from tokenizers import Tokenizer

from common.errors import StageInterrupted, UserError
from models.tokenizer import Roles
from tasks.vocabulary.config import SentencePiece
from tasks.vocabulary.sample import Sample, described
from tasks.vocabulary.sentencepiece_conversion import convert, read_model
from tasks.vocabulary.sentencepiece_training import train
from tests.tasks.vocabulary.texts import ODD, any_text, english, runs, scattered, write_documents

ROOT = Path(__file__).parents[3]
KINDS = ("sentencepiece_bpe", "sentencepiece_unigram")
SPECIAL = ("<|user|>", "ab")
TEXTS = [*english(60), *english(10, seed=3), *ODD, *scattered(20)]


class Both(NamedTuple):
    """One tokenizer in two libraries."""

    theirs: Any
    """SentencePiece's."""
    ours: Tokenizer

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of some texts, which are the same in both."""
        ours = [encoding.ids for encoding in self.ours.encode_batch(texts, add_special_tokens=False)]
        theirs = self.theirs.encode(list(texts))
        different = [text for text, one, other in zip(texts, ours, theirs, strict=True) if one != other]
        assert not different
        assert [self.ours.decode(one) for one in ours] == [self.theirs.decode(one) for one in theirs]
        return ours


def both(model: bytes) -> Both:
    backend = convert(read_model(model, "model"), "model").backend
    backend.encode_special_tokens = True
    return Both(sentencepiece.SentencePieceProcessor(model_proto=model), backend)


def config(kind: str, **keys: Any) -> SentencePiece:
    return SentencePiece.model_validate({"kind": kind, "vocab_size": 700, "special_tokens": SPECIAL, **keys})


def sample(folder: Path, texts: Sequence[str] = TEXTS) -> Sample:
    return Sample([described("texts", write_documents(folder, [texts]))], 1 << 30)


@pytest.fixture(scope="module", params=[(kind, digits) for kind in KINDS for digits in ("split", "keep")])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    kind, digits = request.param
    model, _ = train(config(kind, digits=digits), sample(tmp_path_factory.mktemp("d") / "d"))
    return both(model)


def test_both_libraries_give_the_same_ids(trained: Both) -> None:
    trained.ids([*english(40, seed=7), *runs(4000), *ODD, *scattered(500, seed=5)])
    # Long enough that sums of scores that are no round numbers would differ.
    trained.ids(["".join(english(700, seed=8)), "".join(runs(5000, seed=9))])


@given(text=any_text())
def test_any_text_comes_back_but_for_its_name_of_a_space(trained: Both, text: str) -> None:
    (ids,) = trained.ids([text])
    assert trained.ours.decode(ids) == text.replace("▁", " ")
    assert min(ids, default=6) >= 6


def test_the_special_tokens_come_first(trained: Both) -> None:
    expected = ["<pad>", "<bos>", "<eos>", "<unk>", *SPECIAL, "<0x00>"]
    assert [trained.ours.id_to_token(index) for index in range(7)] == expected
    assert trained.ours.get_vocab_size() == trained.theirs.get_piece_size() == 700
    assert trained.ours.decode([1, *trained.ids(["ab"])[0], 4, 2]) == "ab"


@pytest.mark.parametrize("kind", KINDS)
def test_what_sentencepiece_leaves_out_of_a_text_leaves_nothing_else_out(tmp_path: Path, kind: str) -> None:
    texts = [f"{text} ▅ {text}" for text in english(20)] + [f"nul\0nul {text}" for text in english(20, seed=1)]
    model, _ = train(config(kind, vocab_size=500), sample(tmp_path / "d", texts))
    words = both(model)
    ids = words.ids(english(20))
    assert sum(map(len, ids)) < 0.5 * sum(map(len, english(20)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc_cf", "identity"])
@pytest.mark.parametrize("spaces", [True, False])
def test_normalizers_are_converted(kind: str, rule: str, spaces: bool) -> None:
    model = foreign(kind, normalization_rule_name=rule, remove_extra_whitespaces=spaces)
    words = both(model)
    words.ids(english(20, seed=7))
    words.ids(
        ["", " ", "  a  b  ", "Ｆｕｌｌ　ｗｉｄｔｈ", "ﬁ ½ ²", "Straße ẞ", "É e\u0301", "a\tb\nc", "x\u200by", "字 ｶ"]
    )
    notes = convert(read_model(model, "m"), "m").notes
    assert [note.partition(";")[0] for note in notes] == (
        [] if rule == "identity" else ["the normalizer of this SentencePiece model rewrites characters, such as ½"]
    )
    # Once `tokenizers` keeps the accent, the note is no longer true.
    accented = words.ours.decode(words.ours.encode("₀\u0347", add_special_tokens=False).ids)
    assert accented == ("₀\u0347" if rule == "identity" else "0")


def test_what_a_model_has_not_is_unknown() -> None:
    model = foreign("sentencepiece_bpe", byte_fallback=False, unk_id=0, bos_id=-1, eos_id=1, pad_id=-1)
    backend, roles, _ = convert(read_model(model, "m"), "m")
    assert roles == Roles("</s>", "</s>", "</s>")
    ids = both(model).theirs.encode("a☃☃b")
    assert backend.encode("a☃☃b", add_special_tokens=False).ids == ids
    assert ids.count(0) == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "char", "byte_fallback": False}, "is a SentencePiece model of words or characters"),
        ({"user_defined_symbols": ["<x>"]}, "has user-defined or unused pieces such as '<x>'"),
        ({"treat_whitespace_as_suffix": True}, "puts spaces behind words"),
        ({"eos_id": -1}, "has no token that closes a text"),
    ],
)
def test_what_cannot_be_converted_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^m {message}"):
        convert(read_model(foreign("sentencepiece_bpe", **keys), "m"), "m")


@pytest.mark.parametrize("content", [b"", b"no model", b"\x0a\x00\xff"])
def test_what_is_no_model_is_refused(content: bytes) -> None:
    with pytest.raises(UserError, match=r"^m is no SentencePiece model"):
        read_model(content, "m")


def test_stopping_a_training(tmp_path: Path) -> None:
    stopped = Sample([described("texts", write_documents(tmp_path / "d", [TEXTS]))], 1 << 30, lambda: True)
    with pytest.raises(StageInterrupted):
        train(config("sentencepiece_bpe"), stopped)


def foreign(kind: str, **keys: Any) -> bytes:
    """A model that others might have made."""
    written = io.BytesIO()
    settings = {"model_type": kind.removeprefix("sentencepiece_"), "vocab_size": 600, "byte_fallback": True, **keys}
    if not settings["byte_fallback"]:
        settings["vocab_size"] = 60
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(english(80)), model_writer=written, minloglevel=2, hard_vocab_limit=False, **settings
    )
    return written.getvalue()


_CHILD = """
import hashlib, sys
from pathlib import Path
from tasks.vocabulary.config import SentencePiece
from tasks.vocabulary.sample import Sample, described
from tasks.vocabulary.sentencepiece_training import train
sample = Sample([described("texts", Path(sys.argv[1]))], 1 << 30)
for kind in ("sentencepiece_bpe", "sentencepiece_unigram"):
    model, converted = train(SentencePiece(kind=kind, vocab_size=700), sample)
    print(hashlib.sha256(model + converted.backend.to_str().encode()).hexdigest())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system gives a process all cores")
def test_any_number_of_cores_gives_the_same(tmp_path: Path) -> None:
    folder = write_documents(tmp_path / "d", [TEXTS])
    outputs = set()
    for cores in (sorted(os.sched_getaffinity(0))[:1], sorted(os.sched_getaffinity(0))):
        ran = subprocess.run(
            [sys.executable, "-c", _CHILD, str(folder)],
            env={"PYTHONPATH": str(ROOT)},
            preexec_fn=lambda cores=cores: os.sched_setaffinity(0, cores),  # type: ignore[misc]
            capture_output=True,
            text=True,
            check=True,
        )
        assert len(ran.stdout.split()) == 2
        outputs.add(ran.stdout)
    assert len(outputs) == 1
