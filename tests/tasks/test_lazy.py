"""Shards are verified one by one, when training asks for them: those of a folder, and those of an S3 server."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from artifacts.record import InputReference, Record
from artifacts.store import DamagedObject, Store
from tasks.produce import produce
from tasks.registry import stage_named
from tasks.work import Work
from tests.artifacts.conftest import s3_address, s3_url
from tests.tasks.training_stages import TOKENIZER, pretraining

__all__ = ["s3_address", "s3_url"]


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3_url"))


def make(store: Store, stage: str, config: Mapping[str, Any], **inputs: Record) -> Record:
    whole = stage_named(stage).config.model_validate(config).model_dump(mode="json")
    references = {name: InputReference(digest=one.output, key=one.key) for name, one in inputs.items()}
    work = Work(name=stage, stage=stage, config=whole, inputs=references, store=store.url)
    return produce(store, work, lambda event: None).record


def make_tokens(store: Store) -> Record:
    source = {"kind": "arithmetic", "maximum": 99, "train": 700, "validation": 9, "test": 9}
    documents = make(store, "documents", {"source": source})
    tokenizer = make(store, "tokenizer", TOKENIZER)
    return make(store, "tokens", {"shard_tokens": 400}, documents=documents, tokenizer=tokenizer)


def train(store: Store, tokens: Record, seed: int = 0, steps: int = 4) -> Record:
    return make(store, "pretrain", pretraining(steps=steps, seed=seed), tokens=tokens)


def shards(tokens: Record) -> set[str]:
    return {name for name in tokens.files if name.startswith("train-")}


def verified(store: Store, tokens: Record) -> set[str]:
    """The files of an artifact that this machine has found whole, and in its cache where the store is elsewhere."""
    cache = Path(os.environ["CAIRN_CACHE"])
    if "://" in store.url:
        folder = cache / "objects" / tokens.output
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    indices = [json.loads(path.read_bytes()) for path in (cache / "verified").iterdir()]
    (own,) = (index for index in indices if "tokens.json" in index)
    return set(own)


def damage(store: Store, tokens: Record, name: str) -> None:
    path = f"{store.root}/objects/{tokens.output}/{name}"
    content = bytearray(store.filesystem.cat_file(path))
    content[-1] ^= 1
    if "://" not in store.url:
        Path(path).chmod(0o644)
    store.filesystem.pipe_file(path, bytes(content))


def test_only_the_shards_that_are_read_are_verified(store: Store) -> None:
    tokens = make_tokens(store)
    assert len(shards(tokens)) > 10
    train(store, tokens)
    used = verified(store, tokens)
    # Sixteen rows of about two hundred in a group of eight shards; the next group is not near.
    assert 0 < len(used & shards(tokens)) <= 8
    # Everything but shards is small and comes first; nothing is validated on.
    assert used - shards(tokens) == {name for name in tokens.files if not name.endswith(".safetensors")}
    train(store, tokens, steps=40)
    more = verified(store, tokens)
    assert len(more & shards(tokens)) > 8
    assert more > used


def test_a_shard_that_is_read_and_damaged_is_made_again(store: Store) -> None:
    tokens = make_tokens(store)
    expected = train(store, tokens, seed=1)
    # The same seed and another config read the same rows.
    touched = sorted(verified(store, tokens) & shards(tokens))[0]
    damage(store, tokens, touched)
    if "://" in store.url:
        path = Path(os.environ["CAIRN_CACHE"], "objects", tokens.output, touched)
        path.unlink()
    with pytest.raises(DamagedObject, match=rf"{touched} is .*damaged: run the recipe again"):
        train(store, tokens, seed=1, steps=5)
    assert store.find(tokens.key) is None
    assert make_tokens(store).output == tokens.output
    assert train(store, tokens, seed=1, steps=5).output != expected.output


def test_a_damaged_shard_that_is_not_read_is_found_by_verify_alone(store: Store) -> None:
    tokens = make_tokens(store)
    train(store, tokens, seed=1)
    untouched = sorted(shards(tokens) - verified(store, tokens))[0]
    damage(store, tokens, untouched)
    assert train(store, tokens, seed=1, steps=5).metrics["steps"] == 5
    (found,) = store.verify(tokens).damages
    assert found.path == f"objects/{tokens.output}/{untouched}"
