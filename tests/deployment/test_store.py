"""Machines that share a store at a URL: each has a home and a cache of its own, and the way to the store may break."""

import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.artifacts.conftest import s3_address, s3_url
from tests.deployment.conftest import Fleet, wait_for
from tests.deployment.proxy import Proxy

__all__ = ["s3_address", "s3_url"]


@pytest.fixture
def on_s3(fleet: Fleet, s3_address: str, s3_url: str) -> Proxy:
    """The fleet's store is at a URL, by a way that can be closed."""
    proxy = Proxy(urlsplit(s3_address).port or 0)
    fleet.environment |= {"CAIRN_STORE": s3_url, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        fleet.environment[name] = "testing"
    return proxy


def other_machine(folder: Path) -> dict[str, str]:
    """The environment of a machine that shares nothing but the server and the store."""
    (folder / "home").mkdir()
    return {"HOME": str(folder / "home"), "CAIRN_CACHE": str(folder / "other-cache"), "CAIRN_LOCKS": str(folder / "l")}


def test_the_store_is_out_of_reach_when_a_stage_begins(fleet: Fleet, on_s3: Proxy, undisturbed: str) -> None:
    fleet.worker(**other_machine(fleet.folder))
    fleet.prefect("work-pool", "pause", "cpu")
    run = fleet.run("stages.base.retries=0")
    wait_for(lambda: fleet.states() in (["Scheduled"], ["Late"]), what="the stage's run")
    on_s3.cut()
    fleet.prefect("work-pool", "resume", "cpu")
    wait_for(lambda: fleet.states() == ["Running"], what="its start")
    time.sleep(20)
    on_s3.restore()
    fleet.finish(run)
    assert fleet.states() == ["Completed"]
    assert fleet.published() == undisturbed


def test_the_store_is_out_of_reach_for_half_a_minute(fleet: Fleet, on_s3: Proxy, undisturbed: str) -> None:
    worker = other_machine(fleet.folder)
    fleet.worker(**worker)
    run = fleet.run()
    wait_for(lambda: "step 20: validation loss" in fleet.text("worker-one.log"), what="training")
    on_s3.cut()
    time.sleep(30)
    assert fleet.states() == ["Running"]
    on_s3.restore()
    fleet.finish(run)
    assert fleet.states() == ["Completed"]
    assert fleet.published() == undisturbed
    assert not (fleet.folder / "store").exists()
