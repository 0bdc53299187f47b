"""A pipeline that a worker runs, as the UI and `prefect deployment run` start it."""

from typing import Any

from prefect.client.schemas.objects import State

from tests.deployment.conftest import LONG, RECIPE, Fleet, wait_for

HERE = ("documents", "tokenizer", "tokens", "stack", "refine", "sft", "evaluate", "publish")
"""Kinds of stages that run with the pipeline: starting a run for each takes long on a machine that does it all."""


class Launched:
    """A run of the deployment `pipeline/cairn`, whose stage `base` trains long enough to be disturbed."""

    def __init__(self, fleet: Fleet, **parameters: Any) -> None:
        self._fleet = fleet
        workers = dict.fromkeys(HERE, "local") | parameters.pop("workers", {})
        given = {"recipe": RECIPE, "workers": workers, "overrides": list(LONG), **parameters}
        with fleet.client() as client:
            deployment = client.read_deployment_by_name("pipeline/cairn")
            self.id = client.create_flow_run_from_deployment(deployment.id, parameters=given).id

    def state(self) -> State[Any]:
        """How it stands."""
        with self._fleet.client() as client:
            state = client.read_flow_run(self.id).state
        assert state is not None
        return state

    def ended(self, seconds: float = 300.0) -> State[Any]:
        """Waits for its end."""
        wait_for(lambda: self.state().is_final(), seconds, what=f"the end of pipeline {self.id}")
        return self.state()

    def states(self) -> list[str]:
        """The names of the states that it has been in since it first ran."""
        with self._fleet.client() as client:
            names = [str(state.name) for state in client.read_flow_run_states(self.id)]
        return names[names.index("Running") :]
