"""What gc takes and what it leaves."""

import subprocess
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from artifacts import collect
from artifacts.store import Store

KEY = "a" * 64
NOW = timedelta(0)
DAY = 86400


def later(monkeypatch: pytest.MonkeyPatch, days: float) -> None:
    """Lets the collector see everything as older than it is: times of change cannot be set."""
    plain = time.time
    monkeypatch.setattr("artifacts.collect.time.time", lambda: plain() + days * DAY)


@pytest.fixture
def aged(monkeypatch: pytest.MonkeyPatch) -> None:
    later(monkeypatch, 0.1)


def kinds(planned: collect.CollectionPlan) -> list[str]:
    return [one.kind for one in planned.garbage]


@pytest.mark.usefixtures("aged")
def test_what_a_name_reaches_stays(store: Store, make: Any, tmp_path: Path) -> None:
    documents = make("documents")
    tokens = make("tokens", documents=documents)
    model = make("pretrain", tokens=tokens)
    stray = make("stray", documents=documents)
    (tmp_path / "x").write_bytes(b"x")
    for record in (model, stray):
        store.attach(record.key, tmp_path / "x", "x")
    store.set_name("models/x", model.key)

    planned = collect.plan(store, NOW)
    assert {one.path for one in planned.garbage} == {
        f"records/{stray.key}.json",
        f"objects/{stray.output}",
        f"attachments/{stray.key}",
    }
    assert planned.size > 0
    # A plan removes nothing.
    assert store.find(stray.key) == stray

    assert collect.remove(store, planned) == planned
    assert store.find(stray.key) is None
    assert [store.find(record.key) for record in (documents, tokens, model)] == [documents, tokens, model]
    assert store.verify().damages == ()
    assert collect.plan(store, NOW).garbage == ()


def test_what_is_young_stays_with_all_that_it_was_made_from(
    store: Store, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = make("documents")
    make("tokens", documents=documents)
    assert collect.plan(store, timedelta(days=14)).garbage == ()
    later(monkeypatch, 13.9)
    assert collect.plan(store, timedelta(days=14)).garbage == ()
    later(monkeypatch, 0.2)
    assert kinds(collect.plan(store, timedelta(days=14))) == ["record", "record", "object", "object"]


@pytest.mark.usefixtures("aged")
def test_what_a_live_lease_holds_stays(store: Store, make: Any) -> None:
    documents = make("documents")
    filesystem, folder = store.scratch(KEY)
    filesystem.pipe_file(f"{folder}/step-1/weights", b"w")
    with store.lease(KEY, inputs=[documents.key]):
        assert collect.plan(store, NOW).garbage == ()
    assert kinds(collect.plan(store, NOW)) == ["record", "object", "checkpoint", "lease"]


@pytest.mark.usefixtures("aged")
def test_checkpoints_of_finished_work_go(store: Store, make: Any) -> None:
    record = make("pretrain")
    store.set_name("models/x", record.key)
    filesystem, folder = store.scratch(record.key)
    filesystem.pipe_file(f"{folder}/step-1/weights", b"w")
    assert kinds(collect.plan(store, NOW)) == ["checkpoint"]


@pytest.mark.usefixtures("aged")
def test_damaged_records_and_what_was_set_aside_go(store: Store, make: Any) -> None:
    record = make("documents")
    store.backend.write(f"objects/{record.output}/a.bin", b"documentz")
    assert store.verify().damages
    store.backend.write(f"records/{record.key}.json", b"{")
    assert kinds(collect.plan(store, NOW)) == ["record", "object", "damaged"]
    collect.remove(store, collect.plan(store, NOW))
    assert collect.plan(store, NOW).garbage == ()


@pytest.mark.usefixtures("aged")
def test_what_came_into_use_after_the_plan_stays(store: Store, make: Any) -> None:
    same = {"a": b"same"}
    named, used, again = make("named"), make("used"), make("old", same)
    stale = collect.plan(store, NOW)
    assert len(stale.garbage) == 6
    store.set_name("models/x", named.key)
    store.backend.remove(f"records/{again.key}.json")
    new = make("new", same)
    store.set_name("models/new", new.key)
    with store.lease(KEY, inputs=[used.key]):
        assert collect.remove(store, stale).garbage == ()
    assert store.verify().damages == ()
    assert [store.find(record.key) for record in (named, used, new)] == [named, used, new]


WORK = """
import sys
from artifacts.store import Store

with Store.open(sys.argv[1]).workspace("a" * 64) as folder:
    (folder / "half").write_bytes(b"x" * 100)
    print(folder, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.usefixtures("aged")
def test_workspaces_that_a_crash_left_go(local_store: Store, start: Callable[..., "subprocess.Popen[str]"]) -> None:
    process = start(WORK, local_store.url)
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    # While its process lives it stays, however old it is.
    assert collect.plan(local_store, NOW).garbage == ()
    process.kill()
    process.wait()
    planned = collect.plan(local_store, NOW)
    assert kinds(planned) == ["temporary"]
    assert folder.exists()
    collect.remove(local_store, planned)
    assert not folder.exists()


@pytest.mark.usefixtures("aged")
def test_old_lock_files_go_and_the_next_holder_makes_a_new_one(local_store: Store) -> None:
    with local_store.lease(KEY):
        pass
    planned = collect.plan(local_store, NOW)
    assert kinds(planned) == ["lease"]
    with local_store.lease(KEY) as lease:
        assert collect.remove(local_store, planned).garbage == ()
        lease.check()
    collect.remove(local_store, planned)
    with local_store.lease(KEY) as lease:
        lease.check()


def test_a_collection_of_nothing_is_nothing(store: Store) -> None:
    planned = collect.plan(store)
    assert planned.garbage == ()
    assert collect.remove(store, planned).size == 0
