import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE, WordLevel

from common.errors import UserError
from models.tokenizer import (
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    Roles,
    Tokenizer,
    begin_with_eos,
    read_roles,
    tokenizer_files,
    write_tokenizer,
)

ROLES = Roles(bos="<s>", eos="</s>", pad="<pad>")


def digits() -> Backend:
    """A tokenizer of three special tokens and a few characters, as a hub has it: with all that Cairn does without."""
    tokens = ["<pad>", "<s>", "</s>", "1", "2", "=", "<", ">", "s"]
    backend = Backend(WordLevel({token: index for index, token in enumerate(tokens)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True) for token in tokens[:3]])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    backend.enable_padding(pad_id=0, pad_token="<pad>", length=9)
    backend.enable_truncation(2)
    return backend


def sentencepiece_like() -> Backend:
    """Characters with ▁ for spaces and before the text."""
    tokens = ["<s>", "</s>", *"▁abc=", "▁a", "a=", "=b"]
    merges = [("▁", "a"), ("a", "="), ("=", "b")]
    backend = Backend(BPE({token: index for index, token in enumerate(tokens)}, merges))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path, digits(), ROLES)
    return tmp_path


def test_the_text_alone_becomes_tokens(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode("1212") == [3, 4, 3, 4]
    assert [encoding.ids for encoding in tokenizer.encode_batch(["1", "", "2=1"])] == [[3], [], [4, 5, 3]]
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, len(tokenizer)) == (0, 1, 2, 9)


def test_special_tokens_in_a_text_are_ordinary_text(folder: Path) -> None:
    assert Tokenizer(folder).encode("1<s>2") == [3, 6, 8, 7, 4]
    with pytest.raises(UserError, match=r"does not know the character '/' in '1</s>'; it has: 12<=>s$"):
        Tokenizer(folder).encode("1</s>")


def test_decoding_leaves_special_tokens_out(folder: Path) -> None:
    assert Tokenizer(folder).decode([1, 3, 2, 0, 4]) == "12"


def test_a_role_makes_a_token_special_and_adds_none(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, digits(), Roles(bos="1", eos="2", pad="2"))
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, len(tokenizer)) == (3, 4, 4, 9)
    assert tokenizer.decode([3, 5, 4]) == "="
    with pytest.raises(UserError, match=r"has no token '<end>', which its settings name as its eos token"):
        write_tokenizer(tmp_path, digits(), ROLES._replace(eos="<end>"))


@pytest.mark.parametrize(
    ("settings", "roles"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}, ROLES),
        ({"eos_token": {"content": "</s>", "lstrip": False}}, Roles("</s>", "</s>", "</s>")),
        ({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}, Roles("<s>", "</s>", "</s>")),
        ({"bos_token": "<s>", "pad_token": "<pad>"}, None),
        ({"eos_token": 3}, None),
    ],
)
def test_eos_takes_the_roles_that_no_token_has(settings: dict[str, Any], roles: Roles | None) -> None:
    assert read_roles(settings) == roles


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "is no readable tokenizer"),
        ("[]", "is no readable tokenizer"),
        (None, "is no readable tokenizer"),
        ('{"bos_token": "<s>"}', "names no eos_token"),
        ('{"eos_token": "<end>"}', "names '<end>', which the tokenizer has not"),
    ],
)
def test_unreadable_settings_are_refused(folder: Path, settings: str | None, message: str) -> None:
    (folder / TOKENIZER_CONFIG).unlink()
    if settings is not None:
        (folder / TOKENIZER_CONFIG).write_text(settings)
    with pytest.raises(UserError, match=message):
        Tokenizer(folder)


def test_eos_may_begin_a_text(folder: Path) -> None:
    (folder / TOKENIZER_CONFIG).write_text('{"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ 1 }}"}')
    begin_with_eos(folder)
    tokenizer = Tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, len(tokenizer)) == (2, 2, 2, 9)
    assert json.loads((folder / TOKENIZER_CONFIG).read_bytes())["chat_template"] == "{{ 1 }}"
    assert tokenizer.decode([1, 3]) == "1"


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no readable tokenizer"):
        Tokenizer(tmp_path)
    (tmp_path / TOKENIZER_FILE).write_text("{}")
    with pytest.raises(UserError, match="no readable tokenizer"):
        Tokenizer(tmp_path)


def test_half_of_a_surrogate_pair_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"is no Unicode: '\\ud83d' is half of a surrogate pair"):
        Tokenizer(folder).encode("1\ud83d2")


def test_the_length_is_what_a_model_needs_rows_for(tmp_path: Path) -> None:
    backend = Backend(WordLevel({"</s>": 0, "one": 7}))
    write_tokenizer(tmp_path, backend, Roles("</s>", "</s>", "</s>"))
    assert len(Tokenizer(tmp_path)) == 8


def test_the_files_of_a_tokenizer(folder: Path) -> None:
    assert [path.name for path in tokenizer_files(folder)] == [TOKENIZER_FILE, TOKENIZER_CONFIG]
    (folder / "tokenizer.model").touch()
    assert [path.name for path in tokenizer_files(folder)] == [TOKENIZER_FILE, TOKENIZER_CONFIG, "tokenizer.model"]
    assert json.loads((folder / TOKENIZER_CONFIG).read_bytes())["eos_token"] == "</s>"


class TestParts:
    @pytest.fixture
    def tokenizer(self, tmp_path: Path) -> Tokenizer:
        write_tokenizer(tmp_path, sentencepiece_like(), Roles("<s>", "</s>", "</s>"))
        return Tokenizer(tmp_path)

    def test_are_those_of_the_whole_text(self, tokenizer: Tokenizer) -> None:
        prompts, targets = ["b a", "c=", "", "ab"], [" b", "cc", "ab", ""]
        parts = tokenizer.encode_parts(prompts, targets)
        assert [before + after for before, after in parts] == [
            encoding.ids for encoding in tokenizer.encode_batch([p + t for p, t in zip(prompts, targets, strict=True)])
        ]
        assert [tokenizer.decode(before) for before, _ in parts] == prompts
        # Alone, a text begins with ▁; behind another, as it is in the whole, it does not.
        assert [tokenizer.backend.id_to_token(token) for token in parts[1][1]] == ["c", "c"]
        assert [tokenizer.decode_after(*part) for part in parts] == targets

    def test_a_token_of_both_is_refused(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(UserError, match="in 'ca=c' no token begins with the target, behind 'ca'"):
            tokenizer.encode_parts(["b", "ca"], ["b", "=c"])

    def test_what_opens_with_a_space_keeps_it_behind_another(self, tokenizer: Tokenizer) -> None:
        whole = tokenizer.encode("c ab")
        assert tokenizer.decode(whole[2:]) == "ab"
        assert tokenizer.decode_after(whole[:2], whole[2:]) == " ab"
        assert tokenizer.decode_after([], whole[2:]) == "ab"
        assert tokenizer.decode_after([tokenizer.bos_id], [*whole, tokenizer.eos_id]) == "c ab"
