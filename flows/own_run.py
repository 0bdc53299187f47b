"""The flow run that this process is, as the server has it."""

import functools
from typing import Any, NoReturn

from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import Abort


class OwnRun:
    """What the server says of this run, and what it is told."""

    @functools.cached_property
    def is_cancelled(self) -> bool:
        """Whether somebody has cancelled it: a worker that stops ends it too, but then it is to go on."""
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(runtime.flow_run.id).state
        return state is not None and (state.is_cancelling() or state.is_cancelled())

    def end(self, state: State[Any]) -> NoReturn:
        """Ends it in a state. Raises Abort, at which Prefect ends this process in good order: of a flow that returns
        another state than Completed it logs a traceback, and one that is to begin again counts as crashed."""
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(runtime.flow_run.id, state)
        raise Abort(f"{state.name}: {state.message}")
