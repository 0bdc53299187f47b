import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from common.errors import UserError
from models.tokenizer import Tokenizer
from tasks.registry import stage_named
from tasks.vocabulary.config import Bytes, Hub
from tasks.vocabulary.hub import files_of, resolved, write_hub_tokenizer
from tasks.vocabulary.written import bytes_tokenizer
from tests.tasks.conftest import RunStage
from tests.tasks.corpus.fake_hub import COMMITS, FakeHub
from tests.tasks.vocabulary.test_sentencepiece import foreign
from tests.tasks.vocabulary.texts import needs_hub

ROOT = Path(__file__).parents[3]
SIZES = {
    "openai-community/gpt2": 50_257,
    "HuggingFaceTB/SmolLM2-135M": 49_152,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 49_152,
    "mistralai/Mistral-7B-v0.1": 32_000,
}
ROLES = {
    "openai-community/gpt2": ("<|endoftext|>",) * 3,
    "HuggingFaceTB/SmolLM2-135M": ("<|endoftext|>",) * 3,
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("<|im_start|>", "<|im_end|>", "<|im_end|>"),
    "mistralai/Mistral-7B-v0.1": ("<s>", "</s>", "</s>"),
}


def hub(**keys: Any) -> Hub:
    return Hub.model_validate({"kind": "hub", **keys})


@pytest.fixture
def place(empty_hub: Path) -> Path:
    """A tokenizer below CAIRN_HUB, with settings as a hub has them; the network is off."""
    folder = empty_hub / "models" / "some" / "bytes"
    folder.mkdir(parents=True)
    backend = bytes_tokenizer(Bytes(kind="bytes"))
    backend.add_tokens([AddedToken("<end>", special=False)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<end>"}')
    return folder


@needs_hub
@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_roles_are_those_of_the_hub(run_stage: RunStage, name: str) -> None:
    stage = stage_named("tokenizer")
    config = stage.config.model_validate({"vocabulary": {"kind": "hub", "id": name}})
    assert stage.resolved is not None
    found = stage.resolved(config).model_dump(mode="json")
    assert len(found["vocabulary"]["digest"]) == 64
    folder, metrics = run_stage("tokenizer", found)
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert metrics["vocab_size"] == len(ours) == len(theirs) == SIZES[name]
    roles = ROLES[name]
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == roles
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == tuple(map(ours.backend.token_to_id, roles))
    # Nothing stands before or after a text by itself.
    assert theirs("A text.").input_ids == ours.encode("A text.")
    assert (folder / "tokenizer.model").is_file() == name.startswith("mistralai")
    lacking = "the vocabulary has no tokens for the bytes 04 06 13 14 16 1D F1 F2, which are left out of texts"
    assert metrics["notes"] == ([lacking] if name.startswith("HuggingFaceTB") else [])


@needs_hub
def test_a_chat_template_is_kept_or_replaced(run_stage: RunStage) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    vocabulary = {"kind": "hub", "id": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    folder, _ = run_stage("tokenizer", {"vocabulary": vocabulary})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert tokenizer(text).input_ids[0] == tokenizer.bos_token_id
    folder, _ = run_stage("tokenizer", {"vocabulary": vocabulary, "chat_template": "{{ messages[1]['content'] }}"})
    assert AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, tokenize=False) == "Hi"


def test_settings_may_lie_in_other_files(place: Path, tmp_path: Path) -> None:
    (place / "tokenizer_config.json").unlink()
    (place / "special_tokens_map.json").write_text('{"eos_token": {"content": "<eos>"}, "bos_token": "<end>"}')
    (place / "chat_template.jinja").write_text("{{ messages[0] }}")
    (tmp_path / "out").mkdir()
    assert write_hub_tokenizer(place, tmp_path / "out", "some/bytes") == []
    tokenizer = Tokenizer(tmp_path / "out")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, len(tokenizer)) == (259, 2, 2, 260)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_bytes())
    assert settings["chat_template"] == "{{ messages[0] }}"
    # What closes a text is not in it, though the hub has it as an ordinary token.
    assert tokenizer.decode([259, 3 + 97, 2]) == "a"


def test_the_digest_is_that_of_what_is_read(place: Path) -> None:
    digest = resolved(hub(id="some/bytes")).digest
    assert digest is not None
    assert resolved(hub(id="some/bytes", digest=digest)).digest == digest
    (place / "model.safetensors").write_bytes(b"weights")
    assert resolved(hub(id="some/bytes")).digest == digest
    (place / "chat_template.jinja").write_text("{{ messages }}")
    assert resolved(hub(id="some/bytes")).digest not in (None, digest)
    with pytest.raises(
        UserError, match=r"vocabulary\.digest: tokenizer 'some/bytes' in .* is not what its digest says"
    ):
        resolved(hub(id="some/bytes", digest=digest))
    with pytest.raises(UserError, match=r"is not what its digest says .* it has changed; run again"):
        files_of(hub(id="some/bytes", digest=digest))


def test_a_folder_stands_for_the_tokenizer_in_it(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = resolved(hub(id="some/bytes")).digest
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place, tmp_path / "published" / "bytes")
    for text in ("published/bytes", "./published/bytes", str(tmp_path / "published" / "bytes")):
        found = resolved(hub(id=text))
        assert found.digest == digest
        assert files_of(found).samefile(tmp_path / "published" / "bytes")
    with pytest.raises(UserError, match=r"tokenizer '\./missing' has none of tokenizer\.json, "):
        resolved(hub(id="./missing"))


def test_what_is_nowhere_is_refused_at_once(place: Path) -> None:
    with pytest.raises(
        UserError, match=r"tokenizer 'some/other' was not found: not below CAIRN_HUB=.*/hub, and the Hug"
    ):
        resolved(hub(id="some/other"))
    with pytest.raises(
        UserError, match=r"was not found: .* it was not asked, for the recipe has the digest of a local"
    ):
        resolved(hub(id="some/other", digest="0" * 64))
    with pytest.raises(UserError, match=r"'some/\.\./bytes' is no id"):
        resolved(hub(id="some/../bytes"))
    shutil.rmtree(place)
    place.mkdir()
    with pytest.raises(UserError, match=r"tokenizer 'some/bytes' has none of tokenizer\.json, "):
        resolved(hub(id="some/bytes"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "{}"}, "is no readable tokenizer"),
        ({"tokenizer.json": None}, r"'some/bytes' has neither tokenizer\.json nor tokenizer\.model in"),
        ({"tokenizer.json": None, "tokenizer.model": "no model"}, "is no SentencePiece model"),
        ({"tokenizer_config.json": "{"}, r"tokenizer_config\.json cannot be read"),
        ({"tokenizer_config.json": "[1]"}, r"tokenizer_config\.json cannot be read: it is no JSON object"),
        ({"tokenizer_config.json": None}, "'some/bytes' names no eos_token"),
        ({"tokenizer_config.json": '{"eos_token": "<none>"}'}, "has no token '<none>'"),
        ({"chat_template.jinja": "\udcff"}, r"chat_template\.jinja cannot be read"),
    ],
)
def test_unreadable_tokenizers_are_refused(
    run_stage: RunStage, place: Path, files: dict[str, str | None], message: str
) -> None:
    for name, content in files.items():
        (place / name).unlink(missing_ok=True)
        if content is not None:
            (place / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message):
        run_stage("tokenizer", {"vocabulary": {"kind": "hub", "id": "some/bytes"}})


CLIENT = """
import json, sys
from pathlib import Path
from tasks.vocabulary.config import Hub
from tasks.vocabulary.hub import files_of, resolved
from common.errors import UserError
try:
    config = Hub.model_validate(json.loads(sys.argv[1]))
    config = resolved(config) if sys.argv[2] == "load" else config
    files = sorted(path.name for path in files_of(config).iterdir())
    print(json.dumps({"config": config.model_dump(), "files": files}))
except UserError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.fixture
def network(tmp_path: Path, place: Path) -> Iterator[FakeHub]:
    for commit in COMMITS:
        folder = tmp_path / "network" / commit / "far" / "bytes"
        shutil.copytree(place, folder)
        (folder / "chat_template.jinja").write_text(commit)
        (folder / "model.safetensors").write_bytes(b"weights")
    with FakeHub(tmp_path / "network").served() as served:
        yield served


def ask(network: FakeHub, home: Path, keys: dict[str, Any], when: str = "load", **environment: str) -> dict[str, Any]:
    """Resolves a tokenizer, where a recipe is loaded, and fetches it, in a process of its own: the library looks for
    the hub's address once."""
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps({"kind": "hub", **keys}), when],
        cwd=ROOT,
        env={**os.environ, "HF_ENDPOINT": network.url, "HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_what_is_on_the_network_is_fetched_at_a_commit_and_without_weights(network: FakeHub, tmp_path: Path) -> None:
    newest = ask(network, tmp_path / "home", {"id": "far/bytes"})
    assert newest["config"]["revision"] == COMMITS[-1]
    assert newest["config"]["digest"] is None
    assert newest["files"] == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert not any("model.safetensors" in asked for asked in network.asked)
    older = ask(network, tmp_path / "home", {"id": "far/bytes", "revision": COMMITS[0]})
    assert older["config"]["revision"] == COMMITS[0]
    missing = ask(network, tmp_path / "home", {"id": "far/other"})
    assert missing["error"].startswith(
        f"tokenizer 'far/other' was not found: not below CAIRN_HUB={tmp_path / 'hub'}, and"
    )


def test_what_was_fetched_before_needs_no_network(network: FakeHub, tmp_path: Path) -> None:
    newest = ask(network, tmp_path / "home", {"id": "far/bytes"})
    assert ask(network, tmp_path / "home", {"id": "far/bytes"}, HF_HUB_OFFLINE="1") == newest
    assert ask(network, tmp_path / "home", newest["config"], when="run", HF_HUB_OFFLINE="1") == newest
    missing = ask(network, tmp_path / "empty", {"id": "far/bytes"}, HF_HUB_OFFLINE="1")
    assert missing["error"].startswith("tokenizer 'far/bytes' was not found")


def test_a_commit_is_fetched_whatever_lies_below_a_workers_folder(
    network: FakeHub, tmp_path: Path, place: Path
) -> None:
    commit = ask(network, tmp_path / "home", {"id": "far/bytes"})["config"]
    shutil.copytree(place, tmp_path / "hub" / "models" / "far" / "bytes")
    assert "chat_template.jinja" in ask(network, tmp_path / "home", commit, when="run")["files"]


def test_a_sentencepiece_model_alone_is_converted_with_its_notes(run_stage: RunStage, place: Path) -> None:
    (place / "tokenizer.json").unlink()
    (place / "tokenizer_config.json").unlink()
    (place / "tokenizer.model").write_bytes(foreign("sentencepiece_unigram"))
    folder, metrics = run_stage("tokenizer", {"vocabulary": {"kind": "hub", "id": "some/bytes"}})
    assert (folder / "tokenizer.model").read_bytes() == (place / "tokenizer.model").read_bytes()
    assert "rewrites characters" in metrics["notes"][0]
    assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"
