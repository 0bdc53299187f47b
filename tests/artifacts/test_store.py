"""What a store promises, on each kind of store."""

import logging
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts.record import Record
from artifacts.store import DamagedObject, Store
from common.errors import UserError

KEY = "a" * 64


def test_what_was_committed_is_found_and_fetched(store: Store, make: Any) -> None:
    documents = make("documents", {"a.txt": b"one", "deep/er/b.txt": b"", "é ü.txt": b"three"})
    tokens = make("tokens", documents=documents)
    assert store.find(documents.key) == documents
    assert Store.open(store.url).find(tokens.key) == tokens
    folder = store.fetch(documents)
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {"a.txt": b"one", "deep/er/b.txt": b"", "é ü.txt": b"three"}
    assert store.fetch(tokens.output) == store.fetch(tokens)
    assert [record.key for record in store.records()] == sorted([documents.key, tokens.key])


def test_an_absent_key_is_none(store: Store) -> None:
    assert store.find(KEY) is None
    assert list(store.records()) == []
    assert store.names() == {}
    assert store.attachments(KEY) == {}
    assert store.verify().damages == ()


def test_one_file_of_many_can_be_fetched(store: Store, make: Any) -> None:
    record = make("tokens", {"shard-0": b"0", "shard-1": b"1"})
    assert (store.fetch(record, only=["shard-1"]) / "shard-1").read_bytes() == b"1"
    with pytest.raises(UserError, match="has no file 'shard-2'; did you mean 'shard-"):
        store.fetch(record, only=["shard-2"])


def test_the_first_complete_record_wins(store: Store, make: Any) -> None:
    first = make("documents", {"a": b"first"})
    assert make("documents", {"a": b"second"}) == first
    assert (store.fetch(first) / "a").read_bytes() == b"first"


def test_a_rival_that_finishes_during_the_upload_wins(store: Store, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend: Any = store.backend
    upload = backend.put_folder
    rivals: list[Record] = []

    def slow_upload(*arguments: Any) -> None:
        upload(*arguments)
        monkeypatch.setattr(backend, "put_folder", upload)
        rivals.append(make("documents", {"a": b"rival"}))

    monkeypatch.setattr(backend, "put_folder", slow_upload)
    assert make("documents", {"a": b"mine"}) == rivals[0]
    assert store.find(rivals[0].key) == rivals[0]
    assert store.verify().damages == ()


def test_the_same_content_is_stored_once(store: Store, make: Any) -> None:
    one, other = make("one", {"a": b"x"}), make("other", {"a": b"x"})
    assert one.key != other.key
    assert one.output == other.output
    assert store.backend.children("objects") == [one.output]


def test_a_folder_from_elsewhere_is_copied_and_kept(store: Store, make: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "a").write_bytes(b"a")
    record = store.commit(folder, **make.fields("documents"))
    assert (folder / "a").read_bytes() == b"a"
    (folder / "a").write_bytes(b"changed later")
    assert (store.fetch(record) / "a").read_bytes() == b"a"


def test_a_folder_with_a_link_or_without_files_is_refused(store: Store, make: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    with pytest.raises(UserError, match="no files"):
        store.commit(folder, **make.fields("documents"))
    (folder / "a").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="link"):
        store.commit(folder, **make.fields("documents"))
    assert list(store.records()) == []


def test_fields_that_no_record_has_cost_no_output(store: Store, make: Any) -> None:
    fields = {**make.fields("documents"), "metrics": {"loss": object()}}
    with store.workspace(KEY) as folder:
        (folder / "a").write_bytes(b"hours of work")
        with pytest.raises(ValueError, match="metrics"):
            store.commit(folder, **fields)
        assert (folder / "a").read_bytes() == b"hours of work"


def test_a_workspace_is_gone_after_failure(store: Store) -> None:
    folders = []

    def fail() -> None:
        with store.workspace(KEY) as folder:
            (folder / "half").write_bytes(b"x")
            folders.append(folder)
            raise RuntimeError("stage failed")

    with pytest.raises(RuntimeError, match="stage failed"):
        fail()
    assert not folders[0].exists()
    assert store.backend.children("objects") == []


def test_names_point_at_records(store: Store, make: Any) -> None:
    one, other = make("one"), make("other")
    store.set_name("models/arithmetic", one.key)
    store.set_name("models/elite-112m@sft", one.key)
    store.set_name("models/arithmetic", other.key)
    assert store.names() == {"models/arithmetic": other.key, "models/elite-112m@sft": one.key}
    assert store.resolve("models/arithmetic") == other
    store.remove_name("models/arithmetic")
    assert list(store.names()) == ["models/elite-112m@sft"]
    with pytest.raises(UserError, match="no name 'models/arithmetic'"):
        store.remove_name("models/arithmetic")


def test_a_name_for_nothing_or_inside_another_is_refused(store: Store, make: Any) -> None:
    record = make("one")
    with pytest.raises(UserError, match="there is no record"):
        store.set_name("models/x", KEY)
    with pytest.raises(UserError, match="is no name"):
        store.set_name("../records/x", record.key)
    store.set_name("models/x", record.key)
    with pytest.raises(UserError, match="cannot hold the other"):
        store.set_name("models", record.key)
    with pytest.raises(UserError, match="cannot hold the other"):
        store.set_name("models/x/y", record.key)


def test_what_is_asked_for_may_be_shortened(store: Store, make: Any) -> None:
    record = make("one", {"a": b"1"})
    assert store.resolve(record.key[:6]) == record
    assert store.resolve(record.output[:10]) == record
    assert store.resolve(record.key) == record
    store.set_name("models/arithmetic", record.key)
    with pytest.raises(UserError, match="did you mean 'models/arithmetic'"):
        store.resolve("models/aritmetic")
    for unknown in (record.key[:5], "0" * 64, "../x", ""):
        with pytest.raises(UserError, match="nothing in"):
            store.resolve(unknown)


def test_a_short_form_of_several_is_ambiguous(store: Store, make: Any) -> None:
    record = make("one")
    store.backend.write(f"records/{record.key[:-1]}{'0' if record.key[-1] != '0' else '1'}.json", b"")
    with pytest.raises(UserError, match="ambiguous"):
        store.resolve(record.key[:6])


def test_a_name_whose_record_is_gone_says_so(store: Store, make: Any) -> None:
    record = make("one")
    store.set_name("models/x", record.key)
    store.backend.remove(f"records/{record.key}.json")
    with pytest.raises(UserError, match="damaged or gone"):
        store.resolve("models/x")
    assert [damage.kind for damage in store.verify().damages] == ["missing"]


def test_names_from_elsewhere_are_data(store: Store, make: Any, caplog: pytest.LogCaptureFixture) -> None:
    make("one")
    store.backend.write("refs/bad", b"../../etc/passwd")
    store.backend.write("refs/b ad", b"a" * 64)
    assert store.names() == {}
    assert caplog.text.count("is ignored") == 2


def damage_record(store: Store, record: Record) -> None:
    data = store.backend.read(f"records/{record.key}.json") or b""
    store.backend.write(f"records/{record.key}.json", data.replace(b'"version": 1', b'"version": 2'))


def cut_record(store: Store, record: Record) -> None:
    data = store.backend.read(f"records/{record.key}.json") or b""
    store.backend.write(f"records/{record.key}.json", data[:-20])


def swap_record(store: Store, record: Record) -> None:
    other = record.model_copy(update={"key": "b" * 64})
    store.backend.write(f"records/{record.key}.json", other.to_json())


def drop_file(store: Store, record: Record) -> None:
    store.backend.remove(f"objects/{record.output}/a.bin")


def cut_file(store: Store, record: Record) -> None:
    store.backend.write(f"objects/{record.output}/a.bin", b"")


def drop_all(store: Store, record: Record) -> None:
    store.backend.remove(f"objects/{record.output}")


@pytest.mark.parametrize("damage", [damage_record, cut_record, swap_record, drop_file, cut_file, drop_all])
def test_what_is_damaged_counts_as_absent_and_is_made_anew(
    store: Store, make: Any, caplog: pytest.LogCaptureFixture, damage: Callable[[Store, Record], None]
) -> None:
    record = make("one")
    damage(store, record)
    with caplog.at_level(logging.WARNING, "cairn.artifacts"):
        assert store.find(record.key) is None
    assert "counts as absent" in caplog.text
    assert store.verify().damages
    again = make("one")
    assert again.output == record.output
    assert store.find(record.key) == again
    assert (store.fetch(again) / "a.bin").read_bytes() == b"one"
    assert store.verify().damages == ()


@pytest.mark.parametrize("seed", range(8))
def test_a_single_flipped_bit_is_found(store: Store, make: Any, seed: int) -> None:
    record = make("one", {"a.bin": bytes(range(256)), "b.bin": b"?"})
    name = random.Random(seed).choice(sorted(record.files))
    path = f"objects/{record.output}/{name}"
    data = bytearray(store.backend.read(path) or b"")
    bit = random.Random(seed).randrange(len(data) * 8)
    data[bit // 8] ^= 1 << bit % 8
    store.backend.write(path, bytes(data))
    # The size is right, so only hashing can tell.
    assert store.find(record.key) == record
    (damage,) = store.verify().damages
    assert (damage.kind, damage.path) == ("damaged", path)
    # From here on the next run makes it anew, and what was damaged can still be looked at.
    assert store.find(record.key) is None
    assert store.backend.read(f"damaged/{record.output}/{name}") == bytes(data)
    make("one", {"a.bin": bytes(range(256)), "b.bin": b"?"})
    assert store.verify(record).damages == ()


def test_a_damaged_file_is_found_at_its_first_use(store: Store, make: Any) -> None:
    record = make("one")
    store.backend.write(f"objects/{record.output}/a.bin", b"onf")
    with pytest.raises(DamagedObject, match=r"a\.bin.*run the recipe again"):
        store.fetch(record)
    assert store.find(record.key) is None


def test_verify_tells_of_files_that_do_not_belong(store: Store, make: Any) -> None:
    record = make("one")
    store.backend.write(f"objects/{record.output}/c.bin", b"c")
    assert [damage.kind for damage in store.verify().damages] == ["unexpected"]


def test_attachments_hang_on_a_key(store: Store, make: Any, tmp_path: Path) -> None:
    (tmp_path / "loss.png").write_bytes(b"picture")
    where = store.attach(KEY, tmp_path / "loss.png", "plots/loss.png")
    assert store.attachments(KEY) == {"plots/loss.png": where}
    assert store.backend.read(f"attachments/{KEY}/plots/loss.png") == b"picture"
    with pytest.raises(UserError, match="not allowed"):
        store.attach(KEY, tmp_path / "loss.png", "../../refs/x")


def test_scratch_is_a_place_in_the_store(store: Store) -> None:
    filesystem, folder = store.scratch(KEY)
    filesystem.pipe_file(f"{folder}/step-1/weights", b"w")
    assert store.backend.read(f"checkpoints/{KEY}/step-1/weights") == b"w"
    assert [path.rpartition("/")[2] for path in filesystem.find(folder)] == ["weights"]
    assert store.filesystem.cat_file(f"{store.root}/checkpoints/{KEY}/step-1/weights") == b"w"


@pytest.mark.parametrize("key", ["", "../x", "a" * 63, "A" * 64, "a" * 64 + "/"])
def test_keys_that_are_none_reach_no_path(store: Store, key: str, tmp_path: Path) -> None:
    for use in (store.find, store.scratch, store.attachments, store.fetch, store.read_record):
        with pytest.raises(UserError, match="no key or digest"):
            use(key)
    for block in (store.workspace, store.lease):
        with pytest.raises(UserError, match="no key or digest"), block(key):
            pass


def test_the_environment_says_where_the_store_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Store.open().url == str(tmp_path / "store")
    monkeypatch.delenv("CAIRN_STORE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store.open().url == str(tmp_path / ".cairn/store")
    assert Store.open(f"file://{tmp_path}/x").url == f"{tmp_path}/x"
    # Opening and looking make nothing.
    assert Store.open().find(KEY) is None
    assert not (tmp_path / ".cairn").exists()


def test_a_url_that_cannot_be_opened_is_explained() -> None:
    with pytest.raises(UserError, match="cannot open nonsense://x"):
        Store.open("nonsense://x")


def test_nothing_heavy_is_imported_for_a_local_store(start: Callable[..., "subprocess.Popen[str]"]) -> None:
    code = """
import sys
import artifacts.store, artifacts.lineage, artifacts.collect, artifacts.page
artifacts.store.Store.open("/nonexistent/store").find("a" * 64)
heavy = {"torch", "prefect", "pyarrow", "numpy", "s3fs", "fsspec", "botocore", "aiohttp"}
print(sorted(heavy & set(sys.modules)))
"""
    output, errors = start(code).communicate(timeout=60)
    assert (output.strip(), errors) == ("[]", "")


def test_logs_outlive_a_failure_and_are_attached_in_the_end(store: Store) -> None:
    def fail(folder: Path) -> None:
        (folder / "training.csv").write_text("1")
        raise RuntimeError

    with pytest.raises(RuntimeError), store.logs(KEY) as folder:
        fail(folder)
    with store.logs(KEY) as folder:
        assert (folder / "training.csv").read_text() == "1"
        (folder / "deeper").mkdir(exist_ok=True)
        (folder / "deeper" / "events").write_text("2")
    assert sorted(store.attachments(KEY)) == ["deeper/events", "training.csv"]


def test_attempts_are_counted_by_who_sees_them_end(store: Store) -> None:
    assert store.attempt(KEY) == 0
    store.end_attempt(KEY, 0)
    # A second one who has seen the same end says no more than the first.
    store.end_attempt(KEY, 0)
    assert store.attempt(KEY) == 1
    store.end_attempt(KEY, 1)
    assert store.attempt(KEY) == 2


def test_what_is_attached_is_read_back(store: Store, tmp_path: Path) -> None:
    (tmp_path / "loss.png").write_bytes(b"picture")
    store.attach(KEY, tmp_path / "loss.png", "plots/loss.png")
    assert store.attachment(KEY, "plots/loss.png") == b"picture"
    with pytest.raises(UserError, match="nothing is attached to"):
        store.attachment(KEY, "loss.png")
