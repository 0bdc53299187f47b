"""A stage on a worker: a run of the deployment `stage/<worker>`, found again or started, and waited for.

A run's idempotency key is the pool, the store, the stage's key and the number of the attempt, which the store keeps. So
a pipeline that was killed and started again finds the run under way, two pipelines that need the same stage share one
run, and what has crashed is started anew under the next number.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar
from urllib.parse import urlsplit

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State, StateType, WorkerStatus
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelling

from artifacts.store import DamagedObject, Store
from common.errors import StageFailed, StageInterrupted, UserError
from common.files import sha256_bytes
from tasks.events import Listener
from tasks.work import Outcome, Work

REFUSED = "Refused"
"""The name of a failed state whose message says what the user has to mend."""
DAMAGED = "Damaged"
"""The same where an input turned out to be damaged, and is made anew by going through the recipe again."""
STOPPED = "Stopped"
"""The name of a crashed state where the worker was stopped: the stage goes on elsewhere, which is no failure."""

_BY_A_PIPELINE = "its pipeline was stopped"
_POLL_SECONDS = 1.0
_TELL_SECONDS = 10.0
_WAIT_SECONDS = 15.0
"""Seconds that a run may wait for a worker before anybody wonders."""
_CANCEL_SECONDS = 60.0
"""Seconds that a run may take to write its checkpoint and end; Prefect kills it after 30."""

Found = TypeVar("Found")
logger = logging.getLogger("cairn.tasks")


def run_on_worker(
    work: Work, listener: Listener, should_stop: Callable[[], bool], leaves: Callable[[], bool]
) -> Outcome:
    """Has a work done by a worker of its pool.

    Raises UserError, StageFailed where the run failed or crashed, and StageInterrupted where it was cancelled; for
    `should_stop` it is cancelled here, or left to itself where `leaves` says so.
    """
    if work.store.startswith("memory:"):
        raise UserError("a memory:// store is seen by one process alone, and workers are others; use a folder or a URL")
    store = Store.open(work.store)
    with get_client(sync_client=True) as client:
        server = _Server(client, work, should_stop, leaves)
        while True:
            attempt, run = server.started(store)
            state = server.ended(run, listener)
            if state.name == STOPPED:
                listener({"event": "Note", "text": f"{state.message}; it goes on elsewhere"})
            elif state.is_cancelled() and server.was_cancelled_by_a_pipeline(run):
                # This one, which shared the run with that one or came just after it, still wants it.
                listener({"event": "Note", "text": "another pipeline has stopped its run; it is started again"})
            else:
                return _outcome(work, store, run, state)
            store.end_attempt(work.key, attempt)


def refuse_password(store: str) -> None:
    """Raises UserError for the URL of a store that has a password: runs, records and logs tell where the store is."""
    place = urlsplit(store)
    if place.password:
        raise UserError(
            f"the store's URL at {place.hostname} has a password in it, which every run would show: leave it to the "
            f"environment of the machines that use it"
        )


def _outcome(work: Work, store: Store, run: FlowRun, state: State) -> Outcome:
    """What became of a work whose run has ended, or the error to raise."""
    if state.type == StateType.COMPLETED:
        record = store.find(work.key)
        if record is None:
            raise UserError(
                f"stage '{work.name}' is done, but not in {work.store}: the worker of pool '{work.runtime.worker}' "
                f"sees another store there; give all the same URL in CAIRN_STORE"
            )
        return Outcome(record, reused=False)
    if state.type == StateType.CANCELLED:
        raise StageInterrupted(f"stage '{work.name}' was cancelled; it goes on from there when run again")
    if state.name in (REFUSED, DAMAGED):
        raise (DamagedObject if state.name == DAMAGED else UserError)(state.message)
    raise StageFailed(
        f"run '{run.name}' of stage '{work.name}' on {work.runtime.worker}: {state.name}: {state.message}"
    )


class _Server:
    """The Prefect server, as one stage needs it; while it does not answer, everything waits."""

    def __init__(
        self, client: SyncPrefectClient, work: Work, should_stop: Callable[[], bool], leaves: Callable[[], bool]
    ) -> None:
        self._client, self._work, self._should_stop, self._leaves = client, work, should_stop, leaves

    def started(self, store: Store) -> tuple[int, FlowRun]:
        """The number and the run of the attempt under way, which is begun where there is none."""
        while True:
            attempt = store.attempt(self._work.key)
            run = self._ask(partial(self._find, attempt)) or self._ask(partial(self._start, attempt))
            state = run.state
            if state is None or not state.is_final():
                return attempt, run
            if state.is_completed() and store.find(self._work.key) is not None:
                return attempt, run
            store.end_attempt(self._work.key, attempt)

    def ended(self, run: FlowRun, listener: Listener) -> State:
        """Waits until a run has ended; tells meanwhile how it goes. Raises StageInterrupted when told to stop."""
        told = _Telling(self._client, self._work, listener)
        while True:
            now = self._read(run)
            state = now.state
            if state is not None and state.is_final():
                return state
            if self._should_stop():
                if self._leaves():
                    raise StageInterrupted(f"stage '{self._work.name}' goes on on its worker")
                self._cancel(run)
                raise StageInterrupted(f"stage '{self._work.name}' was stopped; it goes on from there when run again")
            self._ask(partial(told.about, now))
            time.sleep(_POLL_SECONDS)

    def was_cancelled_by_a_pipeline(self, run: FlowRun) -> bool:
        """Whether it was a pipeline that cancelled a run, because it was stopped itself."""
        states = self._ask(lambda: self._client.read_flow_run_states(run.id))
        return any(state.message == _BY_A_PIPELINE for state in states)

    def _key(self, attempt: int) -> str:
        work = self._work
        return f"{work.runtime.worker}-{sha256_bytes(work.store.encode())[:8]}-{work.key}-{attempt}"

    def _find(self, attempt: int) -> FlowRun | None:
        wanted = FlowRunFilter.model_validate({"idempotency_key": {"any_": [self._key(attempt)]}})
        found = self._client.read_flow_runs(flow_run_filter=wanted, limit=1)
        return found[0] if found else None

    def _start(self, attempt: int) -> FlowRun:
        work = self._work
        try:
            # `Any` to mypy: it can be awaited, too, where there is a loop.
            return run_deployment(  # type: ignore[return-value]
                f"stage/{work.runtime.worker}",
                parameters={"work": work.model_dump(mode="json"), "key": work.key},
                idempotency_key=self._key(attempt),
                flow_run_name=f"{work.name} on {work.runtime.worker}",
                tags=[engine] if (engine := work.config.get("engine")) else None,
                timeout=0,
            )
        except ObjectNotFound as error:
            raise UserError(
                f"stage '{work.name}' is to run on a worker '{work.runtime.worker}', and the Prefect server does not "
                f"know its deployment; run: cairn deploy"
            ) from error

    def _read(self, run: FlowRun) -> FlowRun:
        try:
            return self._ask(lambda: self._client.read_flow_run(run.id))
        except ObjectNotFound as error:
            raise StageFailed(f"run '{run.name}' of stage '{self._work.name}' was deleted") from error

    def _cancel(self, run: FlowRun) -> None:
        self._ask(lambda: self._client.set_flow_run_state(run.id, Cancelling(message=_BY_A_PIPELINE)))
        until = time.monotonic() + _CANCEL_SECONDS
        while time.monotonic() < until:
            state = self._read(run).state
            if state is not None and state.is_final():
                return
            time.sleep(_POLL_SECONDS)
        logger.warning("run '%s' has been told to stop and has not ended yet", run.name)

    def _ask(self, question: Callable[[], Found]) -> Found:
        told = False
        while True:
            try:
                return question()
            except (httpx.TransportError, PrefectHTTPStatusError) as error:
                if isinstance(error, PrefectHTTPStatusError) and error.response.status_code < 500:
                    raise
                if not told:
                    logger.warning(
                        "stage '%s': the Prefect server does not answer (%s); waiting", self._work.name, error
                    )
                    told = True
                if self._should_stop():
                    raise StageInterrupted(
                        f"stage '{self._work.name}' goes on on its worker: the Prefect server did not answer, so that "
                        f"it could not be stopped"
                    ) from error
                time.sleep(_POLL_SECONDS)


class _Telling:
    """Tells how a run on a worker goes: that it waits and for what, then how far it is."""

    def __init__(self, client: SyncPrefectClient, work: Work, listener: Listener) -> None:
        self._client, self._work, self._listener = client, work, listener
        self._since = time.monotonic()
        self._asked = time.monotonic()
        self._said: str | None = None

    def about(self, run: FlowRun) -> None:
        """Says what is new about a run, every few seconds at most."""
        now = time.monotonic()
        if now - self._asked < _TELL_SECONDS:
            return
        self._asked = now
        assert run.state is not None
        if run.state.is_running():
            line = self._progress(run)
        else:
            line = self._hint() if now - self._since > _WAIT_SECONDS else None
        if line is not None and line != self._said:
            self._said = line
            self._listener({"event": "Note", "text": line})

    def _progress(self, run: FlowRun) -> str | None:
        wanted = ArtifactFilter.model_validate({"flow_run_id": {"any_": [run.id]}, "type": {"any_": ["progress"]}})
        found = self._client.read_artifacts(artifact_filter=wanted, limit=1)
        return found[0].description if found else None

    def _hint(self) -> str:
        pool = self._work.runtime.worker
        try:
            workers = self._client.read_workers_for_work_pool(pool)
        except ObjectNotFound:
            workers = []
        if any(worker.status == WorkerStatus.ONLINE for worker in workers):
            return f"waits: the workers of pool '{pool}' are busy"
        return f"waits: no worker of pool '{pool}' is online; start one on such a machine with: cairn worker {pool}"
