"""`cairn deploy`, given again: nothing is there twice, and what people have changed stays."""

from datetime import timedelta

import pytest
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.events.schemas.automations import EventTrigger

from flows.deploy import POOLS, automations
from tests.deployment.conftest import Fleet, deploy_to


def test_it_is_safe_to_repeat(fleet: Fleet, capfd: pytest.CaptureFixture[str]) -> None:
    made = automations()[1]
    assert isinstance(made.trigger, EventTrigger)
    name, trigger = made.name, made.trigger.model_copy(update={"within": timedelta(minutes=20)})
    with fleet.client() as client:
        (before,) = client.read_automations_by_name(name)
        client.update_automation(before.id, made.model_copy(update={"trigger": trigger, "enabled": False}))
        client.update_work_pool("tpu", WorkPoolUpdate(concurrency_limit=7))
        try:
            deploy_to(fleet.server)
            said = capfd.readouterr().out
            (after,) = client.read_automations_by_name(name)
            assert isinstance(after.trigger, EventTrigger)
            assert (after.trigger.within, after.enabled) == (timedelta(minutes=20), False)
            assert client.read_work_pool("tpu").concurrency_limit == 7
            deployments = {deployment.name for deployment in client.read_deployments()}
        finally:
            client.update_automation(before.id, made)
            client.update_work_pool("tpu", WorkPoolUpdate(concurrency_limit=1))
    assert "pool tpu: there already, 7 at a time" in said
    assert f"automation '{name}': there already, and turned off" in said
    assert deployments == {"cairn", *POOLS} - {"pipeline"}
