"""The flow run that this process is, as the server has it."""

import functools
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn, TypeVar

import httpx
from prefect import runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import Abort
from prefect.states import AwaitingRetry, Cancelled

from common.errors import StageInterrupted

Answer = TypeVar("Answer")
_PATIENCE_SECONDS = 240.0
"""How long an ending run waits for a server that does not answer: less than its worker waits for it."""
_POLL_SECONDS = 1.0
_AGAIN_SECONDS = 20.0
"""Until a run whose worker was stopped is taken again; workers look ten seconds ahead."""
logger = logging.getLogger("cairn.flows")


class OwnRun:
    """What the server says of this run, and what it is told; both wait for a server that does not answer."""

    @functools.cached_property
    def is_cancelled(self) -> bool:
        """Whether somebody has cancelled it: a worker that stops ends it too, but then it is to go on."""
        state = _patiently(lambda client: client.read_flow_run(runtime.flow_run.id)).state
        return state is not None and (state.is_cancelling() or state.is_cancelled())

    @property
    def age_seconds(self) -> float:
        """Seconds since it first ran."""
        first = _patiently(lambda client: client.read_flow_run(runtime.flow_run.id)).start_time
        return 0.0 if first is None else (datetime.now(UTC) - first).total_seconds()

    def end(self, state: State[Any], last: Callable[[], None] = lambda: None) -> NoReturn:
        """Ends it in a state, and then does what is to come last of all. Raises Abort, at which Prefect ends this
        process in good order: of a flow that returns another state than Completed it logs a traceback, and one that is
        to begin again counts as crashed."""
        _patiently(lambda client: client.set_flow_run_state(runtime.flow_run.id, state))
        last()
        raise Abort(f"{state.name}: {state.message}")

    def end_interrupted(self, error: StageInterrupted, by_signal: bool) -> NoReturn:
        """Ends it after a stage was stopped: as cancelled, or, where it was its worker alone that was stopped, so that
        another one takes it again. `by_signal`: whether this process was told to stop. Raises Abort, as `end` does."""
        if self.is_cancelled or not by_signal:
            self.end(Cancelled(message=str(error)))
        # A worker that is asked to take a run again whose process has not ended yet does not survive it.
        again = datetime.now(UTC) + timedelta(seconds=_AGAIN_SECONDS)
        self.end(AwaitingRetry(scheduled_time=again, message="its worker was stopped; another goes on with it"))


def _patiently(ask: Callable[[SyncPrefectClient], Answer]) -> Answer:
    until = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            with get_client(sync_client=True) as client:
                return ask(client)
        except httpx.TransportError as error:
            if time.monotonic() > until:
                raise
            logger.warning("the Prefect server does not answer (%s); waiting", error)
            time.sleep(_POLL_SECONDS)
