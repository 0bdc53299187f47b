"""Every kind of tokenizer on 10,000 pieces of real documents and on odd texts, in every library that reads it."""

from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from models.tokenizer import SENTENCEPIECE_FILE, Tokenizer
from tests.tasks.conftest import RunStage
from tests.tasks.vocabulary.texts import ODD, needs_hub, real, runs, scattered, write_documents

pytestmark = [needs_hub, pytest.mark.slow]

VOCABULARIES: dict[str, dict[str, Any]] = {
    "bytes": {"kind": "bytes"},
    "byte_bpe": {"kind": "byte_bpe", "vocab_size": 2000, "digits": "split"},
    "byte_bpe-digits": {"kind": "byte_bpe", "vocab_size": 2000, "digits": "keep", "special_tokens": ["<|user|>"]},
    "bpe": {"kind": "bpe", "vocab_size": 2000, "special_tokens": ["<|user|>"]},
    "sentencepiece_bpe": {"kind": "sentencepiece_bpe", "vocab_size": 2000},
    "sentencepiece_unigram": {"kind": "sentencepiece_unigram", "vocab_size": 2000, "special_tokens": ["<|user|>"]},
    "gpt2": {"kind": "hub", "id": "openai-community/gpt2"},
    "smollm2": {"kind": "hub", "id": "HuggingFaceTB/SmolLM2-135M"},
    "smollm2-instruct": {"kind": "hub", "id": "HuggingFaceTB/SmolLM2-135M-Instruct"},
    "mistral": {"kind": "hub", "id": "mistralai/Mistral-7B-v0.1"},
}
BY_BYTES = ("bytes", "byte_bpe", "byte_bpe-digits", "gpt2", "smollm2", "smollm2-instruct")
LACKING = {name: bytes.fromhex("04 06 13 14 16 1d f1 f2") for name in ("smollm2", "smollm2-instruct")}
"""Bytes of UTF-8 that a vocabulary of the hub has no tokens for: some control characters, and the first byte of code
points from U+40000 to U+BFFFF, of which none is assigned."""


def coming_back(name: str, text: str) -> str:
    """What becomes of a text that is taken apart and put together."""
    if name not in BY_BYTES:
        return text.replace("▁", " ")
    return text.encode().translate(None, LACKING.get(name, b"")).decode(errors="replace")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [*real(10_000, longest=200), *ODD, *runs(600), *scattered(300)]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("real") / "documents", [real(300, seed=1, longest=4000)])


@pytest.mark.parametrize("name", VOCABULARIES)
def test_all_libraries_agree(
    run_stage: RunStage, texts: list[str], documents: Path, name: str, request: pytest.FixtureRequest
) -> None:
    vocabulary = VOCABULARIES[name]
    if vocabulary["kind"] != "hub":
        # Comparing with the tokenizers of the hub is the report's matter, and takes its time.
        request.getfixturevalue("empty_hub")
    inputs = {"documents": documents} if "vocab_size" in vocabulary else {}
    folder, _ = run_stage("tokenizer", {"vocabulary": vocabulary}, **inputs)
    tokenizer, transformers = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    assert transformers(texts, add_special_tokens=False, split_special_tokens=True).input_ids == ids
    special = set(transformers.all_special_ids) | {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}
    assert not special & set().union(*ids)
    decoded = [tokenizer.decode(one) for one in ids]
    assert decoded == [coming_back(name, text) for text in texts]
    assert transformers.batch_decode(ids[:200]) == decoded[:200]
    model = folder / SENTENCEPIECE_FILE
    assert model.is_file() == (name.startswith("sentencepiece") or name == "mistral")
    if model.is_file():
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        assert processor.encode(texts) == ids
        assert processor.decode(ids) == decoded
