"""Documents from a source through rules and past duplicates into shards, several batches at a time.

D documents of a batch, S of them that the rules keep.
"""

import errno
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import StageInterrupted, UserError
from common.files import canonical_json, write_atomically
from models.training.events import Note
from tasks.corpus.batching import Batch, Batcher
from tasks.corpus.config import Config
from tasks.corpus.conversations import CHOSEN, MESSAGES, REJECTED
from tasks.corpus.duplicates import DuplicateIndex
from tasks.corpus.examining import KEPT, Examined, Examiner
from tasks.corpus.shards import Shards
from tasks.corpus.sources import SPLITS, Count, Opened, Reading
from tasks.corpus.tally import Tally, described_rules
from tasks.stage import Context

COMMIT_BYTES = 128 << 20
NOTE_SECONDS = 15.0
BATCHES_PER_RELEASE = 8
WORKERS = 8
"""Batches that are examined at once, at most: each takes memory, and one thread takes in what they give."""


class Pipeline:
    """Makes the documents of a config; what was done before a kill is not done again."""

    def __init__(self, config: Config, context: Context) -> None:
        self._config = config
        self._context = context
        self._folder = context.local_scratch
        self._examiner = Examiner(config)
        self._rules = described_rules(config, self._examiner.benchmarks)
        self._tally = Tally([Count() for _ in self._rules])
        self._description: Mapping[str, Any] = {}
        self._shards: Shards
        self._reading: Reading
        self._index: DuplicateIndex | None = None
        self._saved_bytes = 0
        self._told = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Writes the shards into the context's output; gives what `documents.json` says.

        Raises UserError for bad input and where no document is left, StageInterrupted where it was told to stop.
        """
        workers = min(self._context.runtime.processes or _cores(), WORKERS)
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(workers))
            # Before the pool waits for what it does: nobody wants the batches that were not begun.
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            previous = self._prepare(pool, stack)
            self._reading = Reading(
                others=self._config.read_columns,
                conversations=self._config.conversations,
                skip=self._config.on_error == "skip",
                folder=self._folder,
                previous=previous.get("source"),
                first_file=self._tally.file,
                schema=_schema(previous),
                tell=lambda text: self._context.report(Note(text)),
            )
            opened = self._config.source.open(self._reading)
            self._description = opened.description
            self._work(opened, pool, workers)
            self._check()
            splits = self._shards.publish(self._context.output)
        return self._described(splits)

    def _prepare(self, pool: ThreadPoolExecutor, stack: ExitStack) -> Mapping[str, Any]:
        """Takes up what an earlier start left, if anything; gives the state that it saved last."""
        try:
            state = self._open(pool)
            if state is not None:
                self._shards.restore(state["shards"])
                self._tally = Tally.from_json(state["tally"])
                self._saved_bytes = self._tally.read.bytes
                text = f"going on after {self._tally.read.documents:,} documents that were read before"
                self._context.report(Note(text))
        except (ValueError, LookupError, OSError, EOFError) as error:
            if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
                raise  # a full disk, say, takes nothing from what was saved
            self._context.report(Note(f"beginning anew: what an earlier start left is damaged ({error})"))
            self._tally = Tally([Count() for _ in self._rules])
            state = None
        if state is None:
            self._close()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._open(pool)
        stack.callback(self._close)
        return state or {}

    def _open(self, pool: ThreadPoolExecutor) -> Any:
        """Opens the shards and the index; gives the state that was saved last, or None."""
        (self._folder / "shards").mkdir(parents=True, exist_ok=True)
        self._shards = Shards(self._folder / "shards", self._config.shard_bytes, pool.submit)
        if self._config.duplicates is not None:
            self._index = DuplicateIndex(self._folder / "duplicates", self._config.duplicates)
            saved = self._index.state()
        else:
            path = self._folder / "state.json"
            saved = path.read_bytes() if path.exists() else None
        return None if saved is None else json.loads(saved)

    def _close(self) -> None:
        self._shards.close()
        if self._index is not None:
            self._index.close()
            self._index = None

    def _save(self) -> None:
        """Makes durable what was done so far, so that another start goes on from here."""
        shards = self._shards.state()
        schema = self._reading.schema
        described = {
            "source": self._description,
            "schema": None if schema is None else schema.serialize().to_pybytes().hex(),
            "tally": asdict(self._tally),
            "shards": shards,
        }
        state = canonical_json(described)
        if self._index is not None:
            self._index.commit(state)
        else:
            write_atomically(self._folder / "state.json", state)
        self._shards.forget(shards)
        self._saved_bytes = self._tally.read.bytes

    def _work(self, opened: Opened, pool: ThreadPoolExecutor, workers: int) -> None:
        """Reads the source to its end, or until enough is kept."""
        if self._tally.enough:
            return
        pending: deque[Future[Examined]] = deque()
        done = self._tally.batches
        with closing(Batcher(self._reading).batches(opened.parts)) as source:
            for number, batch in enumerate(source, self._tally.file_batch):
                if number < done:
                    self._stop_if_told(save=False)
                    continue
                pending.append(pool.submit(self._examined, number, batch))
                # One more than the workers, so that none of them waits while this thread reads.
                if len(pending) > workers + 1 and not self._take(pending.popleft().result()):
                    return
        while pending:
            if not self._take(pending.popleft().result()):
                return

    def _examined(self, number: int, batch: Batch) -> Examined:
        examined = self._examiner.examine(batch)
        _give_back_memory(number)
        return examined

    def _take(self, examined: Examined) -> bool:
        """Counts a batch and gives what is kept of it to the shards; tells whether more is wanted."""
        rows_S = np.flatnonzero(examined.rule_D == KEPT)
        kept_S = np.ones(len(rows_S), bool)
        reason_D = examined.rule_D.copy()
        if self._index is not None and examined.prints is not None:
            novel = self._index.novel(examined.prints, kept_S)
            kept_S = novel.kept_D
            names = [rule["rule"] for rule in self._rules]
            for name, dropped_S in (("exact_duplicates", novel.exact_D), ("near_duplicates", novel.near_D)):
                if dropped_S.any():
                    reason_D[rows_S[dropped_S]] = names.index(name)
        end = self._end(rows_S[kept_S], examined.size_D)
        self._tally.count(reason_D[:end], examined.size_D[:end])
        self._tally.refuse(examined.batch.refused)
        self._append(examined, kept_S & (rows_S < end))
        if examined.batch.file is not None:
            self._tally.file, self._tally.file_batch = examined.batch.file, self._tally.batches
        self._tally.batches += 1
        self._tell()
        self._stop_if_told(save=True)
        if self._shards.unsaved or self._tally.read.bytes - self._saved_bytes >= COMMIT_BYTES:
            self._save()
        _give_back_memory(self._tally.batches)
        return not self._tally.enough

    def _end(self, kept_rows: NDArray[np.int64], size_D: NDArray[np.int64]) -> int:
        """The row of a batch at which enough is kept, or its end."""
        config, kept = self._config, self._tally.kept
        end = len(size_D)
        if config.max_documents is not None and kept.documents + len(kept_rows) >= config.max_documents:
            end, self._tally.enough = int(kept_rows[config.max_documents - kept.documents - 1]) + 1, True
        if config.max_bytes is not None:
            over = np.flatnonzero(kept.bytes + np.cumsum(size_D[kept_rows]) > config.max_bytes)
            if len(over):
                end, self._tally.enough = min(end, int(kept_rows[over[0]])), True
        return end

    def _append(self, examined: Examined, kept_S: NDArray[np.bool_]) -> None:
        import pyarrow as pa

        split_S = examined.split_S
        if split_S is None:
            fixed = self._config.split if isinstance(self._config.split, str) else examined.batch.split
            split_S = np.full(len(kept_S), SPLITS.index(fixed or "train"), np.int8)
        for number, split in enumerate(SPLITS):
            here_S = kept_S & (split_S == number)
            if here_S.all() and len(here_S):
                self._shards.append(split, examined.kept)
            elif here_S.any():
                self._shards.append(split, examined.kept.filter(pa.array(here_S)))

    def _stop_if_told(self, save: bool) -> None:
        if self._context.should_stop():
            if save:
                self._save()
            raise StageInterrupted("the documents were stopped; they go on from there when run again")

    def _tell(self) -> None:
        """Says now and then how far it is."""
        now = time.monotonic()
        if now - self._told < NOTE_SECONDS:
            return
        self._told = now
        tally = self._tally
        dropped = sum(count.documents for count in (*tally.dropped, *tally.refused.counts.values()))
        text = f"{tally.read.bytes / 1e6:,.0f} MB read: {tally.kept.documents:,} documents kept, {dropped:,} dropped"
        self._context.report(Note(text))

    def _check(self) -> None:
        """Raises UserError where the source has changed meanwhile, or nothing is left of it."""
        try:
            self._config.source.resolved()
        except UserError:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        tally, name = self._tally, self._description["name"]
        if tally.enough and not tally.kept.documents:
            raise UserError(f"max_bytes {self._config.max_bytes}: the first document to keep is longer than that")
        if not tally.read.documents and not tally.refused.damaged:
            raise UserError(f"source '{name}' is empty: it has no documents")
        if not tally.kept.documents:
            counts = [
                (entry["rule"], entry["documents"]) for entry in tally.described(self._rules) if entry["documents"]
            ]
            told = ", ".join(f"{rule} {documents:,}" for rule, documents in counts) or "; ".join(tally.refused.damaged)
            raise UserError(f"no document of source '{name}' is left of {tally.read.documents:,}: {told}")

    def _described(self, splits: Mapping[str, Any]) -> dict[str, Any]:
        damaged = {"damaged": self._tally.refused.damaged} if self._tally.refused.damaged else {}
        compared = {"compared_with": self._examiner.compared_with} if self._config.contamination else {}
        format = {"format": self._config.conversations} if self._config.conversations else {}
        return {
            "source": {**self._description, **format},
            "read": asdict(self._tally.read),
            "splits": dict(splits),
            "dropped": self._tally.described(self._rules),
            **_conversations(self._config.document_columns),
            **compared,
            **damaged,
        }


def _conversations(columns: Collection[str]) -> dict[str, str]:
    """Says that documents are conversations, or preferences between two answers, by the columns that they have."""
    if MESSAGES not in columns:
        return {}
    return {"conversations": "preferences" if {CHOSEN, REJECTED} <= {*columns} else "messages"}


def _cores() -> int:
    """The cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _give_back_memory(batch: int) -> None:
    """Returns to the system, after some batches, what Arrow's allocator keeps for this thread: that would grow for as
    long as threads free what others have allocated."""
    import pyarrow as pa

    if batch % BATCHES_PER_RELEASE == 0:
        pa.default_memory_pool().release_unused()


def _schema(state: Mapping[str, Any]) -> Any:
    """The columns that the source began with, where they are known."""
    import pyarrow as pa

    saved = state.get("schema")
    return None if saved is None else pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(saved)))
