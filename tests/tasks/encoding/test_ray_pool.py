"""Units on a Ray cluster of several nodes on this machine, one of which is killed in the middle."""

import builtins
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from artifacts.identity import describe_files
from common.errors import StageInterrupted, UserError
from models.tokenizer import Tokenizer
from tasks.encoding.ray_pool import encode_over_ray
from tasks.encoding.units import EncodedUnit, Encoders, Job, Unit, encode_unit
from tasks.encoding.worker import Order
from tasks.stage import Runtime
from tests.tasks.encoding.corpora import byte_level, rows, texts, write_documents
from tests.tasks.test_tokens import Run

STORE_BYTES = 80 << 20
UNITS, ROWS = 16, 200


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Unit]]:
    """Documents, a tokenizer and the units."""
    place = tmp_path_factory.mktemp("corpus")
    listed = texts(UNITS * ROWS)
    write_documents(place / "documents", {"train": rows(listed)}, shard_rows=ROWS)
    units = []
    for number in range(UNITS):
        size = sum(len(text.encode()) for text in listed[number * ROWS : (number + 1) * ROWS])
        name = f"train-{number:05d}.parquet"
        units.append(Unit(split="train", number=number, name=name, documents=ROWS, bytes=size))
    return place / "documents", byte_level(place / "tokenizer"), units


def order_for(corpus: tuple[Path, Path, list[Unit]], output: Path, library: str = "gigatoken") -> Order:
    documents, tokenizer, _ = corpus
    output.mkdir()
    job = Job(
        library=library,
        loss_on="text",
        bos_id=1,
        eos_id=2,
        vocab_size=len(Tokenizer(tokenizer)),
        shard_tokens=5000,
    )
    return Order(job=job, documents=documents, tokenizer=tokenizer, output=output)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that does no work, so that a test decides where work is done."""
    import ray

    cluster_utils = pytest.importorskip("ray.cluster_utils")
    head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    made = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    yield made
    ray.shutdown()
    made.shutdown()


def keep_units(encoded: Iterator[tuple[Unit, EncodedUnit]], units: list[Unit]) -> None:
    for unit, _ in encoded:
        units += [unit]


def add_node(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)


@pytest.mark.slow
def test_a_node_that_is_killed_costs_nothing(
    cluster: Any, corpus: tuple[Path, Path, list[Unit]], tmp_path: Path
) -> None:
    documents, tokenizer, units = corpus
    here = order_for(corpus, tmp_path / "here", "tokenizers")
    encoders = Encoders.load(here.job, tokenizer, parallel=True)
    expected = {unit: encode_unit(unit, str(documents / unit.name), here.job, encoders, here.output) for unit in units}
    nodes = [add_node(cluster)]
    there = order_for(corpus, tmp_path / "there")
    found = {}
    for unit, encoded in encode_over_ray(units, there, cluster.address, lambda: False):
        found[unit] = encoded
        if len(found) == 3:
            # The only one that works dies with units under way; another one is there only after that.
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            nodes.append(add_node(cluster))
    assert found == {unit: one.model_copy(update={"library": "gigatoken"}) for unit, one in expected.items()}
    assert describe_files(there.output) == describe_files(here.output)


@pytest.mark.slow
def test_two_nodes_share_the_work_and_stop_when_told(
    cluster: Any, corpus: tuple[Path, Path, list[Unit]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, units = corpus
    add_node(cluster)
    add_node(cluster)
    whole = order_for(corpus, tmp_path / "whole")
    nodes = tmp_path / "nodes"
    nodes.mkdir()

    def noted(unit: Unit, *arguments: Any) -> Any:
        import ray

        from tasks.encoding.ray_pool import _encode

        (nodes / unit.key).write_text(ray.get_runtime_context().get_node_id())
        return _encode(unit, *arguments)

    monkeypatch.setattr("tasks.encoding.ray_pool._encode", noted)
    assert {unit for unit, _ in encode_over_ray(units, whole, cluster.address, lambda: False)} == set(units)
    monkeypatch.undo()
    assert len({path.read_text() for path in nodes.iterdir()}) == 2
    seen: list[Unit] = []
    some = order_for(corpus, tmp_path / "some")
    stopping = encode_over_ray(units, some, cluster.address, lambda: len(seen) > 2)
    with pytest.raises(StageInterrupted):
        keep_units(stopping, seen)
    assert 3 <= len(seen) < UNITS


@pytest.mark.slow
def test_what_is_wrong_with_documents_is_said_once(
    cluster: Any, corpus: tuple[Path, Path, list[Unit]], tmp_path: Path
) -> None:
    add_node(cluster)
    order = order_for(corpus, tmp_path / "some")
    broken = Unit(split="train", number=0, name="broken.parquet", documents=1, bytes=1)
    (order.documents / broken.name).write_bytes(b"no Parquet")
    with pytest.raises(UserError, match=r"documents broken.parquet cannot be read .*; make them again"):
        list(encode_over_ray([broken], order, cluster.address, lambda: False))


def test_no_cluster_is_an_error_in_a_line(corpus: tuple[Path, Path, list[Unit]], tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=r"ray: no cluster answers at '127.0.0.1:9' \(.*\); start one with") as error:
        list(encode_over_ray(corpus[2], order_for(corpus, tmp_path / "some"), "127.0.0.1:9", lambda: False))
    assert "\n" not in str(error.value)
    assert time.monotonic() - began < 60


def test_without_ray_the_extra_is_named(
    corpus: tuple[Path, Path, list[Unit]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def absent(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "ray":
            raise ImportError("No module named 'ray'")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"^ray: the package is not installed; pip install 'cairn\[ray\]'$"):
        list(encode_over_ray(corpus[2], order_for(corpus, tmp_path / "some"), "auto", lambda: False))


@pytest.mark.slow
def test_the_stage_makes_the_same_over_ray(
    cluster: Any, corpus: tuple[Path, Path, list[Unit]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.tokens.WORTH_IT_BYTES", 0)
    documents, tokenizer, _ = corpus
    add_node(cluster)
    run = Run(tmp_path)
    here, _ = run(documents, tokenizer, {"bos": True, "shard_tokens": 7000})
    there, metrics = run(
        documents, tokenizer, {"bos": True, "shard_tokens": 7000}, runtime=Runtime(ray=cluster.address)
    )
    assert metrics["encoder"]["library"] == "gigatoken"
    assert metrics["notes"] == []
    assert describe_files(there) == describe_files(here)
